"""How many threads there are, and how idle ones wait. Every script that computes imports this before torch,
whose OpenMP reads it once.

Between two operations the threads of libgomp (torch's on Linux) spin, by default for milliseconds. Where
another process needs their core, a step then takes many times as long. With a shorter spin it takes twice as
long there, and a tenth longer where the machine has nothing else to do (docs/speed.md).
"""

import os
from pathlib import Path


def cores(limit: str = "/sys/fs/cgroup/cpu.max") -> int:
    """The cores of the machine, or as many as the quota of a container is worth (cgroup v2)."""
    cores = os.cpu_count() or 1
    try:
        quota, period = map(int, Path(limit).read_text(encoding="utf-8").split())
        return min(cores, max(1, round(quota / period)))
    except (OSError, ValueError):  # there is no such file, or it says "max"
        return cores


if cores() < (os.cpu_count() or 1):  # torch would start a thread for every core of the machine
    os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):  # else the user has chosen
    os.environ["GOMP_SPINCOUNT"] = "5000"
