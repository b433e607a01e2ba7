"""Adapters on disk, in PEFT's folder format, both ways: adapter_config.json and adapter_model.safetensors."""

import hashlib
import json
import os
import re
from dataclasses import replace
from functools import reduce
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes

import lora
from lora import LoRAConfig
from run.files import InputError, library_errors, write_atomic

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT names a tensor by the path of its module inside PEFT's two wrappers
State = dict[str, torch.Tensor]  # all A (r, in) and B (out, r) under PEFT's names

# What a config says of every plain adapter, in the order in which it is written.
PLAIN = {"lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
PLAIN |= {"init_lora_weights": True, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}
PLAIN |= {"use_rslora": False, "use_dora": False}
# What it may hold without a change to h = W x + scaling * B A x in evaluation. The rule is the safe way
# round: any other field, one of a future PEFT too, must be empty, or the adapter is refused.
HARMLESS = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules"}
HARMLESS |= {"lora_dropout", "inference_mode", "revision", "auto_mapping", "peft_version", "megatron_core"}
HARMLESS |= {"qalora_group_size", "ensure_weight_tying"}
HARMLESS_VALUES = {"bias": ["none"], "init_lora_weights": [True, "gaussian"]}  # others change W: "pissa"


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of every layer by their names in PEFT."""
    layers = lora.require_layers(model).items()
    return {
        f"{PREFIX}{name}.lora_{letter}.weight": getattr(layer, letter)
        for name, layer in layers
        for letter in "AB"
    }


def adapter_state(model: nn.Module) -> State:
    """Copies of all A (r, in) and B (out, r), fp32 on the CPU, under PEFT's names. ValueError without an
    adapter."""
    return {key: p.detach().to("cpu", copy=True) for key, p in _named_parameters(model).items()}


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: State) -> None:
    """Copies a state with PEFT's names into the model's adapter. All is checked before anything is changed;
    ValueError names the first key that is missing or unexpected, or whose shape differs."""
    own = _named_parameters(model)
    for key in [*own, *state]:
        if key not in own or key not in state:
            raise ValueError(f"adapter weights {'lack' if key in own else 'have an unexpected'} {key}")
    for key, p in own.items():
        if state[key].shape != p.shape:
            raise ValueError(f"{key} has shape {tuple(state[key].shape)}, this model needs {tuple(p.shape)}")
    for key, p in own.items():
        p.copy_(state[key])


def fingerprint(model: nn.Module) -> str:
    """sha256 over the names, shapes and four values of every base parameter.

    It tells a model from the same one with a merged adapter, which shapes cannot. The adapter is left out, a
    frozen one is base. Values are rounded to bf16: a checkpoint loaded in fp32 or in bf16 is the same base.
    """
    own = {id(p) for p in lora.lora_parameters(model)}
    base = {name: p.detach().flatten() for name, p in model.named_parameters() if id(p) not in own}
    shapes = [(re.sub(r"\.base(?=\.)", "", n), list(model.get_parameter(n).shape)) for n in base]
    values = torch.cat([p[len(p) // 8 :: max(1, len(p) // 4)][:4].bfloat16().cpu() for p in base.values()])
    return hashlib.sha256(
        json.dumps(shapes).encode() + values.view(torch.int16).numpy().tobytes()
    ).hexdigest()


def save_adapter(model: nn.Module, folder: str | os.PathLike, config: LoRAConfig) -> None:
    """Writes the model's adapter and its base's fingerprint. ValueError: config is of another adapter."""
    if any(layer.scaling != config.scaling for layer in lora.require_layers(model).values()):
        raise ValueError(f"alpha / r = {config.scaling} is not the scaling that the adapter was made with")
    write_adapter(folder, adapter_state(model), replace(config, base_fingerprint=fingerprint(model)))


def write_adapter(folder: str | os.PathLike, state: State, config: LoRAConfig) -> None:
    """Writes a state and its config over the adapter the folder holds. ValueError: a rank is not config.r.

    Each file is replaced as a whole, the config last: a new folder that has one is complete. A kill may fall
    between the two, so alpha also stands in the header of the weights (r and the modules show in the
    tensors), and weights beside another config are refused. The fingerprint stands there too, since PEFT
    warns of a key of the config that it does not know.
    """
    _check(state, config, folder)
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    base = config.base_model or None
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    fields |= {"r": config.r, "lora_alpha": config.alpha, "target_modules": targets, **PLAIN}
    header = {"format": "pt", "lora_alpha": str(float(config.alpha))}
    if config.base_fingerprint:
        header["base_fingerprint"] = config.base_fingerprint
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    os.makedirs(folder, exist_ok=True)
    write_atomic(Path(folder, WEIGHTS_FILE), _sorted_header(safetensors_bytes(state, metadata=header)))
    write_atomic(Path(folder, CONFIG_FILE), (json.dumps(fields, indent=2) + "\n").encode())


def _sorted_header(data: bytes) -> bytes:
    """safetensors writes metadata in a random order, and the same adapter is to be the same file. The layout
    is the length of the header (8 bytes), the header (JSON, padded with spaces), tensors."""
    n = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + n]), sort_keys=True, separators=(",", ":")).encode()
    return data[:8] + header.ljust(n) + data[8 + n :]


def read_adapter(folder: str | os.PathLike) -> tuple[State, LoRAConfig]:
    """The (state, config) of an adapter folder, written here or by PEFT; the tensors are on the CPU.

    FileNotFoundError: one of the two files is missing. ValueError: a file is damaged, the two do not belong
    together, some weight is no finite number, or the adapter is more than plain LoRA.
    """
    config_path, weights_path = Path(folder, CONFIG_FILE), Path(folder, WEIGHTS_FILE)
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {path.name}: is it the folder of a finished adapter?")
    with library_errors(f"{config_path}", " (is it the whole config of a LoRA adapter?)"):
        fields = json.loads(config_path.read_text(encoding="utf-8"))
        if fields["peft_type"] != "LORA":
            raise ValueError(f"peft_type is {fields['peft_type']!r}, only LORA is supported")
        for field, value in fields.items():
            if value and field not in HARMLESS and value not in HARMLESS_VALUES.get(field, ()):
                raise ValueError(f"{field} = {value!r} is not supported, only plain LoRA is")
        targets, base = fields["target_modules"], fields.get("base_model_name_or_path") or ""
        targets = targets if isinstance(targets, str) else tuple(sorted(targets))  # PEFT's are in any order
        config = LoRAConfig(fields["r"], fields["lora_alpha"], targets, base)
    with library_errors(f"{weights_path} is damaged, copy or save it again"):
        with safe_open(weights_path, framework="pt") as file:
            header, state = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
        alpha = float(header.get("lora_alpha", config.alpha))
    _check(state, config, folder)
    if isinstance(targets, str):  # a stranger's regex can run for ever, and the tensors name the layers too
        named = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in state}
        config = replace(config, targets=tuple(sorted(named)))
    if alpha != config.alpha:
        raise ValueError(f"{folder}: its weights have alpha = {alpha}, its config {config.alpha}")
    return state, replace(config, base_fingerprint=header.get("base_fingerprint"))


def require_finite(state: State, where) -> None:
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise InputError(f"{where}: {key} holds values that are no finite numbers")


def _check(state: State, config: LoRAConfig, folder) -> None:
    require_finite(state, folder)
    for key, tensor in state.items():
        rank = tensor.shape[1 if key.endswith("lora_B.weight") else 0] if tensor.ndim == 2 else config.r
        if rank != config.r:  # a tensor of another form is left to the check of the keys
            raise ValueError(f"{folder}: {key} has rank {rank}, but r = {config.r} in the config")


def load_adapter(model: nn.Module, folder, generator=None, layer: type = lora.LoRALinear) -> LoRAConfig:
    """Puts the adapter of a folder on its base model, which is frozen; after an error there is no adapter.

    generator: draws the first A, which the file then overwrites; None leaves the global random state alone.
    layer: what wraps a linear layer, as in lora.inject.
    FileNotFoundError, ValueError: as in read_adapter; the model has an adapter already, or is another base.
    """
    lora.require_no_layers(model)
    state, config = read_adapter(folder)
    try:
        lora.inject(model, config, generator or torch.Generator(), layer)
        load_adapter_state(model, state)
        if config.base_fingerprint not in (None, fingerprint(model)):
            raise ValueError(
                "the base weights differ (was it trained on top of another adapter, as RFT is on SFT? Write "
                f"OTHER+{folder}, with the dtype of that training)"
            )
    except ValueError as error:
        lora.remove(model)
        base = f"{config.base_model or 'an unnamed base model'}, not on this model"
        raise ValueError(f"{folder}: this adapter was trained on {base}: {error}") from None
    return config


def chain(name: str | os.PathLike) -> list[str]:
    """The folders of "FIRST+SECOND"; a folder with a "+" in its own name is one folder."""
    return [str(name)] if os.path.isdir(name) else str(name).split("+")


def read_chain(name: str | os.PathLike) -> tuple[State, LoRAConfig]:
    """The adapters of a chain as one for the plain base. Errors: as in read_adapter and stack_adapters."""
    first, *others = [read_adapter(folder) for folder in chain(name)]
    return reduce(lambda one, next_one: stack_adapters(*one, *next_one), others, first)


def load_chain(model: nn.Module, name: str | os.PathLike, layer: type = lora.LoRALinear) -> LoRAConfig:
    """Puts a folder's adapter on its base model, or those of "FIRST+SECOND", each trained on top of the last.

    All but the last are merged; its config is returned. A folder with a "+" in its own name is one folder.
    FileNotFoundError, ValueError: as in load_adapter and lora.merge. After an error there is no adapter, but
    what was merged stays merged: load the base model again.
    """
    *before, last = chain(name)
    for folder in before:
        load_adapter(model, folder, layer=layer)
        try:
            lora.merge(model)
        except ValueError:  # it refuses tied weights
            lora.remove(model)
            raise
    return load_adapter(model, last, layer=layer)


def stack_adapters(state1: State, config1: LoRAConfig, state2: State, config2: LoRAConfig):
    """The (state, config) of one adapter for adapter 1 on the base and 2 on the merged base: SFT, then RFT.

    s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2]: A is (r1 + r2, in), B (out, r1 + r2), and the scaling 1. A
    module that only one of them has gets zeros from the other. ValueError: the models have other shapes.
    """
    r, state, both = config1.r + config2.r, {}, ((state1, config1), (state2, config2))
    modules = sorted({key.rpartition(".lora_")[0] for key in (*state1, *state2)})
    for module in modules:
        key_A, key_B = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        known = state1 if key_A in state1 else state2  # some adapter has this module, and so its shape
        d_in, d_out = known[key_A].shape[1], known[key_B].shape[0]
        As = [s[key_A].float() if key_A in s else torch.zeros(c.r, d_in) for s, c in both]
        Bs = [s[key_B].float() * c.scaling if key_B in s else torch.zeros(d_out, c.r) for s, c in both]
        try:
            state[key_A], state[key_B] = torch.cat(As), torch.cat(Bs, dim=1)
        except RuntimeError:
            raise ValueError(f"cannot stack adapters of different base models: see {module}") from None
    same = config1.targets == config2.targets  # else every module is named by its path
    targets = config1.targets if same else tuple(module.removeprefix(PREFIX) for module in modules)
    return state, replace(config1, r=r, alpha=r, targets=targets)
