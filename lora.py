"""LoRA: low-rank adapters (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv
2106.09685).

A frozen weight W of shape (out, in) gets a trainable low-rank correction, in the letters of the paper:

    h = W x + scaling * B A x,   A: (r, in),  B: (out, r),  scaling = alpha / r

A is random and B is zero at the start, so step 0 is exactly the base model. Switching the correction off
gives the base model back: RFT's reference policy pi_ref. RFT starts from the SFT policy, so the SFT adapter
is merged into the base first; only then is "adapter off" the SFT policy and not the model before SFT.

    inject(model, config, generator)             new adapter on a frozen base
    with adapter_off(model): ...                 pi_ref
    merge(model)                                 W += scaling * B A, and the layer is unwrapped
    lora_layers, lora_parameters                 its layers by module path; all A and B, for the optimizer

Below fp32 `merge` keeps the wrapper and freezes A and B instead, because the rounded sum would lose most of
the adapter.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class LoRAConfig:
    """targets: names of layers, such as q_proj, or longer endings of their module paths. base_model and
    base_fingerprint: what the adapter was trained on, for those who load it (models/adapters.py)."""

    r: int
    alpha: float
    targets: tuple[str, ...] = DEFAULT_TARGETS
    base_model: str = ""
    base_fingerprint: str | None = None

    def __post_init__(self):
        if type(self.r) is not int or self.r < 1:
            raise ValueError(f"LoRA rank r must be a positive integer, got {self.r!r}")
        if type(self.alpha) not in (int, float) or not math.isfinite(self.alpha):
            raise ValueError(f"LoRA alpha must be a finite number, got {self.alpha!r}")

    @property
    def scaling(self) -> float:
        return self.alpha / self.r


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank correction: (..., in) -> (..., out). Section 4.1 of the LoRA
    paper.

    A and B are fp32 also where W is bf16: an optimizer step is often below bf16's resolution of 1/256 and
    would be rounded away. base is an nn.Linear, or below fp32 a LoRALinear that `merge` has frozen.

    Another kind of layer is a subclass. It names its trained parameters in `parts`, which are saved under
    these names, and overrides `merged_weight`. If its correction is not scaling B A, it sets `stackable` to
    False: SFT and RFT are then saved as two adapters (models/adapters.py)."""

    parts = ("A", "B")
    stackable = True

    def __init__(self, base: nn.Module, r: int, scaling: float, generator: torch.Generator):
        super().__init__()
        self.base, self.scaling, self.disabled, self.frozen = base, scaling, False, False
        self.in_features, self.out_features = int(base.in_features), int(base.out_features)  # type: ignore
        device = next(base.parameters()).device
        # A is drawn on the generator's device and then moved, so that a seed gives the same A on every device
        A = torch.empty(r, self.in_features, device=generator.device, dtype=torch.float32)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)  # +-1/sqrt(in), as PEFT does
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(self.out_features, r, device=device, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.disabled:
            return self.base(x)
        h = self.base(x) + self.scaling * (x.float() @ self.A.T) @ self.B.T
        return h.to(x.dtype)

    def merged_weight(self) -> torch.Tensor:
        """W + scaling * B A. The sum is taken in float64 on the CPU and rounded once, so that it is the
        same on every device."""
        A, B, W = [p.detach().cpu().double() for p in (self.A, self.B, self.base.get_parameter("weight"))]
        return (W + self.scaling * B @ A).float()

    def freeze(self) -> None:
        """From now on this layer counts as a part of the base."""
        self.frozen = True
        self.requires_grad_(False)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers of the model's adapter by module path, in the model's order; {} without an adapter."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear) and not m.frozen}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A (r, in) and B (out, r) of every LoRA layer: what the optimizer gets."""
    return [getattr(layer, part) for layer in lora_layers(model).values() for part in layer.parts]


def require_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """As lora_layers; ValueError where there are none."""
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


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that an adapter can wrap, by module path; a frozen LoRALinear hides the base in it. A
    subclass of nn.Linear that computes something else, such as a router, is none."""
    frozen = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, LoRALinear))
    linear = lambda m: isinstance(m, nn.Linear) and type(m).forward is nn.Linear.forward
    modules = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear) or linear(m)}
    return {name: m for name, m in modules.items() if not name.startswith(frozen)}


def inject(model: nn.Module, config: LoRAConfig, generator: torch.Generator, layer=LoRALinear) -> None:
    """Freezes the model and wraps every linear layer that config.targets names in a `layer` (the fast engine
    passes a class of its own, fast/lora_products.py).

    A target is the last part of a module path ("q_proj") or more of it. ValueError: the model has an adapter
    already, or some target names no Linear (nothing is changed then)."""
    require_no_layers(model)
    linears = _linears(model)
    matches = {t: [n for n in linears if n == t or n.endswith("." + t)] for t in config.targets}
    for target, names in matches.items():
        if not names:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none"
            raise ValueError(f"LoRA target {target!r} names no nn.Linear of this model (it has: {known})")
    chosen = set().union(*matches.values())
    if not chosen:
        raise ValueError("LoRA targets are empty: name at least one module")
    model.requires_grad_(False)
    for name in linears:  # the model's order, so that a seed fixes every A whatever the order of the targets
        if name in chosen:
            _set_module(model, name, layer(linears[name], config.r, config.scaling, generator))


@contextmanager
def adapter_off(model: nn.Module):
    """Inside, the model is its base (pi_ref), exactly. ValueError without an adapter: the caller would take
    the model itself for its reference, and measure KL = 0."""
    layers = list(require_layers(model).values())
    before = [layer.disabled for layer in layers]
    try:
        for layer in layers:
            layer.disabled = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer.disabled = disabled


def remove(model: nn.Module) -> None:
    """Takes the adapter off for good, without merging it: the base model again."""
    for name, layer in lora_layers(model).items():
        _set_module(model, name, layer.base)


def require_untied(model: nn.Module) -> None:
    """ValueError: an adapted weight is tied to another module, as the output head is to the embedding in many
    small models. Merging would change that module too."""
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name.removesuffix(".weight").removesuffix(".base"))
    for name, layer in lora_layers(model).items():
        weight = getattr(layer.base, "weight", None)  # a frozen LoRALinear has none of its own
        other = [owner for owner in owners.get(id(weight), ()) if owner != name]
        if other:
            raise ValueError(f"cannot merge the adapter of {name}: it shares its weight with {other[0]}")


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """In fp32: W := merged_weight() in every wrapped layer, then unwraps it. Below fp32: freezes the adapter,
    because a sum rounded to bf16 would lose nine tenths of an adapter that was trained for 50 steps.
    ValueError: no adapter, or as in require_untied."""
    layers = require_layers(model)
    require_untied(model)
    for name in list(layers):
        layer = layers.pop(name)  # popped, so that A, B and copies of W are freed layer by layer
        if isinstance(layer.base, LoRALinear) or layer.base.weight.dtype != torch.float32:
            layer.freeze()
            continue
        layer.base.get_parameter("weight").copy_(layer.merged_weight())
        _set_module(model, name, layer.base)
    return model
