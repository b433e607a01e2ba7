"""train_sft.py: what it trains on, an adapter for each kind of decision, and what it refuses."""

import json
import shutil

import huggingface_hub
import pytest
from tiny import make_tiny_model
from whole_runs import SHARED, Run, fake_parse, flags, rft_flags, sft_flags, without_timings

import eval as evaluation
import train_rft
import train_sft
from models import adapters as adapter_files
from play import players
from tools import expert_games


def test_sft_runs_with_simulated_and_with_written_games(model_dir, tmp_path, capsys):
    train_sft.main(sft_flags(model_dir, tmp_path / "simulated", max_steps=2))
    data = tmp_path / "games.jsonl"
    same = ("games", "agents", "rounds", "noise", "seed", "expert", "information")
    expert_games.main(["--out", str(data), *flags({k: SHARED[k] for k in same})])
    train_sft.main(sft_flags(model_dir, tmp_path / "written", max_steps=2, data=data))
    simulated, written = Run(tmp_path / "simulated"), Run(tmp_path / "written")
    assert [line["step"] for line in written.lines("metrics.jsonl") if "loss" in line] == [0, 1]
    assert without_timings(simulated.lines("metrics.jsonl")) == without_timings(
        written.lines("metrics.jsonl")
    )
    assert simulated.weights() == written.weights()
    assert any(v.abs().max() > 0 for k, v in written.tensors().items() if "lora_B" in k)
    assert str(tmp_path / "written" / "adapter") in capsys.readouterr().out
    # other games would have been seen
    lines = data.read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(line for line in lines if json.loads(line)["game"] != 0))
    train_sft.main(sft_flags(model_dir, tmp_path / "fewer", max_steps=2, data=tmp_path / "fewer.jsonl"))
    assert Run(tmp_path / "fewer").weights() != written.weights()


@pytest.mark.parametrize("seat", ["all", 1])
def test_sft_trains_and_is_tested_on_its_seat_alone_unless_all_are_asked_for(
    model_dir, tmp_path, monkeypatch, seat
):
    seen, real = [], train_sft.conversations
    monkeypatch.setattr(train_sft, "conversations", lambda *args: seen.append(args[1]) or real(*args))
    train_sft.main(sft_flags(model_dir, tmp_path / "run", seat=seat, max_steps=1, games=2))
    seats = {0, 1, 2} if seat == "all" else {1}
    for records, games in zip(seen, (2, train_sft.HELD_OUT_GAMES), strict=True):
        assert {r.seat for r in records} == seats and len(records) == games * 2 * len(seats)  # 2 stages


def test_label_noise_is_in_what_sft_trains_on_alone(model_dir, tmp_path, monkeypatch, refused):
    """Not in the held-out games, and not in the prompts, which tell what was played."""
    seen, real = {}, train_sft.conversations
    for name, noise in (("clean", [0.0]), ("graph", [1.0]), ("effort", [0.0, 1.0])):
        seen[name] = []
        keep = seen[name].append
        monkeypatch.setattr(train_sft, "conversations", lambda *args, keep=keep: keep(args[1]) or real(*args))
        train_sft.main(sft_flags(model_dir, tmp_path / name, label_noise=noise, max_steps=1, games=6))
    clean, held_out = seen["clean"]
    for name, kind in (("graph", "G"), ("effort", "E")):
        noisy, test = seen[name]
        assert test == held_out and [r.prompt for r in noisy] == [r.prompt for r in clean]
        changed = {r.kind for r, other in zip(clean, noisy, strict=True) if r.label != other.label}
        assert changed == {kind}
    weights = [Run(tmp_path / name).weights() for name in seen]
    assert weights[0] != weights[1] != weights[2] != weights[0]
    told = refused(train_sft.main, sft_flags(model_dir, tmp_path / "bad", label_noise=[0.1, 0.2, 0.3]))
    assert "--label-noise takes one share" in told


# -------------------- an adapter for each kind of decision


@pytest.fixture(scope="module")
def separate(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "separate"
    train_sft.main(sft_flags(model_dir, folder, train_on="separate", sft_lr=5e-3))
    return folder


def test_separate_adapters_are_those_of_two_runs(separate, model_dir, tmp_path):
    weights = {}
    for kind in ("graph", "effort"):
        train_sft.main(sft_flags(model_dir, tmp_path / kind, train_on=kind, sft_lr=5e-3))
        weights[kind] = Run(separate).weights(f"{kind}/adapter")
        assert weights[kind] == Run(tmp_path / kind).weights()
    assert weights["graph"] != weights["effort"] and not (separate / "adapter").exists()


def test_play_uses_the_adapter_of_each_kind_of_decision(separate, model_dir, tmp_path, monkeypatch):
    """Graph decisions are those of the graph adapter alone; effort decisions those of the other."""
    sampled, real = [], players.adapter_on

    def noted(policy, state, config):
        sampled.append(next(iter(state.values())).flatten()[0].item())
        return real(policy, state, config)

    monkeypatch.setattr(players, "adapter_on", noted)
    monkeypatch.setattr(players, "parse_reply", fake_parse)
    argv = flags(dict(model=model_dir, device="cpu", eval_games=3, eval_agents=3, max_new_tokens=8))
    out = {}
    for name in ("", "graph/adapter", "effort/adapter"):
        path, policy = tmp_path / f"{len(out)}.json", str(separate / name)
        evaluation.main([*argv, "--policy", policy, "--stages", "GEE", "--json", str(path)])
        out[name] = json.loads(path.read_text())["results"][policy]["replies"]
        if name == "":  # first both are tried on; then three stages are played
            graph, effort = adapter_values = [
                first_value(separate / k / "adapter") for k in ("graph", "effort")
            ]
            assert sorted(sampled[:2]) == sorted(adapter_values) and graph != effort
            assert sampled[2:] == [graph, effort, effort]
    graph_alone, effort_alone, both = out["graph/adapter"], out["effort/adapter"], out[""]
    assert [r[0] for r in both] == [r[0] for r in graph_alone] != [r[0] for r in effort_alone]
    assert [r[1:] for r in both] != [r[1:] for r in graph_alone]


def first_value(folder):
    state, _ = adapter_files.read_adapter(folder)
    return next(iter(state.values())).flatten()[0].item()


# -------------------- what is refused with one line, before anything is made


@pytest.fixture
def nothing(tmp_path):
    yield tmp_path / "run"
    assert not (tmp_path / "run").exists()


def test_an_unknown_model_is_refused(monkeypatch, nothing, refused):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets
    for name in ("no-one/no-such-model", "no//such:model"):
        assert name in refused(train_sft.main, sft_flags(name, nothing))


def test_a_model_folder_that_is_missing_or_incomplete_is_refused(model_dir, tmp_path, nothing, refused):
    incomplete = tmp_path / "no-weights"
    shutil.copytree(model_dir, incomplete)
    (incomplete / "model.safetensors").unlink()
    for main, arguments in ((train_sft.main, sft_flags), (train_rft.main, rft_flags)):
        for name in (incomplete, tmp_path / "missing"):
            assert str(name) in refused(main, arguments(name, nothing))


def test_sft_adapters_that_do_not_fit_are_refused(model_dir, sft_adapter, tmp_path, nothing, refused):
    def changed(name, edit):
        shutil.copytree(sft_adapter, tmp_path / name)
        edit(tmp_path / name)
        return tmp_path / name

    def cut(folder):
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:500])

    bad = [changed("corrupt", cut), tmp_path / "missing"]
    bad += [changed("no-config", lambda folder: (folder / "adapter_config.json").unlink())]
    for adapter in bad:
        for chain in (adapter, f"{sft_adapter}+{adapter}"):
            argv = rft_flags(model_dir, nothing, sft_adapter=chain)
            assert str(adapter) in refused(train_rft.main, argv)
    other = make_tiny_model(tmp_path / "other", seed=1)  # the same shapes, other weights
    refused(train_rft.main, rft_flags(other, nothing, sft_adapter=sft_adapter))


def test_a_damaged_data_set_is_refused_with_its_line(model_dir, tmp_path, nothing, refused):
    data = tmp_path / "data.jsonl"
    expert_games.main(["--out", str(data), "--games", "1", "--agents", "3"])
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[0], "{", *lines[2:]]))
    message = refused(train_sft.main, sft_flags(model_dir, nothing, data=data))
    assert "line 2" in message and str(data) in message


def test_a_prompt_longer_than_the_context_is_refused(model_dir, sft_adapter, tmp_path, refused):
    folder = tmp_path / "short"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    assert "64" in refused(train_sft.main, sft_flags(folder, tmp_path / "sft"))
    assert "64" in refused(train_rft.main, rft_flags(folder, tmp_path / "rft", sft_adapter=sft_adapter))


def test_lora_targets_that_name_nothing_are_refused(model_dir, tmp_path, refused):
    assert "no_proj" in refused(train_sft.main, sft_flags(model_dir, tmp_path / "run", targets=["no_proj"]))
