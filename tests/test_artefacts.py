"""What results/ holds for those who do not train: an adapter that plays, and the expert games as written."""

import hashlib
import json
from pathlib import Path

import pytest

import eval
from models import adapters, pretrained
from play.records import read_records
from tools import expert_games

RESULTS = Path(__file__).parent.parent / "results"


@pytest.mark.parametrize("name", ["expert_games.jsonl", "adapter/adapter_model.safetensors"])
def test_the_files_have_the_checksums_that_their_page_states(name):
    assert hashlib.sha256((RESULTS / name).read_bytes()).hexdigest() in (RESULTS / "README.md").read_text()


def test_the_expert_games_are_what_the_command_writes(tmp_path):
    expert_games.main(["--agents", "4-8", "--out", str(tmp_path / "games.jsonl")])
    assert (tmp_path / "games.jsonl").read_bytes() == (RESULTS / "expert_games.jsonl").read_bytes()
    records = read_records(str(RESULTS / "expert_games.jsonl"))  # as --games reads them
    assert len(records) == 1532 and {len(r.instance["alpha"]) for r in records} == {4, 5, 6, 7, 8}
    assert {r.game for r in records} == set(range(126))


def test_the_adapter_is_small_and_whole():
    state, config = adapters.read_adapter(RESULTS / "adapter")
    assert (config.r, config.base_model, len(state)) == (32, pretrained.DEFAULT_MODEL, 30 * 7 * 2)
    assert sum(f.stat().st_size for f in RESULTS.rglob("*") if f.is_file()) < 30e6


@pytest.mark.real_model
def test_the_adapter_plays_games_of_six_in_any_seat(tmp_path):
    if not (pretrained.cache_folder() / pretrained.DEFAULT_MODEL).exists():
        pytest.skip("the default model is not in the cache: python -m models.pretrained")
    argv = ["--policy", str(RESULTS / "adapter"), "--agents", "6", "--seat", "random", "--eval-games", "6"]
    eval.main([*argv, "--json", str(tmp_path / "out.json")])
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    own, chance = (results[name]["all rounds"] for name in (str(RESULTS / "adapter"), "expert:random"))
    assert own["U1"]["mean"] > 0.8 and own["row"]["mean"] > chance["row"]["mean"] + 0.1
