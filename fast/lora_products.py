"""LoRA's products joined: the same h = W x + scaling B A x as lora.LoRALinear, in one product with W instead
of three.

A `JointLoRALinear` keeps a working copy, made anew after any of W, B and A was changed in place (what writes
to `.data`, or a fused optimizer, it cannot see). In fp32 it is the sum W + scaling B A. In bf16 that would
lose every change of W that is smaller than W's resolution, and the first steps are; so there it is [W, B],
for [x, scaling A x], and one product adds both before it rounds.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from lora import LoRALinear


class JointLoRALinear(LoRALinear):
    """(..., in) -> (..., out). The working copy takes about as much memory as W."""

    def __init__(self, base: nn.Module, r: int, scaling: float, generator: torch.Generator):
        super().__init__(base, r, scaling, generator)
        self._working, self._joint_A, self._working_of = None, None, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.disabled:
            return self.base(x)
        (S, joint_A), bias = self.working(), self.bias
        if not torch.is_grad_enabled() or self.frozen:
            return linear(x if joint_A is None else _joint(x, joint_A), S, bias)
        if joint_A is None:
            return _SumLinear.apply(x, self.A, self.B, self.scaling, S, bias)
        return _JointLinear.apply(x, self.A, self.B, self.scaling, S, joint_A, bias)

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base.bias

    def working(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(the working copy, the A that widens x for it or None)."""
        if self.frozen and self._working is not None:
            return self._working, self._joint_A
        # W, or the [W, B'] and A' of a base that is a frozen adapter
        W, below = self.base.working() if isinstance(self.base, LoRALinear) else (self.base.weight, None)
        versions = [p._version for p in (W, self.B, self.A)]
        if self._working_of != versions:
            with torch.inference_mode(False), torch.no_grad():  # sampling may make it, the update uses it
                if W.dtype == torch.float32:
                    self._working = torch.addmm(W, self.B, self.A, alpha=self.scaling)
                else:
                    self._working = torch.cat([W, self.B.to(W.dtype)], 1)
                    A = (self.scaling * self.A).to(W.dtype)
                    self._joint_A = A if below is None else torch.cat([below, A])
            self._working_of = versions
        return self._working, self._joint_A

    def freeze(self) -> None:
        """W, and every B that is frozen above it, become views of the working copy, which holds W once."""
        super().freeze()
        self._hold(self.working()[0])

    def _hold(self, S: torch.Tensor) -> None:
        self._working, n = S, S.shape[1] - self.B.shape[1]
        self.B = nn.Parameter(S[:, n:], requires_grad=False)
        if isinstance(self.base, LoRALinear):
            self.base._hold(S[:, :n])
        else:
            self.base.weight = nn.Parameter(S[:, :n], requires_grad=False)


def _joint(x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """[x, z] with z = A x."""
    return torch.cat([x, linear(x, A, None)], -1)


class _SumLinear(torch.autograd.Function):
    """h = S x + bias with S = W + scaling B A at hand: one product instead of three, and no (out)-wide sum.
    Backward, with g = dJ/dh:  dJ/dx = S^T g,  dJ/dA = scaling (B^T g) x^T,  dJ/dB = scaling g (A x)^T;  W is
    frozen."""

    @staticmethod
    def forward(ctx, x, A, B, scaling, S, bias):
        ctx.save_for_backward(x, A, B, S)
        ctx.scaling = scaling
        return linear(x, S, bias)

    @staticmethod
    def backward(ctx, grad):
        x, A, B, S = ctx.saved_tensors
        # A row is a token, so the formulas stand transposed.
        g, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = (g @ S).view(x.shape) if ctx.needs_input_grad[0] else None
        dA = (g @ B).mul_(ctx.scaling).T @ rows
        dB = g.T @ (rows @ A.T).mul_(ctx.scaling)
        return dx, dA, dB, None, None, None


class _JointLinear(torch.autograd.Function):
    """h = [W, B] [x, z] + bias with z = scaling A x, for weights below fp32: one product adds both before it
    rounds. Backward: [W, B]^T g = [dJ/dx without z, dJ/dz], and the rest as above. What was frozen before
    stands between: [W, B'] for W, and its A' above scaling A in joint_A."""

    @staticmethod
    def forward(ctx, x, A, B, scaling, S, joint_A, bias):
        joint = _joint(x, joint_A)
        ctx.save_for_backward(joint, S, joint_A)
        ctx.r, ctx.scaling, ctx.dtype = len(A), scaling, A.dtype
        return linear(joint, S, bias)

    @staticmethod
    def backward(ctx, grad):
        joint, S, joint_A = ctx.saved_tensors
        n, r = joint_A.shape[1], ctx.r
        g, rows = grad.reshape(-1, grad.shape[-1]), joint.reshape(-1, joint.shape[-1])
        dx, dz = (g @ S).split([n, len(joint_A)], 1)
        dA, dB = (dz[:, -r:] * ctx.scaling).T @ rows[:, :n], g.T @ rows[:, -r:]
        dx = (dx + dz @ joint_A).view(*grad.shape[:-1], n) if ctx.needs_input_grad[0] else None
        return dx, dA.to(ctx.dtype), dB.to(ctx.dtype), None, None, None, None


def linear(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear. On a CPU, where x has few rows, in fp32, W x^T takes half the time of x W^T in MKL, and four
    fifths in oneDNN (in bf16 less for 32 rows, but more for 24 or 40)."""
    few = x.numel() < 56 * x.shape[-1] and x.dtype == torch.float32
    if x.device.type != "cpu" or bias is not None or not few:
        return F.linear(x, W, bias)
    y = (W @ x.reshape(-1, x.shape[-1]).T).T
    # What is wider than x is narrowed by another product soon, which wants it as it is
    if W.shape[0] <= W.shape[1]:
        y = y.contiguous()
    return y.view(*x.shape[:-1], -1)
