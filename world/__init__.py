"""The games, each in one file, and which of their instances are played (draws.py)."""

import decisions  # noqa: F401  (registers the kinds of decisions G and E)
from world import bcz, pgg  # noqa: F401  (each module registers its game)
