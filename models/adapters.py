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
from lora import LoRAConfig, LoRALinear
from run.errors import InputError, library_errors
from run.files import write_atomic

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT names a tensor by the path of its module inside PEFT's two wrappers
State = dict[str, torch.Tensor]  # the parameters of all layers, A (r, in) and B (out, r), by PEFT's names
Folder = str | os.PathLike

# The fields that the config of every plain adapter has, in the order in which they are written.
PLAIN = {"lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
PLAIN |= {"init_lora_weights": True, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}
PLAIN |= {"use_rslora": False, "use_dora": False}
# The fields that may have any value, since h = W x + scaling * B A x stays the same in evaluation. Any other
# field, also one of a future PEFT, must be empty or as in PLAIN, or the adapter is refused.
HARMLESS = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules"}
HARMLESS |= {"lora_dropout", "inference_mode", "revision", "auto_mapping", "peft_version", "megatron_core"}
HARMLESS |= {"qalora_group_size", "ensure_weight_tying"}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of every layer of the adapter by PEFT's names: PATH.lora_A.weight, PATH.lora_B.weight,
    and PATH.lora_NAME for those that only other kinds of layers have. ValueError without an adapter."""
    names = {"A": "lora_A.weight", "B": "lora_B.weight"}
    parts = [(path, x, part) for path, x in lora.require_layers(model).items() for part in x.parts]
    return {f"{PREFIX}{path}.{names.get(part, f'lora_{part}')}": getattr(x, part) for path, x, part in parts}


def adapter_state(model: nn.Module) -> State:
    """Copies of the adapter's parameters, fp32 on the CPU. ValueError without an adapter."""
    return {key: p.detach().to("cpu", copy=True) for key, p in named_parameters(model).items()}


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: State) -> None:
    """Copies a state into the model's adapter. ValueError: there is no adapter, or a key is missing,
    unexpected or of another shape (the first one is named); nothing is changed then."""
    parameters = named_parameters(model)
    for key in parameters | state:
        if key not in parameters or key not in state:
            raise ValueError(f"adapter weights {'lack' if key in parameters else 'have an unexpected'} {key}")
        shape, needed = tuple(state[key].shape), tuple(parameters[key].shape)
        if shape != needed:
            raise ValueError(f"{key} has shape {shape}, this model needs {needed}")
    for key, p in parameters.items():
        p.copy_(state[key])


def fingerprint(model: nn.Module) -> str:
    """sha256 over the names, shapes and four values of every base parameter.

    Unlike the shapes, it tells a model from the same one with a merged adapter. The adapter is left out; a
    frozen one is base. Values are rounded to bf16, so that a checkpoint is the same base in every dtype."""
    adapter = {id(p) for p in lora.lora_parameters(model)}
    base = {name: p.detach().flatten() for name, p in model.named_parameters() if id(p) not in adapter}
    shapes = [(re.sub(r"\.base(?=\.)", "", n), list(model.get_parameter(n).shape)) for n in base]
    values = torch.cat([p[len(p) // 8 :: max(1, len(p) // 4)][:4].bfloat16().cpu() for p in base.values()])
    data = json.dumps(shapes).encode() + values.view(torch.int16).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def save_adapter(model: nn.Module, folder: Folder, config: LoRAConfig) -> None:
    """Writes the model's adapter and its base's fingerprint. ValueError: config is of another adapter."""
    if any(layer.scaling != config.scaling for layer in lora.require_layers(model).values()):
        raise ValueError(f"alpha / r = {config.scaling} is not the scaling that the adapter was made with")
    write_adapter(folder, adapter_state(model), replace(config, base_fingerprint=fingerprint(model)))


def write_adapter(folder: Folder, state: State, config: LoRAConfig) -> None:
    """Writes a state and its config over the adapter that the folder holds. InputError: some value is not
    finite, or the files cannot be written.

    Each file is replaced as a whole, the config last, so a new folder that has a config is complete. As a
    kill may fall between the two, alpha stands in the header of the weights too (the tensors tell r and the
    modules), and weights beside another config are refused. The fingerprint stands there as well, since PEFT
    warns of a key of the config that it does not know."""
    require_finite(state, folder)
    base = config.base_model or None
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    fields |= {"r": config.r, "lora_alpha": config.alpha, "target_modules": list(config.targets), **PLAIN}
    header = {"format": "pt", "lora_alpha": str(float(config.alpha))}
    if config.base_fingerprint:
        header["base_fingerprint"] = config.base_fingerprint
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    os.makedirs(folder, exist_ok=True)
    write_atomic(Path(folder, WEIGHTS_FILE), _sorted_header(safetensors_bytes(state, metadata=header)))
    write_atomic(Path(folder, CONFIG_FILE), (json.dumps(fields, indent=2) + "\n").encode())


def _sorted_header(data: bytes) -> bytes:
    """safetensors writes metadata in a random order; with a sorted header the same adapter is the same file.
    The layout is the length of the header (8 bytes), the header (JSON, padded with spaces), tensors."""
    n = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + n]), sort_keys=True, separators=(",", ":")).encode()
    return data[:8] + header.ljust(n) + data[8 + n :]


def require_finite(state: State, where: Folder) -> None:
    """InputError, which begins with `where`: some value is not a finite number."""
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise InputError(f"{where}: {key} holds values that are not finite numbers")


def read_adapter(folder: Folder) -> tuple[State, LoRAConfig]:
    """The (state, config) of an adapter folder, written here or by PEFT; the tensors are on the CPU.

    ValueError: one of the two files is missing or damaged, they do not belong together, some value is not
    finite, or the adapter is not plain LoRA."""
    config_path, weights_path = Path(folder, CONFIG_FILE), Path(folder, WEIGHTS_FILE)
    for path in (config_path, weights_path):
        if not path.is_file():
            raise InputError(f"{folder} has no {path.name}: is it the folder of a finished adapter?")
    with library_errors(f"{weights_path} is damaged, copy or save it again"):
        with safe_open(weights_path, framework="pt") as file:
            header, state = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    require_finite(state, folder)
    with library_errors(f"{config_path}", " (is it the whole config of a LoRA adapter?)"):
        fields = json.loads(config_path.read_text(encoding="utf-8"))
        if fields["peft_type"] != "LORA":
            raise ValueError(f"peft_type is {fields['peft_type']!r}, only LORA is supported")
        for field, value in fields.items():
            harmless = field in HARMLESS or (field, value) == ("init_lora_weights", "gaussian")
            if value and value != PLAIN.get(field) and not harmless:
                raise ValueError(f"{field} = {value!r} is not supported, only plain LoRA is")
        targets = fields["target_modules"]
        if isinstance(targets, str):  # a stranger's regex could run for ever, and the tensors name the layers
            targets = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in state}
        base = fields.get("base_model_name_or_path") or ""
        config = LoRAConfig(fields["r"], fields["lora_alpha"], tuple(sorted(map(str, targets))), base)
    for key, tensor in state.items():
        if tensor.ndim == 2 and config.r not in tensor.shape:
            raise ValueError(f"{folder}: {key} has shape {tuple(tensor.shape)}, its config r = {config.r}")
    alpha = str(float(config.alpha))
    if header.get("lora_alpha", alpha) != alpha:
        raise ValueError(f"{folder}: its weights have alpha = {header['lora_alpha']}, its config {alpha}")
    return state, replace(config, base_fingerprint=header.get("base_fingerprint"))


def load_adapter(model: nn.Module, folder: Folder, layer: type[LoRALinear] = LoRALinear) -> None:
    """Puts the adapter of a folder on its base model, which is frozen; after an error there is no adapter.
    ValueError: as in read_adapter; the model has an adapter already, or is not the base of this one."""
    lora.require_no_layers(model)
    state, config = read_adapter(folder)
    try:
        lora.inject(model, config, torch.Generator(), layer)
        load_adapter_state(model, state)
        if config.base_fingerprint not in (None, fingerprint(model)):
            advice = f"was it trained on top of another adapter? Write OTHER+{folder}, with the same --dtype"
            raise ValueError(f"the base weights differ ({advice})")
    except ValueError as error:
        lora.remove(model)
        base = config.base_model or "an unnamed base model"
        raise ValueError(f"{folder} was trained on {base}, not on this model: {error}") from None


def checksum(name: Folder) -> str:
    """Of the weights of an adapter or a chain of them."""
    weights = (Path(folder, WEIGHTS_FILE).read_bytes() for folder in chain(name))
    return hashlib.sha256(b"".join(weights)).hexdigest()


def chain(name: Folder) -> list[str]:
    """The folders of FOLDER+FOLDER. A "+" in the name of a folder that exists does not end it."""
    folders, rest = [], str(name).split("+")
    while rest:
        lengths = [n for n in range(len(rest), 0, -1) if os.path.isdir("+".join(rest[:n]))]
        n = lengths[0] if lengths else 1
        folders.append("+".join(rest[:n]))
        rest = rest[n:]
    return folders


def whole_paths(name: str) -> str:
    """A chain with whole paths, so that a run can be resumed from another folder. "" stays "", no chain."""
    return name and "+".join(map(os.path.abspath, chain(name)))


def read_chain(name: Folder) -> tuple[State, LoRAConfig]:
    """The adapters of a chain as one for the plain base. Errors: as in read_adapter and stack_adapters."""
    return reduce(lambda one, other: stack_adapters(*one, *other), map(read_adapter, chain(name)))


def load_chain(model: nn.Module, name: Folder, layer: type[LoRALinear] = LoRALinear) -> None:
    """Puts a chain of adapters, each trained on top of those before, on the base model: all but the last are
    merged.

    ValueError: as in load_adapter and lora.merge. What was merged before stays merged then."""
    *before, last = chain(name)
    for folder in before:
        load_adapter(model, folder, layer)
        lora.merge(model)
    load_adapter(model, last, layer)


def stack_adapters(
    state1: State, config1: LoRAConfig, state2: State, config2: LoRAConfig
) -> tuple[State, LoRAConfig]:
    """The (state, config) of one adapter for adapter 1 on the base and 2 on the merged base: SFT, then RFT.

    s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2]: A is (r1 + r2, in), B (out, r1 + r2), and the scaling 1. A
    module that only one of them has gets zeros from the other. ValueError: the models have other shapes, or a
    layer has other parameters than A and B, so that this sum is not what it computes."""
    r, state, both = config1.r + config2.r, {}, ((state1, config1), (state2, config2))
    for key in (*state1, *state2):
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ValueError(f"adapters with {key} cannot be stacked into one")
    modules = sorted({key.rpartition(".lora_")[0] for key in (*state1, *state2)})
    with library_errors("cannot stack adapters of different base models"):
        for module in modules:
            key_A, key_B = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
            known = state1 if key_A in state1 else state2  # some adapter has this module, and so its shape
            d_in, d_out = known[key_A].shape[1], known[key_B].shape[0]
            As = [s[key_A].float() if key_A in s else torch.zeros(c.r, d_in) for s, c in both]
            Bs = [s[key_B].float() * c.scaling if key_B in s else torch.zeros(d_out, c.r) for s, c in both]
            state[key_A], state[key_B] = torch.cat(As), torch.cat(Bs, dim=1)
    same = sorted(config1.targets) == sorted(config2.targets)  # else every module is named by its path
    targets = config1.targets if same else tuple(module.removeprefix(PREFIX) for module in modules)
    return state, replace(config1, r=r, alpha=r, targets=targets)


def save_both(model: nn.Module, sft_adapter: Folder, folder: Path, config: LoRAConfig) -> None:
    """The model's adapter, RFT's, was trained on the base with SFT's merged in. For the plain base, both are
    one adapter of twice the rank. Layers that cannot be stacked so are saved alone, to be used on the merged
    base."""
    if all(layer.stackable for layer in lora.require_layers(model).values()):
        write_adapter(folder, *stack_adapters(*read_chain(sft_adapter), adapter_state(model), config))
    else:
        save_adapter(model, folder, config)
        print(f"{folder} is for the base with {sft_adapter} merged in: see tools.merge")
