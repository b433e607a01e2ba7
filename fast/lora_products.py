"""The same h = W x + scaling B A x as lora.LoRALinear, in one product (fp32) or two (bf16) instead of three.

A `JointLoRALinear` stores a working copy, which it makes anew after W, B or A was changed in place. (It does
not see what is written to `.data`, or by a fused optimizer.) In fp32 the working copy is the sum
W + scaling B A. In bf16 the sum would lose every change of W that is smaller than W's resolution, as those of
the first steps are. So there the working copy is [W, B], which is multiplied with [x, scaling A x]: one
product adds both parts before it rounds.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from lora import LoRALinear


class JointLoRALinear(LoRALinear):
    """(..., in) -> (..., out). The working copy takes about as much memory as W."""

    def __init__(self, base: nn.Module, r: int, scaling: float, generator: torch.Generator):
        super().__init__(base, r, scaling, generator)
        self._working, self._joint_A, self._versions = None, None, None

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
        """The working copy and, below fp32, the joint A: x is multiplied with it to get the rest of the
        working copy's input. In fp32 the latter is None."""
        if self.frozen and self._working is not None:
            return self._working, self._joint_A
        # W is the base's weight, or the [W, B'] of a frozen adapter, whose A' is then `below`.
        W, below = self.base.working() if isinstance(self.base, LoRALinear) else (self.base.weight, None)
        versions = [p._version for p in (W, self.B, self.A)]
        if self._versions != versions:
            with torch.inference_mode(False), torch.no_grad():  # training uses what sampling has made
                if W.dtype == torch.float32:
                    self._working = torch.addmm(W, self.B, self.A, alpha=self.scaling)
                else:
                    self._working = torch.cat([W, self.B.to(W.dtype)], 1)
                    A = (self.scaling * self.A).to(W.dtype)
                    self._joint_A = A if below is None else torch.cat([below, A])
            self._versions = versions
        return self._working, self._joint_A

    def freeze(self) -> None:
        """W, and the B of this layer and of every frozen one in it, become views of the working copy, so that
        W stands in memory once."""
        super().freeze()
        self._share(self.working()[0])

    def _share(self, S: torch.Tensor) -> None:
        self._working, n = S, S.shape[1] - self.B.shape[1]
        self.B = nn.Parameter(S[:, n:], requires_grad=False)
        if isinstance(self.base, LoRALinear):
            self.base._share(S[:, :n])
        else:
            self.base.weight = nn.Parameter(S[:, :n], requires_grad=False)


def _joint(x: torch.Tensor, joint_A: torch.Tensor) -> torch.Tensor:
    """[x, z] with z = joint_A x, which contains the scaling."""
    return torch.cat([x, linear(x, joint_A, None)], -1)


class _SumLinear(torch.autograd.Function):
    """h = S x + bias, with S = W + scaling B A given. With g = dJ/dh the gradients are
    dJ/dx = S^T g,  dJ/dA = scaling (B^T g) x^T,  dJ/dB = scaling g (A x)^T;  W is frozen.
    In the code the formulas stand transposed, because a token is a row there."""

    @staticmethod
    def forward(ctx, x, A, B, scaling, S, bias):
        ctx.save_for_backward(x, A, B, S)
        ctx.scaling = scaling
        return linear(x, S, bias)

    @staticmethod
    def backward(ctx, grad):
        x, A, B, S = ctx.saved_tensors
        g, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = (g @ S).view(x.shape) if ctx.needs_input_grad[0] else None
        dA = (g @ B).mul_(ctx.scaling).T @ rows
        dB = g.T @ (rows @ A.T).mul_(ctx.scaling)
        return dx, dA, dB, None, None, None


class _JointLinear(torch.autograd.Function):
    """h = [W, B] [x, z] + bias with z = scaling A x, for weights below fp32. [W, B]^T g is the gradient with
    respect to x without the part that goes through z, then that with respect to z; the other gradients are as
    above. On top of frozen adapters, W is [W, B'], and their A' stands above scaling A in joint_A."""

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
    """The same as F.linear. Where x has few rows, a CPU computes W x^T in half the time of x W^T in fp32 with
    MKL, and in four fifths with oneDNN. (In bf16 it is faster for 32 rows, but slower for 24 or 40.)"""
    few = x.numel() < 56 * x.shape[-1] and x.dtype == torch.float32
    if x.device.type != "cpu" or bias is not None or not few:
        return F.linear(x, W, bias)
    y = (W @ x.reshape(-1, x.shape[-1]).T).T
    if W.shape[0] <= W.shape[1]:  # a wide y is the input of a product that wants it as it is
        y = y.contiguous()
    return y.view(*x.shape[:-1], -1)
