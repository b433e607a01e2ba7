"""Models of many architectures: what is sampled and what is scored is transformers' own model(ids).logits, in
the engine that a run would have, or the run is refused in one line."""

import pytest
import torch
import zoo
from reference import assert_close, difference, engine, gradients, ids_of, score, uniforms

from fast import engine as engine_module
from fast.engine import FastPolicy, after_head
from models import load
from models.load import load_policy
from policy import Policy
from run.errors import InputError
from run.seeds import Stream
from settings import LoRA
from train_sft import new_adapter

LAYERS = {"granite": "q_proj", "gemma2, final cap alone": "q_proj", "cohere": "v_proj"}


@pytest.mark.parametrize("name", ["granite", "gemma2, final cap alone", "cohere", "gpt2", "granitemoe"])
def test_what_a_model_does_to_its_logits_is_done_in_both_engines(tmp_path, name):
    """Division, multiplication, a soft cap: also in the gradients of the closed form."""
    folder = zoo.build(name, tmp_path)
    fast, plain = (load_policy(str(folder), engine=e) for e in ("fast", "plain"))
    assert (type(fast), type(plain)) == (FastPolicy, Policy)
    assert (after_head(plain.model) != (1, torch.inf)) == (name != "gpt2")
    for policy in (fast, plain):
        assert max(zoo.errors(policy, plain.model).values()) < 1e-4
    if name in LAYERS:
        fast, plain = (engine(e, folder, targets=(LAYERS[name],)) for e in ("fast", "plain"))
        weights = torch.randn(sum(map(len, score(plain))), generator=torch.Generator().manual_seed(0))
        for temperature in (1.0, 0.7):
            losses = [(weights * torch.cat(score(p, temperature=temperature))).sum() for p in (fast, plain)]
            assert_close(*(gradients(p, loss) for p, loss in zip((fast, plain), losses, strict=True)))


WITHOUT_FAST = [
    "stablelm",
    "qwen3_next",
    "gpt_neo",
    "bloom",
    "nemotron",
    "recurrent_gemma",
    "mamba",
    "llama4",
    "glm_moe_dsa",
    "minimax_m3",
]


@pytest.mark.parametrize("name", [*WITHOUT_FAST, "deepseek_v2", "gemma2"])
def test_where_the_fast_engine_is_wrong_the_plain_one_goes_on(tmp_path, name, capfd):
    """Layers without transformers' attention interface, soft caps, keys and values of other sizes."""
    folder = zoo.build(name, tmp_path)
    capfd.readouterr()
    policy = load_policy(str(folder))
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "transformers]" not in line]
    assert line.startswith(f"{folder} does not fit --engine fast (") and line.endswith("going on with plain")
    assert type(policy) is Policy and policy.layer is Policy.layer
    assert max(zoo.errors(policy, policy.model).values()) < 1e-4


def test_a_model_whose_cache_is_wrong_reads_all_anew(tmp_path, capfd):
    folder = zoo.build("minimax", tmp_path)
    capfd.readouterr()
    policy = load_policy(str(folder), engine="plain")
    said = capfd.readouterr().err
    assert "does not fit its own cache (" in said and said.endswith("going on without one, which is slow\n")
    assert not policy.cached and max(zoo.errors(policy, policy.model).values()) < 1e-4
    policy.cached = True
    assert zoo.errors(policy, policy.model)["sampled"] > 0.1


@pytest.mark.parametrize("name, engine", [("falcon", Policy), ("llama", FastPolicy)])
def test_a_wrong_mask_is_seen_in_bfloat16_too(tmp_path, capfd, name, engine):
    """There falcon's error is 0.14 nats, within what rounding may leave. The weights stay where they are."""
    folder, before = zoo.build(name, tmp_path), []
    load_of, error_of = load.pretrained.load, load.error_of
    with pytest.MonkeyPatch.context() as patch:

        def noted(*args):
            loaded = load_of(*args)
            before.extend((p, p.data_ptr(), p.clone()) for p in loaded[0].parameters())
            return loaded

        patch.setattr(load.pretrained, "load", noted)
        policy = load_policy(str(folder), "bfloat16")
    assert type(policy) is engine
    assert ("going on with plain" in capfd.readouterr().err) == (engine is Policy)
    assert len(before) > 10
    for p, address, copy in before:
        assert p.dtype == torch.bfloat16 and p.data_ptr() == address and torch.equal(p, copy)
    if engine is Policy:
        fast = FastPolicy(policy.model, policy.tokenizer, name, policy.end_ids, policy.template, policy.reach)
        error = error_of(fast, "sdpa")
        assert load.TOLERANCE[torch.float32] < error < load.TOLERANCE[torch.bfloat16]
        assert load.deviation(fast, "sdpa") > load.TOLERANCE[torch.float32]


def test_without_memory_for_float32_copies_a_line_says_so(model_dir, monkeypatch, capfd):
    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch.Tensor, "float", full)
    policy = load.Policy.__new__(load.Policy)
    model, policy.name = torch.nn.Linear(2, 2, dtype=torch.bfloat16), "m"
    model.dtype, policy.model = torch.bfloat16, model
    monkeypatch.setattr(load, "error_of", lambda policy, attention: 0.2)
    assert load.deviation(policy, "sdpa") is None
    assert capfd.readouterr().err.startswith("m: no memory to check it in float32; compare its first step")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_that_line_is_seen_when_a_model_is_loaded(model_dir, monkeypatch, capfd):
    def full(model):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(load, "float32_copies", full)
    assert type(load_policy(model_dir, "bfloat16")) is FastPolicy
    assert f"{model_dir}: no memory to check it in float32" in capfd.readouterr().err


def test_a_window_in_any_config_is_known_and_the_plain_engine_reads_further(tmp_path):
    """Also where the config has no layer_types; transformers' own logits are met beyond it."""
    folder = zoo.build("mistral, window", tmp_path)
    fast, plain = (load_policy(str(folder), engine=e) for e in ("fast", "plain"))
    assert fast.reach.context == 64 < plain.reach.context
    assert max(zoo.errors(plain, plain.model).values()) < 1e-4
    inside = fast.sample([[65] * 40], uniforms(0, 1, 2, 20))
    assert (
        difference(score(fast, [[65] * 40], ids_of(inside)), score(plain, [[65] * 40], ids_of(inside))) < 1e-4
    )
    with pytest.raises(InputError, match="the 64 tokens of .* attention window, and --engine plain reads on"):
        zoo.errors(fast, plain.model)


def test_layers_that_an_adapter_does_not_fit_are_named_before_anything_is_trained(tmp_path):
    """Mamba reads the weight of dt_proj itself; a router of Phi 3.5 MoE is no plain linear layer."""
    for name, layers, said in (
        ("mamba", ("in_proj", "dt_proj"), "does not fit the layers of --targets: .*'weight'; leave some out"),
        ("phimoe", ("q_proj", "router"), "'router' names no nn.Linear"),
    ):
        policy = load_policy(str(zoo.build(name, tmp_path)))
        with pytest.raises(InputError, match=said):
            new_adapter(policy, LoRA(rank=2, targets=layers), 0, Stream.SFT_ADAPTER)
        assert zoo.fits(load_policy(str(tmp_path / name), engine="plain"), layers[0])


def test_frequencies_that_change_with_the_length_are_found_in_each_kind_of_layer(tmp_path, monkeypatch):
    """`longrope` (tests/fast/test_engine.py), where the config has it by kind of layer."""
    rope = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=110, factor=18.6)
    rope |= dict(short_factor=[1.0] * 8, long_factor=[8.0] * 8)
    by_kind = dict(full_attention=rope, sliding_attention=dict(rope_type="default", rope_theta=1e4))
    full = dict(head_dim=16, layer_types=["full_attention"] * 2, rope_parameters=by_kind)
    monkeypatch.setitem(zoo.ZOO, "nested", ("gemma3_text", zoo.BASE | full, ""))
    policy = load_policy(str(zoo.build("nested", tmp_path)))
    assert policy.reach.context == 110
    with pytest.raises(InputError, match="its frequencies change there"):
        zoo.errors(policy, policy.model)


def test_a_window_is_tried_beyond_its_end(tmp_path, monkeypatch):
    """An engine that forgets the window would be seen when the model is loaded."""
    folder, lengths, sample = zoo.build("mistral, window", tmp_path), [], Policy.sample
    monkeypatch.setattr(
        Policy, "sample", lambda self, ids, *rest: lengths.extend(map(len, ids)) or sample(self, ids, *rest)
    )
    load_policy(str(folder), engine="plain")
    assert min(lengths) > 64


@pytest.mark.parametrize("broken", ["position", "mask"])
def test_an_engine_that_is_wrong_in_one_pass_alone_is_seen(model_dir, monkeypatch, capfd, broken):
    class Wrong(engine_module.Pass):
        """At the drafted tokens behind the prompts, which the first pass of a sampling reads; or in the
        second pass, which goes on where a reply is not what was drafted."""

        def __init__(self, rows, device, dtype, store=None):
            first = store is not None and not store.read
            super().__init__(rows, device, dtype, store)
            if first and broken == "position":
                self.positions += 2 * (self.positions > 4)
            elif store and not first and broken == "mask":
                self.seen_RBK[:, :, 1:4] = False

    monkeypatch.setattr(engine_module, "Pass", Wrong)
    assert type(load_policy(model_dir)) is Policy
    assert "does not fit --engine fast (its log-probabilities would be" in capfd.readouterr().err


def test_a_full_memory_does_not_look_like_a_model_that_does_not_fit(model_dir, monkeypatch, capfd):
    """The plain engine needs more memory than the fast one."""

    def full(policy, attention):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(load, "error_of", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_policy(model_dir)
    assert "plain" not in capfd.readouterr().err


def test_a_model_that_no_engine_computes_is_refused_in_one_line(model_dir, monkeypatch, capfd):
    monkeypatch.setattr(load, "error_of", lambda policy, attention: float("nan"))
    with pytest.raises(InputError, match="cannot be sampled and scored: its log-prob.* nan nats off; choose"):
        load_policy(model_dir)
    fast, cache = capfd.readouterr().err.splitlines()
    assert "does not fit --engine fast" in fast and "does not fit its own cache" in cache


def test_the_check_touches_no_random_state(model_dir):
    before = torch.get_rng_state()
    load_policy(model_dir)
    assert torch.equal(torch.get_rng_state(), before)
