"""How idle threads wait. To be imported before torch, whose OpenMP reads it once, by every script that
computes.

Between two operations the threads of libgomp (torch's on Linux) spin, by default for milliseconds. Where
another process wants their core, what spins keeps it from working: a step beside one busy process takes many
times as long. With a short spin it does not, and alone on the machine little is lost (docs/speed.md).
"""

import os

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):  # else the user has chosen
    os.environ["GOMP_SPINCOUNT"] = "1000"
