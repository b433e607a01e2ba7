"""Settings that make CPUs faster must not cost precision."""

import sys

import pytest
import torch

from fast.cpu import prepare_cpu


def test_a_cpu_is_prepared_without_loss_of_precision():
    prepare_cpu()
    a = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ a.double().T
    assert (a @ a.T - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.skipif(sys.platform != "linux", reason="settings of Linux alone")
def test_products_that_would_be_rounded_to_bf16_are_not_used(monkeypatch):
    """A CPU that is said to be AMD's and rounds inside, as one with AMX would."""
    settings = torch.backends.mkldnn.matmul
    before, exact = settings.fp32_precision, torch.Tensor.__matmul__
    amd, rounding = {"cpu_name": "AMD EPYC", "avx512_f": True}, [False]

    def product(a, b):
        rounds = rounding[0] and settings.fp32_precision == "bf16" and a.dtype == torch.float32
        a, b = (x.bfloat16() if rounds else x for x in (a, b))
        return exact(a.double(), b.double()).float()

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: amd, raising=False)
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    try:
        for rounding[0], left in ((False, "bf16"), (True, "ieee")):
            prepare_cpu()
            assert settings.fp32_precision == left
    finally:
        settings.fp32_precision = before
