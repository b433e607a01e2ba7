"""A GPU against the CPU, where there is one: policy.py on the CPU in fp32 defines what both engines say on
CUDA."""

import random
from itertools import product

import pytest
import torch
from reference import ENGINES, PROMPTS, assert_close, difference, engine, gradients, score
from whole_runs import GENTLE, Run, assert_same_up_to_rounding, ended, rft_flags, run_rft, start

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def seed(number):
    return torch.Generator().manual_seed(number)


def replies(groups):
    return [[o.reply_ids for o in group] for group in groups]


@pytest.fixture(scope="module")
def on_cpu(model_dir):
    return engine("plain", model_dir)


@pytest.fixture(params=ENGINES)
def on_gpu(request, model_dir):
    return engine(request.param, model_dir, device="cuda")


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_the_same_uniform_numbers_draw_the_same_replies(on_cpu, on_gpu, temperature):
    expected, drawn = (p.sample(PROMPTS, 7, 16, temperature, seed(5)) for p in (on_cpu, on_gpu))
    assert replies(drawn) == replies(expected)
    for of_gpu, of_cpu in zip(drawn, expected):
        for a, b in zip(of_gpu, of_cpu):
            assert a.sampled_logps == pytest.approx(b.sampled_logps, abs=1e-3)


@pytest.mark.parametrize("temperature, size", list(product([1.0, 0.7], [1, 2, 100])))
def test_scores_reference_and_gradients_are_the_same(on_cpu, on_gpu, temperature, size):
    expected, off = (score(on_cpu, temperature=temperature, reference=r) for r in (False, True))
    weights = torch.randn(sum(map(len, expected)), generator=seed(0))
    expected_gradients = gradients(on_cpu, (weights * torch.cat(expected)).sum())
    found = score(on_gpu, temperature=temperature, micro_batch=size)
    assert found[0].is_cuda and difference(torch.cat(found).cpu(), torch.cat(expected)) < 1e-3
    found_gradients = gradients(on_gpu, (weights.cuda() * torch.cat(found)).sum())
    assert_close([g.cpu() for g in found_gradients], expected_gradients)
    found = score(on_gpu, temperature=temperature, micro_batch=size, reference=True)
    assert difference(torch.cat(found).cpu(), torch.cat(off)) < 1e-3


def test_a_kept_history_says_what_is_read_again(on_gpu):
    rng, prompts, history = random.Random(0), [list(p) for p in PROMPTS], on_gpu.new_history()
    for stage in range(3):
        fresh, kept = (on_gpu.sample(prompts, 1, 6, 1.0, seed(stage), h) for h in (None, history))
        assert replies(fresh) == replies(kept)
        for prompt, group in zip(prompts, kept):
            prompt += group[0].reply_ids + [rng.randrange(10, 200) for _ in range(rng.randrange(1, 5))]


@pytest.mark.parametrize("name", ENGINES)
def test_bf16_is_off_by_its_rounding_alone(on_cpu, model_dir, name):
    """Of both devices by about the same; a mask or a scaling that is lost would be off by far more."""
    exact = torch.cat(score(on_cpu)).detach()
    apart = [
        (torch.cat(score(engine(name, model_dir, "bfloat16", device))).detach().cpu() - exact).abs().mean()
        for device in ("cpu", "cuda")
    ]
    assert 0 < apart[1] < 2 * apart[0] < 0.2


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_ends_in_the_adapter_of_the_cpu(gentle, model_dir, tmp_path, name):
    run_rft(rft_flags(model_dir, tmp_path / name, lr=GENTLE, device="cuda", engine=name))
    assert_same_up_to_rounding(Run(tmp_path / name), gentle)


def test_two_processes_share_a_gpu(gentle, model_dir, tmp_path):
    folder, output = tmp_path / "run", tmp_path / "output"
    codes = ended(start(rft_flags(model_dir, folder, lr=GENTLE, device="cuda"), output, 2), 120)
    assert codes == [0, 0], output.read_text()
    assert_same_up_to_rounding(Run(folder), gentle)
