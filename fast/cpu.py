"""Settings of the process that make CPUs faster and change no result by more than the rounding of fp32."""

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # see mallopt(3)


def prepare_cpu() -> None:
    """Sets them. Call it once per process, before the model is loaded. It does nothing but on Linux."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    # With these settings glibc keeps freed activations in the process. By default the kernel takes them back
    # and hands them out again page by page in every step.
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
    # MKL does not use AVX-512 on AMD's CPUs, and oneDNN is twice as fast there in fp32. But torch takes
    # oneDNN only where it may round to bf16 inside. So a product whose values are at most 1.1 is tried:
    # rounding would change it by up to 0.06.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if "AMD" in capabilities.get("cpu_name", "") and capabilities.get("avx512_f"):
        settings, a = torch.backends.mkldnn.matmul, torch.arange(2.0**16).sin().view(256, 256)
        settings.fp32_precision = "bf16"
        if (a @ a - (a.double() @ a.double())).abs().max() > 1e-3:
            settings.fp32_precision = "ieee"
