"""How idle threads wait is settled before torch is loaded, in every script that computes."""

import os
import subprocess
import sys

import pytest
from whole_runs import ROOT

from run import threads

STOP = """
import importlib, os, sys
class Stop:
    def find_spec(self, name, *_):
        if name == "torch":
            raise SystemExit(f"{os.environ.get('GOMP_SPINCOUNT')} {os.environ.get('OMP_WAIT_POLICY')}")
sys.meta_path.insert(0, Stop())
importlib.import_module(sys.argv[1])
"""


def settled(script, **environment):
    own = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    how = dict(cwd=ROOT, env=own | environment, capture_output=True, text=True)
    return subprocess.run([sys.executable, "-c", STOP, script], **how).stderr.strip()


OWN = [("eval", {"OMP_WAIT_POLICY": "PASSIVE"}, "None PASSIVE"), ("eval", {"GOMP_SPINCOUNT": "7"}, "7 None")]
SHORT = [(script, {}, "5000 None") for script in ("train_rft", "train_sft", "eval", "tools.bench")]
SHORT += [(f"tools.{script}", {}, "5000 None") for script in ("others", "crossplay", "expert_games", "merge")]


@pytest.mark.parametrize("script, own, expected", SHORT + OWN)
def test_idle_threads_spin_for_a_short_time_unless_the_user_chose(script, own, expected):
    assert settled(script, **own) == expected


def test_a_quota_of_a_container_limits_the_threads(tmp_path):
    limit, all_cores = tmp_path / "cpu.max", os.cpu_count()
    limits = {"100000 100000": 1, "30000 100000": 1, "max 100000": all_cores, "x": all_cores}
    for text, cores in limits.items():
        limit.write_text(text + "\n")
        assert threads.cores(str(limit)) == cores
    assert threads.cores(str(tmp_path / "none")) == all_cores
