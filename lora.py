"""LoRA: low-rank adapters (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685).

A frozen weight W of shape (out, in) gets a trainable low-rank correction, in the letters of the paper:

    h = W x + scaling * B A x,   A: (r, in),  B: (out, r),  scaling = alpha / r

A is random and B is zero at the start, so step 0 is exactly the base model. Switching the correction off gives the
base model back at no cost in memory; that is how RFT gets its reference policy pi_ref. Mind the chain: RFT starts
from the SFT policy, so the SFT adapter is merged into the base first and a new adapter is trained on top. Only then
is "adapter off" the SFT policy and not the model before SFT.

    inject(model, config, generator)             new adapter on a frozen base
    with adapter_off(model): ...                 pi_ref
    merge(model)                                 W += scaling * B A, plain model again (below fp32: see MergedLinear)
    adapter_state / load_adapter_state           all A and B under PEFT's names (files: adapter_files.py)
"""

import hashlib
import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # PEFT names a tensor by the path of its module inside PEFT's two wrappers


@dataclass
class LoRAConfig:
    r: int
    alpha: float
    targets: tuple[str, ...] | str = DEFAULT_TARGETS  # names or path endings; a string is a regex for the whole path
    base_model: str = ""  # name or path of the base, written as base_model_name_or_path
    base_fingerprint: str | None = None  # of the base weights it was trained on; adapter_files.save_adapter fills it in

    def __post_init__(self):
        if type(self.r) is not int or self.r < 1:
            raise ValueError(f"LoRA rank r must be a positive integer, got {self.r!r}")
        if type(self.alpha) not in (int, float) or not math.isfinite(self.alpha):
            raise ValueError(f"LoRA alpha must be a finite number, got {self.alpha!r}")
        try:
            re.compile(self.targets if isinstance(self.targets, str) else "")
        except re.error as error:
            raise ValueError(f"LoRA targets {self.targets!r} are not a valid regex: {error}") from None

    @property
    def scaling(self) -> float:
        return self.alpha / self.r


class LoRALinear(nn.Module):
    """A frozen nn.Linear (or MergedLinear) with a low-rank correction: (..., in) -> (..., out). Section 4.1 of the paper."""

    def __init__(self, base: "nn.Linear | MergedLinear", r: int, scaling: float, generator: torch.Generator):
        super().__init__()
        self.base, self.scaling, self.disabled = base, scaling, False
        self._working, self._working_of = None, None  # see `working`, and the versions of what it was made of
        self._joint_A = None  # and A for `_joint`, where W is not in fp32
        # Drawn on the generator's device and then moved, so that a seed gives the same A on every device. fp32 also
        # on a bf16 base: an optimizer step is often below bf16's resolution of 1/256 and would be rounded away.
        A = torch.empty(r, base.in_features, device=generator.device, dtype=torch.float32)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        self.A = nn.Parameter(A.to(base.weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.disabled:
            return self.base(x)
        S, joint_A, bias = self.working(), self._joint_A, self.base.bias
        if not torch.is_grad_enabled():
            return linear(x if joint_A is None else _joint(x, joint_A), S, bias)
        if joint_A is None:
            return _SumLinear.apply(x, self.A, self.B, self.scaling, S, bias)
        return _JointLinear.apply(x, self.A, self.B, self.scaling, S, joint_A, bias)

    def working(self) -> torch.Tensor:
        """A working copy (about as much memory as W), made anew after any of W, B and A was changed in place. What writes
        to `.data`, or a fused optimizer, it cannot see.

        In fp32 it is the sum W + scaling B A (out, in). In bf16 that would lose every change of W that is smaller than
        W's resolution, and the first steps are; so there it is [W, B] (out, in + r), for [x, scaling A x]. (W of a MergedLinear is such a pair already.)
        """
        W, B, A = self.base.weight, self.B, self.A
        versions = [p._version for p in (W, B, A)]
        if self._working_of != versions:
            with torch.inference_mode(False), torch.no_grad():  # sampling may make it, the update uses it
                exact = W.dtype == torch.float32
                self._working = torch.addmm(W, B, A, alpha=self.scaling) if exact else torch.cat([W, B.to(W.dtype)], 1)
                self._joint_A = None if exact else self.joint_A()
            self._working_of = versions
        return self._working

    def joint_A(self) -> torch.Tensor:
        """scaling A in the dtype of W, below the A of what was merged before."""
        A = (self.scaling * self.A).to(self.base.weight.dtype)
        return torch.cat([self.base.A, A]) if isinstance(self.base, MergedLinear) else A


class MergedLinear(nn.Module):
    """What `merge` leaves of a layer below fp32: h = [W, B] [x, z] + bias with z = A x, frozen; A holds the scaling.

    W + scaling B A, rounded to bf16, would lose what is smaller than half a step of W: after 50 steps of SFT with the
    paper's values nine tenths of the adapter, and pi_ref would not be the SFT policy.
    """

    def __init__(self, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, bias: nn.Parameter | None):
        super().__init__()
        self.weight = nn.Parameter(torch.cat([W, B.to(W.dtype)], 1), requires_grad=False)
        self.A, self.bias = nn.Parameter(A, requires_grad=False), bias
        self.out_features, self.in_features = len(W), A.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(_joint(x, self.A), self.weight, self.bias)


def _joint(x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """[x, z] with z = A x."""
    return torch.cat([x, linear(x, A, None)], -1)


class _SumLinear(torch.autograd.Function):
    """h = S x + bias with S = W + scaling B A at hand: one product instead of three, and no (out)-wide sum. Backward,
    with g = dJ/dh:  dJ/dx = S^T g,  dJ/dA = scaling (B^T g) x^T,  dJ/dB = scaling g (A x)^T;  W is frozen."""

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
    """h = [W, B] [x, z] + bias with z = scaling A x, for weights below fp32: one product adds both before it rounds.
    Backward: [W, B]^T g = [dJ/dx without z, dJ/dz], and the rest as above. What was merged before stands between: [W, B']
    for W, and its A' above scaling A in joint_A."""

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
    """F.linear. On a CPU, where x has few rows, in fp32, W x^T takes half the time of x W^T in MKL, and four fifths in
    oneDNN (in bf16 less for 32 rows, but more for 24 or 40)."""
    few = x.numel() < 56 * x.shape[-1] and x.dtype == torch.float32
    if x.device.type != "cpu" or bias is not None or not few:
        return F.linear(x, W, bias)
    y = (W @ x.reshape(-1, x.shape[-1]).T).T
    if W.shape[0] <= W.shape[1]:  # what is wider than x is narrowed by another product soon, which wants it as it is
        y = y.contiguous()
    return y.view(*x.shape[:-1], -1)


# ---------------------------------------------------------------------------------------------------------------------
# Adapter in the model


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRA layers by module path, in the model's order; empty if there is no adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A (r, in) and B (out, r) of every LoRA layer: what the optimizer gets."""
    return [p for layer in lora_layers(model).values() for p in (layer.A, layer.B)]


def require_layers(model: nn.Module) -> dict[str, LoRALinear]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("this model has no adapter: call inject or load_adapter first")
    return layers


def require_no_layers(model: nn.Module) -> None:
    if lora_layers(model):
        raise ValueError("this model already has an adapter: call merge first, or load the base model again")


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def inject(model: nn.Module, config: LoRAConfig, generator: torch.Generator) -> list[LoRALinear]:
    """Freezes the model and wraps every nn.Linear that config.targets names (by PEFT's rules) in a LoRALinear.

    A target is the last part of a module path ("q_proj") or more of it ("layers.0.self_attn.q_proj"); a string
    instead of a tuple is a regex for the whole path, and "all-linear" is every Linear but the output head.
    ValueError: the model has an adapter already, or some target names no Linear (nothing is changed then).
    """
    require_no_layers(model)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, MergedLinear))}
    if config.targets == "all-linear":
        groups = {"all-linear": [n for n, m in linears.items() if m is not model.get_output_embeddings()]}
    elif isinstance(config.targets, str):
        groups = {config.targets: [n for n in linears if re.fullmatch(config.targets, n)]}
    else:
        groups = {t: [n for n in linears if n == t or n.endswith("." + t)] for t in config.targets}
    for target, names in groups.items():
        if not names:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none"
            raise ValueError(f"LoRA target {target!r} names no nn.Linear of this model (it has: {known})")
    chosen = set().union(*groups.values())
    if not chosen:
        raise ValueError("LoRA targets are empty: name at least one module")
    model.requires_grad_(False)
    for name in linears:  # the model's order, so that a seed fixes every A whatever the order of the targets
        if name in chosen:
            _set_module(model, name, LoRALinear(linears[name], config.r, config.scaling, generator))
    return list(lora_layers(model).values())


@contextmanager
def adapter_off(model: nn.Module):
    """Inside, the model is its base (pi_ref), exactly. The state before is restored on exit, also after an exception.

    ValueError without an adapter: the caller would take the model itself for its reference, and measure KL = 0.
    """
    layers = list(require_layers(model).values())
    before = [layer.disabled for layer in layers]
    try:
        for layer in layers:
            layer.disabled = True
        yield model
    finally:
        for layer, disabled in zip(layers, before):
            layer.disabled = disabled


def remove(model: nn.Module) -> None:
    """Takes the adapter off for good, without merging it: the plain base model again."""
    for name, layer in lora_layers(model).items():
        _set_module(model, name, layer.base)


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """W += scaling * B A in every wrapped layer, then unwraps: a plain (still frozen) model. Section 4.1 of the paper.

    The sum is taken in float64 on the CPU and rounded once to fp32. GPU matmuls may be TF32; this way the merged weights,
    and so their fingerprint, come out the same on every device. Below fp32 the parts stay apart, as a MergedLinear.
    ValueError: no adapter, or an adapted weight is tied to another module (merging would change that one too).
    """
    layers, owners = require_layers(model), {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name.removesuffix(".weight").removesuffix(".base"))
    for name, layer in layers.items():
        other = [owner for owner in owners[id(layer.base.weight)] if owner != name]
        if other:
            raise ValueError(f"cannot merge the adapter of {name}: it shares its weight with {other[0]}")
    for name in list(layers):
        layer = layers.pop(name)  # so that its working copy is freed
        W, merged = layer.base.weight, layer.base
        if W.dtype == torch.float32:
            W.copy_((W.cpu().double() + layer.scaling * layer.B.cpu().double() @ layer.A.cpu().double()).float())
        else:
            merged = MergedLinear(W, layer.joint_A(), layer.B, layer.base.bias)
        _set_module(model, name, merged)
    return model


def fingerprint(model: nn.Module) -> str:
    """sha256 over the names, shapes and four values of every base parameter; an adapter on the model is left out.

    It tells apart bases that shapes cannot tell apart, such as a model before and after its SFT adapter was merged.
    Values are rounded to bf16, so a checkpoint loaded in fp32 or in bf16 is the same base.
    """
    own = {id(p) for p in lora_parameters(model)}
    base = [(n.replace(".base.", "."), p.detach()) for n, p in model.named_parameters() if id(p) not in own]
    text = json.dumps([(name, list(p.shape)) for name, p in base])
    values = torch.cat([p.flatten()[p.numel() // 8 :: max(1, p.numel() // 4)][:4].bfloat16().cpu() for _, p in base])
    return hashlib.sha256(text.encode() + values.view(torch.int16).numpy().tobytes()).hexdigest()


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all A (r, in) and B (out, r), fp32 on the CPU, under PEFT's names. ValueError without an adapter."""
    return {
        f"{PREFIX}{name}.lora_{letter}.weight": getattr(layer, letter).detach().to("cpu", copy=True)
        for name, layer in require_layers(model).items()
        for letter in "AB"
    }


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copies a state with PEFT's names into the model's adapter. All is checked before anything is changed.

    ValueError, one line: the first missing or unexpected key, or the first shape that differs.
    """
    own = {
        f"{PREFIX}{name}.lora_{letter}.weight": getattr(layer, letter)
        for name, layer in require_layers(model).items()
        for letter in "AB"
    }
    for key in own:
        if key not in state:
            raise ValueError(f"adapter weights lack {key}")
    for key in state:
        if key not in own:
            raise ValueError(f"adapter weights have an unexpected {key}")
    for key, p in own.items():
        if state[key].shape != p.shape:
            raise ValueError(f"{key} has shape {tuple(state[key].shape)}, this model needs {tuple(p.shape)}")
    for key, p in own.items():
        p.copy_(state[key])
