"""A GPU, where there is one, against policy.py on the CPU in fp32, which defines what engines compute."""

import pytest
import torch
import whole_runs as runs
from reference import ENGINES, PROMPTS, assert_close, difference, engine, gradients, ids_of, score, uniforms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def on_cpu(model_dir):
    return engine("plain", model_dir)


@pytest.fixture(params=ENGINES)
def on_gpu(request, model_dir):
    return engine(request.param, model_dir, device="cuda")


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_the_same_uniform_numbers_draw_the_same_replies(on_cpu, on_gpu, temperature):
    uniforms_PMS = uniforms(5, len(PROMPTS), 7, 16)
    expected, groups = (p.sample(PROMPTS, uniforms_PMS, temperature) for p in (on_cpu, on_gpu))
    assert ids_of(groups) == ids_of(expected)
    for group, other in zip(groups, expected, strict=True):
        for a, b in zip(group, other, strict=True):
            assert a.logps == pytest.approx(b.logps, abs=1e-3)


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_reference_and_gradients_are_the_same(on_cpu, on_gpu, temperature, size):
    expected, reference = (score(on_cpu, temperature=temperature, reference=r) for r in (False, True))
    weights = torch.randn(sum(map(len, expected)), generator=torch.Generator().manual_seed(0))
    expected_gradients = gradients(on_cpu, (weights * torch.cat(expected)).sum())
    logps = score(on_gpu, temperature=temperature, micro_batch=size)
    assert logps[0].is_cuda and difference(torch.cat(logps).cpu(), expected) < 1e-3
    on_gpu_gradients = gradients(on_gpu, (weights.cuda() * torch.cat(logps)).sum())
    assert_close([g.cpu() for g in on_gpu_gradients], expected_gradients)
    logps = score(on_gpu, temperature=temperature, micro_batch=size, reference=True)
    assert difference(torch.cat(logps).cpu(), reference) < 1e-3


@pytest.mark.parametrize("name", ENGINES)
def test_bf16_is_off_by_its_rounding_alone(on_cpu, model_dir, name):
    """On both devices by about the same; a mask or a scaling that is lost would be off by far more."""
    exact = torch.cat(score(on_cpu)).detach()
    policies = [engine(name, model_dir, "bfloat16", device) for device in ("cpu", "cuda")]
    apart = [(torch.cat(score(policy)).detach().cpu() - exact).abs().mean() for policy in policies]
    assert 0 < apart[1] < 2 * apart[0] < 0.2


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_ends_in_the_adapter_of_the_cpu(gentle, model_dir, tmp_path, monkeypatch, name):
    runs.on_device("cuda", monkeypatch.setattr)
    runs.run_rft(runs.rft_flags(model_dir, tmp_path / name, lr=runs.GENTLE, engine=name))
    runs.assert_same_up_to_rounding(runs.Run(tmp_path / name), gentle)


def test_two_processes_share_a_gpu(gentle, model_dir, tmp_path):
    folder, output = tmp_path / "run", tmp_path / "output"
    processes = runs.start(runs.rft_flags(model_dir, folder, lr=runs.GENTLE), output, 2, device="cuda")
    assert runs.ended(processes, 120) == [0, 0], output.read_text()
    runs.assert_same_up_to_rounding(runs.Run(folder), gentle)
