"""Settings of the process that make CPUs faster and change no result by more than fp32's own rounding."""

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt(3)


def prepare_cpu() -> None:
    """To be called once per process, before the model is loaded."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    # glibc keeps freed activations with the process then; else the kernel takes them back and hands them out
    # again page by page, at every step.
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
    # On AMD's CPUs MKL leaves AVX-512 alone, and oneDNN has twice its speed in fp32. But torch asks oneDNN
    # only where it may round to bf16 inside; whether it then does (with AMX) shows in a product.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if "AMD" in capabilities.get("cpu_name", "") and capabilities.get("avx512_f"):
        settings, a = torch.backends.mkldnn.matmul, torch.arange(2.0**16).sin().view(256, 256)
        settings.fp32_precision = "bf16"
        if (
            a @ a - (a.double() @ a.double())
        ).abs().max() > 1e-3:  # of sums up to 1.1; bf16 would be off by 0.06
            settings.fp32_precision = "ieee"
