"""How idle threads wait. Every script that computes imports this before torch, whose OpenMP reads it once.

Between two operations the threads of libgomp (torch's on Linux) spin, by default for milliseconds. Where
another process needs their core, a step then takes many times as long. A short spin avoids this, and costs
little where the machine has nothing else to do (docs/speed.md).
"""

import os

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):  # else the user has chosen
    os.environ["GOMP_SPINCOUNT"] = "1000"
