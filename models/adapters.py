"""Adapters on disk, in the folder format of PEFT, both ways: adapter_config.json and adapter_model.safetensors.

    save_adapter / load_adapter                  from a model, onto a model
    read_adapter / write_adapter                 tensors under PEFT's names, and the config
    stack_adapters(sft, ..., rft, ...)           SFT + RFT as one adapter on the plain base, for PEFT and vLLM
"""

import json
import os
from dataclasses import replace

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

import lora
from lora import PREFIX, LoRAConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(model: nn.Module, folder: str | os.PathLike, config: LoRAConfig) -> None:
    """Writes the model's adapter and the fingerprint of its base. ValueError: config is not that of the adapter."""
    if any(layer.scaling != config.scaling for layer in lora.require_layers(model).values()):
        raise ValueError(f"alpha / r = {config.scaling} is not the scaling that the model's adapter was made with")
    write_adapter(folder, lora.adapter_state(model), replace(config, base_fingerprint=lora.fingerprint(model)))


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
    lora.require_no_layers(model)
    state, config = read_adapter(folder)
    try:
        lora.inject(model, config, generator or torch.Generator())
        lora.load_adapter_state(model, state)
        if config.base_fingerprint and config.base_fingerprint != lora.fingerprint(model):
            raise ValueError(
                "the base weights differ (was it trained on top of another adapter, as RFT is on SFT? Then load and "
                "merge that one first, in the same dtype)"
            )
    except ValueError as error:
        lora.remove(model)
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
