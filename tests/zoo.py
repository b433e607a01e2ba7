"""Tiny random models of many architectures, and how far both engines are from transformers' own logits.

    python -m tests.zoo                      # the table of docs/models.md
    python -m tests.zoo mistral granite      # some of its rows

Errors are the largest differences, in nats, between log pi of sampled tokens, as they are sampled and as they
are scored, and model(ids).logits, in float32 and in bfloat16. In float32 up to 1e-4 is rounding.
"""

import sys
import tempfile
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from tiny import make_tiny_tokenizer

import lora
from models import pretrained
from models.load import load_policy
from policy import Policy
from run.errors import InputError
from run.seeds import Stream
from settings import LoRA
from train_sft import new_adapter

V = len(make_tiny_tokenizer())
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.2)
BASE = dict(vocab_size=V, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
BASE |= dict(num_key_value_heads=2, max_position_embeddings=2048, **IDS)
SMALL = dict(vocab_size=V, hidden_size=64, **IDS)
EVERY_HEAD = BASE | dict(num_key_value_heads=4)
MOE = BASE | dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16)
LINEAR |= dict(linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"])
LOCAL = dict(sliding_window=64, layer_types=["sliding_attention", "full_attention"])
LATENT = dict(kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
GPT = dict(vocab_size=V, n_embd=64, n_layer=2, n_head=4, n_positions=2048, **IDS)

# By name: model_type of transformers, its config, and real families.
ZOO: dict[str, tuple[str, dict, str]] = {
    "llama": ("llama", BASE, "SmolLM2, Llama 2 and 3, TinyLlama"),
    "llama, biases": ("llama", BASE | dict(attention_bias=True, mlp_bias=True), ""),
    "smollm3": ("smollm3", BASE, "SmolLM3"),
    "qwen2": ("qwen2", BASE, "Qwen1.5, Qwen2, Qwen2.5"),
    "qwen3": ("qwen3", BASE | dict(head_dim=32), "Qwen3"),
    "qwen3_moe": ("qwen3_moe", MOE, "Qwen3-30B-A3B"),
    "qwen2_moe": ("qwen2_moe", MOE | dict(shared_expert_intermediate_size=64), "Qwen1.5-MoE, Qwen2-57B-A14B"),
    "qwen3_next": ("qwen3_next", MOE | LINEAR, "Qwen3-Next"),
    "qwen3_5": ("qwen3_5_text", BASE | LINEAR | dict(head_dim=16), "Qwen3.5"),
    "mistral": ("mistral", BASE | dict(sliding_window=None), "Mistral 7B from 0.2 on, Zephyr"),
    "mistral, window": ("mistral", BASE | dict(sliding_window=64), "Mistral 7B 0.1"),
    "ministral": ("ministral", BASE | LOCAL | dict(head_dim=16), "Ministral 8B"),
    "mixtral": ("mixtral", BASE | dict(num_local_experts=4, sliding_window=None), "Mixtral"),
    "gemma": ("gemma", BASE | dict(head_dim=16), "Gemma 1"),
    "gemma2": ("gemma2", BASE | dict(head_dim=16, sliding_window=64), "Gemma 2"),
    "gemma2, final cap alone": (
        "gemma2",
        BASE | dict(head_dim=16, sliding_window=4096, attn_logit_softcapping=None),
        "",
    ),
    "gemma3": ("gemma3_text", BASE | LOCAL | dict(head_dim=16), "Gemma 3 (text)"),
    "granite": (
        "granite",
        BASE | dict(embedding_multiplier=2.0, logits_scaling=4.0, attention_multiplier=0.1),
        "Granite 3",
    ),
    "granitemoe": ("granitemoe", BASE | dict(num_local_experts=4, logits_scaling=6.0), "Granite 3 MoE"),
    "granitemoehybrid": (
        "granitemoehybrid",
        BASE
        | dict(num_local_experts=4, layer_types=["mamba", "attention"], mamba_n_heads=8, mamba_d_head=16),
        "Granite 4",
    ),
    "bamba": (
        "bamba",
        BASE
        | dict(attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16),
        "Bamba",
    ),
    "nemotron_h": (
        "nemotron_h",
        BASE
        | dict(hybrid_override_pattern="M*", mamba_num_heads=8, mamba_head_dim=16, n_groups=1, head_dim=16),
        "Nemotron-H, Nemotron Nano 2",
    ),
    "jamba": (
        "jamba",
        BASE | dict(attn_layer_period=2, attn_layer_offset=1, num_experts=2, use_mamba_kernels=False),
        "Jamba",
    ),
    "minimax": (
        "minimax",
        BASE
        | dict(head_dim=16, num_local_experts=4, layer_types=["linear_attention", "full_attention"])
        | dict(block_size=16),
        "MiniMax-Text-01",
    ),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        EVERY_HEAD
        | dict(kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16)
        | dict(index_topk=32, index_head_dim=16, index_n_heads=32, mlp_layer_types=["dense", "dense"]),
        "GLM-5",
    ),
    "minimax_m3": (
        "minimax_m3_vl_text",
        BASE
        | dict(head_dim=16, index_block_size=8, index_topk_blocks=2, index_n_heads=2, index_head_dim=16)
        | dict(layer_types=["minimax_m3_sparse"] * 2, mlp_layer_types=["dense"] * 2)
        | dict(dense_intermediate_size=128),
        "MiniMax-M3 (text)",
    ),
    "cohere": ("cohere", BASE | dict(logit_scale=0.25), "Command R"),
    "cohere2": ("cohere2", BASE | LOCAL | dict(logit_scale=0.25), "Command R7B"),
    "phi": ("phi", EVERY_HEAD, "Phi 1.5, Phi 2"),
    "phi3": ("phi3", EVERY_HEAD, "Phi 3, 3.5 and 4 mini"),
    "phimoe": ("phimoe", BASE | dict(num_local_experts=4), "Phi 3.5 MoE"),
    "olmo2": ("olmo2", BASE, "OLMo 2"),
    "olmo3": ("olmo3", BASE | LOCAL, "OLMo 3"),
    "olmoe": ("olmoe", MOE, "OLMoE"),
    "glm4": ("glm4", BASE | dict(head_dim=16), "GLM-4"),
    "glm4_moe": ("glm4_moe", MOE | dict(n_routed_experts=4, first_k_dense_replace=1), "GLM-4.5"),
    "exaone4": ("exaone4", BASE | LOCAL, "EXAONE 4"),
    "gpt_oss": ("gpt_oss", MOE | LOCAL | dict(num_local_experts=4), "gpt-oss"),
    "llama4": (
        "llama4_text",
        BASE | dict(head_dim=16, num_local_experts=2, attention_chunk_size=64, intermediate_size_mlp=128),
        "Llama 4 (text)",
    ),
    "deepseek_v2": (
        "deepseek_v2",
        EVERY_HEAD | LATENT | dict(first_k_dense_replace=2, n_routed_experts=4, num_experts_per_tok=2),
        "DeepSeek V2",
    ),
    "deepseek_v3": (
        "deepseek_v3",
        EVERY_HEAD
        | LATENT
        | dict(first_k_dense_replace=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1),
        "DeepSeek V3, R1, Kimi K2",
    ),
    "ernie4_5": ("ernie4_5", BASE, "ERNIE 4.5"),
    "hunyuan": ("hunyuan_v1_dense", BASE | dict(head_dim=16), "Hunyuan 0.5B to 7B"),
    "nemotron": ("nemotron", BASE, "Minitron"),
    "starcoder2": ("starcoder2", BASE | dict(sliding_window=64), "StarCoder2"),
    "lfm2": ("lfm2", BASE | dict(layer_types=["conv", "full_attention"]), "LFM2"),
    "falcon_h1": ("falcon_h1", BASE | dict(mamba_d_ssm=64, mamba_n_heads=4), "Falcon-H1"),
    "stablelm": ("stablelm", BASE, "StableLM 2"),
    "persimmon": ("persimmon", EVERY_HEAD, "Persimmon"),
    "gpt2": ("gpt2", GPT, "GPT-2"),
    "gpt_bigcode": ("gpt_bigcode", GPT, "StarCoder"),
    "gptj": ("gptj", GPT | dict(rotary_dim=8), "GPT-J"),
    "gpt_neo": (
        "gpt_neo",
        SMALL | dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=64),
        "GPT-Neo",
    ),
    "gpt_neox": ("gpt_neox", BASE, "Pythia, Dolly"),
    "opt": ("opt", BASE | dict(ffn_dim=128, word_embed_proj_dim=64), "OPT"),
    "bloom": ("bloom", SMALL | dict(n_layer=2, n_head=4), "BLOOM, BLOOMZ"),
    "falcon": ("falcon", BASE, "Falcon 1"),
    "mpt": ("mpt", dict(vocab_size=V, d_model=64, n_layers=2, n_heads=4, **IDS), "MPT"),
    "mamba": ("mamba", SMALL | dict(num_hidden_layers=2, state_size=8), "Mamba"),
    "mamba2": (
        "mamba2",
        SMALL | dict(num_hidden_layers=2, state_size=8, num_heads=8, head_dim=16, n_groups=1),
        "Mamba 2",
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        BASE | dict(lru_width=64, block_types=["recurrent", "attention"], attention_window_size=64),
        "RecurrentGemma",
    ),
}


def build(name: str, folder: Path) -> Path:
    """Writes the model of this name, with a tokenizer, into FOLDER/NAME."""
    kind, config, _ = ZOO[name]
    with torch.random.fork_rng(devices=[]), pretrained.quiet():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(kind, **config)
        )
        for parameter, p in model.named_parameters():  # biases should not be trivial
            if p.dim() == 1 and "norm" not in parameter.lower() and "ln" not in parameter.lower():
                torch.nn.init.normal_(p, std=0.1)
        model.save_pretrained(folder / name)
    make_tiny_tokenizer().save_pretrained(folder / name)
    return folder / name


def chat(k: int) -> list[dict]:
    """Longer than the windows of the zoo, and like the others up to its end."""
    texts = [
        "You are a player in a game. " * 3,
        "Round 1: choose links.",
        "Decision: [1, 0, 1]",
        f"Round {k}",
    ]
    return [
        dict(role=r, content=t) for r, t in zip(("system", "user", "assistant", "user"), texts, strict=True)
    ]


@torch.no_grad()
def errors(policy, truth) -> dict[str, float]:
    """truth: transformers' model, as it was loaded."""
    prompts = [policy.encode_prompt(chat(k)) for k in range(3)]
    groups = policy.sample(prompts, torch.rand(3, 4, 12, generator=torch.Generator().manual_seed(1)))
    right = []
    for prompt, group in zip(prompts, groups, strict=True):
        for reply in group:
            logps = (
                truth(torch.tensor([prompt + reply.ids]), use_cache=False).logits[0].float().log_softmax(-1)
            )
            right += [logps[len(prompt) - 1 + t, token] for t, token in enumerate(reply.ids)]
    sampled = torch.tensor([logp for group in groups for reply in group for logp in reply.logps])
    scored = torch.cat(policy.token_logps(prompts, [[reply.ids for reply in group] for group in groups]))
    right = torch.stack(right)
    return {k: float((x - right).abs().max()) for k, x in (("sampled", sampled), ("scored", scored))}


def fits(policy, name: str) -> bool:
    """Whether an adapter fits the layers of this name."""
    try:
        new_adapter(policy, LoRA(rank=2, targets=(name,)), 0, Stream.SFT_ADAPTER)
        return True
    except InputError:
        return False
    finally:
        lora.remove(policy.model)


def targets(policy) -> tuple[float, list[str]]:
    """The share of the weights, without embeddings and head, that --targets adapts by default, and what to
    give it to adapt all linear layers, [] if that is the default."""
    model = policy.model
    outside = {id(x.weight) for x in (model.get_input_embeddings(), model.get_output_embeddings())}
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in outside}
    linear = {
        f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    } & weights.keys()
    names = {name for name in {n.split(".")[-2] for n in linear} if fits(policy, name)}
    adapted = [
        p.numel() for n, p in weights.items() if n in linear and n.split(".")[-2] in lora.DEFAULT_TARGETS
    ]
    missing = set(lora.DEFAULT_TARGETS) - names
    return sum(adapted) / sum(p.numel() for p in weights.values()), sorted(names) if missing else []


def measured(folder: Path, dtype: str) -> tuple[str, list[str], Policy]:
    """Which engines fit, the largest error of plain and of fast, and the model as it was loaded."""
    plain, other = (load_policy(str(folder), dtype, engine="plain") for _ in range(2))
    engines = "plain" if plain.cached else "plain, without a cache"
    found, policy = [max(errors(plain, other.model).values())], load_policy(str(folder), dtype)
    if type(policy) is not type(plain):
        engines = "both"
        try:
            found.append(max(errors(policy, other.model).values()))
        except InputError:
            engines = "both; fast within the window"
    said = [f"{error:.0e}" if error else "0" for error in found]
    return engines, said + ["-"] * (2 - len(said)), other


def row(name: str, folder: Path) -> list[str]:
    folder = build(name, folder)
    engines, said, loaded = measured(folder, "float32")
    there, said_there, _ = measured(folder, "bfloat16")
    assert there == engines, f"{name}: {there} in bfloat16"
    share, wanted = targets(loaded)
    wanted = f"`--targets {' '.join(wanted)}`" if wanted else "" if share else "not possible: no nn.Linear"
    return [name, ZOO[name][2], engines, *said, *said_there, f"{share:.0%}", wanted]


def main(names: list[str]) -> None:
    head = [
        "model",
        "such as",
        "engines",
        "plain",
        "fast",
        "plain, bf16",
        "fast, bf16",
        "adapted",
        "to adapt all linear layers",
    ]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in names or ZOO:
            print(f"| {' | '.join(row(name, Path(folder)))} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
