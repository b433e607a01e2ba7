"""The reliability campaign: it tries by itself to break runs of the tiny model, and says what did not hold.

    python -m tests.campaign             # all of it; needs Linux, and root for the real full disks
    python -m tests.campaign --quick     # a part of every kind, in at most a minute
    python -m tests.campaign --only kills disks

What each kind tries: tries.py. What is promised, and the numbers: docs/reliability.md. The exit status is 1
where something did not hold. pytest collects nothing here.
"""

import argparse
import io
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "teachers")]

from campaign import children, tries  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description="Try to break runs of the tiny model.")
    parser.add_argument("--quick", action="store_true", help="a part of every kind, in at most a minute")
    parser.add_argument("--only", nargs="+", choices=tries.KINDS, default=list(tries.KINDS), help="kinds")
    args = parser.parse_args()
    began, tried, held, failed = time.time(), Counter(), Counter(), []
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a kill loses no more of it than of a disk
    with tempfile.TemporaryDirectory(prefix="campaign-", dir=memory) as root:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            children.prepare(Path(root))
            tries.prepare(Path(root))
        cases = []
        for kind in args.only:
            whole_kind = [(kind, *case) for case in tries.KINDS[kind](random.Random(0))]
            few = min(tries.QUICK[kind], len(whole_kind))
            cases += random.Random(0).sample(whole_kind, few) if args.quick else whole_kind
        forks = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=forks) as pool:
            under_way = {pool.submit(attempt, try_it): (kind, what) for kind, what, try_it in cases}
            for done in as_completed(under_way):
                kind, what = under_way[done]
                tried[kind] += 1
                held[kind] += done.result() is None
                if done.result():
                    failed.append(f"{kind}: {what}: {done.result()}")
                    print(f"not held: {failed[-1]}", file=sys.stderr)
    print(f"{'kind':12}{'tried':>7}{'held':>7}  what")
    for kind in args.only:
        print(f"{kind:12}{tried[kind]:7}{held[kind]:7}  {' '.join(tries.KINDS[kind].__doc__.split())}")
    print(f"{len(cases)} cases in {time.time() - began:.0f} s, {len(failed)} did not hold")
    print("".join(f"not held: {line}\n" for line in sorted(failed)), end="")
    raise SystemExit(bool(failed))


def attempt(try_it):
    """None, or what did not hold."""
    try:
        return try_it()
    except Exception as e:
        return f"{type(e).__name__}: {e}"


if __name__ == "__main__":
    main()
