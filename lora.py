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
    save_adapter / load_adapter                  the folder format of PEFT, both ways
    stack_adapters(sft, ..., rft, ...)           SFT + RFT as one adapter on the plain base, for PEFT and vLLM
"""

import hashlib
import json
import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT names a tensor by the path of its module inside PEFT's two wrappers


@dataclass
class LoRAConfig:
    r: int
    alpha: float
    targets: tuple[str, ...] | str = DEFAULT_TARGETS  # names or path endings; a string is a regex for the whole path
    base_model: str = ""  # name or path of the base, written as base_model_name_or_path
    base_fingerprint: str | None = None  # of the base weights it was trained on; save_adapter fills it in

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
    """A frozen nn.Linear with a low-rank correction: (..., in) -> (..., out). Section 4.1 of the paper."""

    def __init__(self, base: nn.Linear, r: int, scaling: float, generator: torch.Generator):
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
        W's resolution, and the first steps are; so there it is [W, B] (out, in + r), for [x, scaling A x].
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


def _require_layers(model: nn.Module) -> dict[str, LoRALinear]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("this model has no adapter: call inject or load_adapter first")
    return layers


def _require_no_layers(model: nn.Module) -> None:
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
    _require_no_layers(model)
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
    layers = list(_require_layers(model).values())
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
    layers, owners = _require_layers(model), {}
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
        for name, layer in _require_layers(model).items()
        for letter in "AB"
    }


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copies a state with PEFT's names into the model's adapter. All is checked before anything is changed.

    ValueError, one line: the first missing or unexpected key, or the first shape that differs.
    """
    own = {
        f"{PREFIX}{name}.lora_{letter}.weight": getattr(layer, letter)
        for name, layer in _require_layers(model).items()
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


# ---------------------------------------------------------------------------------------------------------------------
# Adapter on disk: adapter_config.json + adapter_model.safetensors, as PEFT writes and reads them


def save_adapter(model: nn.Module, folder: str | os.PathLike, config: LoRAConfig) -> None:
    """Writes the model's adapter and the fingerprint of its base. ValueError: config is not that of the adapter."""
    if any(layer.scaling != config.scaling for layer in _require_layers(model).values()):
        raise ValueError(f"alpha / r = {config.scaling} is not the scaling that the model's adapter was made with")
    write_adapter(folder, adapter_state(model), replace(config, base_fingerprint=fingerprint(model)))


def write_adapter(folder: str | os.PathLike, state: dict[str, torch.Tensor], config: LoRAConfig) -> None:
    """Writes a state (PEFT's names) and its config over whatever adapter the folder holds.

    Both files are written in full beside their targets before either is replaced, so a killed write leaves the old
    adapter. Two files cannot be replaced in one step, so alpha also travels in the header of the weights (r and the
    modules show in the tensors): should a kill fall between, new weights beside another config are refused. The
    fingerprint is in that header too, because PEFT warns of every key of its config that it does not know.
    ValueError: a rank in the state is not config.r.
    """
    _check_rank(state, config, folder)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model or None,
        "r": config.r,
        "lora_alpha": config.alpha,
        "target_modules": config.targets if isinstance(config.targets, str) else list(config.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }
    header = {"format": "pt", "lora_alpha": str(float(config.alpha))}
    if config.base_fingerprint:
        header["base_fingerprint"] = config.base_fingerprint
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    files = {  # in this order: the config comes last, so a new folder that has one is complete
        WEIGHTS_FILE: _sorted_header(safetensors_bytes(state, metadata=header)),
        CONFIG_FILE: (json.dumps(fields, indent=2) + "\n").encode(),
    }
    os.makedirs(folder, exist_ok=True)
    for name, data in files.items():
        with open(os.path.join(folder, name + ".tmp"), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    for name in files:
        os.replace(os.path.join(folder, name + ".tmp"), os.path.join(folder, name))


def _sorted_header(data: bytes) -> bytes:
    """The same safetensors file with its header in a fixed order: safetensors writes metadata in a random one, and the
    same adapter is to be the same file. Layout: length of the header (8 bytes), JSON header, tensors."""
    n = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + n]), sort_keys=True, separators=(",", ":")).encode()
    return data[:8] + header.ljust(n) + data[8 + n :]


# What a PEFT config may hold without a change to h = W x + scaling * B A x in evaluation. The rule is the safe way
# round: any other field, one of a future PEFT too, must be empty, or the adapter is refused.
HARMLESS = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "lora_dropout"}
HARMLESS |= {"inference_mode", "revision", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size"}
HARMLESS |= {"ensure_weight_tying"}
HARMLESS_VALUES = {"bias": ["none"], "init_lora_weights": [True, "gaussian"]}  # others, "pissa" say, change W


def load_config(folder: str | os.PathLike) -> LoRAConfig:
    """The config of an adapter folder, after all checks of read_adapter."""
    return read_adapter(folder)[1]


def read_adapter(folder: str | os.PathLike) -> tuple[dict[str, torch.Tensor], LoRAConfig]:
    """Reads (state, config) of an adapter folder, written here or by PEFT. The state's tensors are on the CPU.

    FileNotFoundError: one of the two files is missing. ValueError: a file is damaged, the two files do not belong
    together, or the adapter is more than plain LoRA.
    """
    config_path, weights_path = os.path.join(folder, CONFIG_FILE), os.path.join(folder, WEIGHTS_FILE)
    if not os.path.isfile(config_path):
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}: is it the folder of a finished adapter?")
    if not os.path.isfile(weights_path):
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_FILE} (a pickled .bin is not read: save it as safetensors)")
    try:
        with open(config_path, encoding="utf-8") as file:
            fields = json.load(file)
        if fields["peft_type"] != "LORA":
            raise ValueError(f"peft_type is {fields['peft_type']!r}, only LORA is supported")
        for field, value in fields.items():
            if value and field not in HARMLESS and value not in HARMLESS_VALUES.get(field, ()):
                raise ValueError(f"{field} = {value!r} is not supported, only plain LoRA is")
        targets = fields["target_modules"]
        targets = targets if isinstance(targets, str) else tuple(sorted(targets))  # PEFT writes a set, in any order
        config = LoRAConfig(fields["r"], fields["lora_alpha"], targets, fields.get("base_model_name_or_path") or "")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{config_path} is not the config of a LoRA adapter: {error} is missing or wrong") from None
    except ValueError as error:  # json.JSONDecodeError is one
        raise ValueError(f"{config_path}: {error}") from None
    try:
        with safe_open(weights_path, framework="pt") as file:
            header = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{weights_path} is damaged, copy or save it again: {error}") from None
    _check_rank(state, config, folder)
    if "lora_alpha" in header and float(header["lora_alpha"]) != config.alpha:
        raise ValueError(
            f"{folder}: the weights were saved with alpha = {header['lora_alpha']}, but {CONFIG_FILE} says "
            f"{config.alpha}: the two files do not belong together, save the adapter again"
        )
    return state, replace(config, base_fingerprint=header.get("base_fingerprint"))


def _check_rank(state: dict[str, torch.Tensor], config: LoRAConfig, folder) -> None:
    for key, tensor in state.items():
        rank = tensor.shape[1 if key.endswith("lora_B.weight") else 0] if tensor.ndim == 2 else config.r
        if rank != config.r:  # a tensor of another form is left to the check of the keys
            raise ValueError(f"{folder}: {key} has rank {rank}, but r = {config.r} in the config: not one adapter")


def load_adapter(model: nn.Module, folder: str | os.PathLike, generator: torch.Generator | None = None) -> LoRAConfig:
    """Puts the adapter of a folder on its base model, which is frozen. After an error the model has no adapter.

    generator draws the first A, which the file then overwrites; without one the global random state stays untouched.
    FileNotFoundError, ValueError: as in read_adapter; the model has an adapter already, or is not the adapter's base.
    """
    _require_no_layers(model)
    state, config = read_adapter(folder)
    try:
        inject(model, config, generator or torch.Generator())
        load_adapter_state(model, state)
        if config.base_fingerprint and config.base_fingerprint != fingerprint(model):
            raise ValueError(
                "the base weights differ (was it trained on top of another adapter, as RFT is on SFT? Then load and "
                "merge that one first, in the same dtype)"
            )
    except ValueError as error:
        remove(model)
        base = config.base_model or "an unnamed base model"
        raise ValueError(f"{folder}: this adapter was trained on {base}, not on this model: {error}") from None
    return config


def stack_adapters(
    state1: dict[str, torch.Tensor], config1: LoRAConfig, state2: dict[str, torch.Tensor], config2: LoRAConfig
) -> tuple[dict[str, torch.Tensor], LoRAConfig]:
    """One adapter on the plain base for adapter 1 on the base and adapter 2 on the merged base (SFT, then RFT).

    s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2], so A is (r1 + r2, in), B is (out, r1 + r2), and the new scaling is 1
    (alpha = r). A module that only one adapter has gets zeros from the other. The base is that of adapter 1.
    ValueError: the two were trained on models of different shapes.
    """
    r = config1.r + config2.r
    modules = sorted({key.rpartition(".lora_")[0] for key in (*state1, *state2)})
    state = {}
    for module in modules:
        key_A, key_B, As, Bs = f"{module}.lora_A.weight", f"{module}.lora_B.weight", [], []
        known = state1 if key_A in state1 else state2  # some adapter has this module, and so its shape
        d_in, d_out = known[key_A].shape[1], known[key_B].shape[0]
        for part, config in ((state1, config1), (state2, config2)):
            As.append(part[key_A].float() if key_A in part else torch.zeros(config.r, d_in))
            Bs.append(part[key_B].float() * config.scaling if key_A in part else torch.zeros(d_out, config.r))
        if As[0].shape[1] != As[1].shape[1] or Bs[0].shape[0] != Bs[1].shape[0]:
            raise ValueError(f"cannot stack adapters of different base models: {module} has other shapes")
        state[key_A], state[key_B] = torch.cat(As), torch.cat(Bs, dim=1)
    same = config1.targets == config2.targets  # else name every module by its path, which can mean only one thing
    targets = config1.targets if same else tuple(module.removeprefix(PREFIX) for module in modules)
    return state, replace(config1, r=r, alpha=r, targets=targets)
