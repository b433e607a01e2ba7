"""The games, each in one file, and which of their instances are played (draws.py)."""

from world import bcz, pgg  # noqa: F401  (importing a game registers it)
