"""Engines on copies of one tiny model with the same adapter, and groups of replies for them: of all lengths,
and some to prompts that begin alike."""

import torch

import lora
from models.load import load_policy

ENGINES = ("fast", "plain")
END = 2  # <|im_end|>, which ends a turn and is the padding too
PROMPTS = [
    [65, 70, 100, 33, 80, 77, 78, 79],
    [90, 41],
    [65, 70, 100, 33, 80],
    [5, 200, 17, 65, END, 31, 120, 77, 9, 300, 42],
    [65, 70, 100, 33, 80],
    [65, 70, END, 12],
]
REPLIES = [
    [[90, 91, END], [77], [30, 31, 32, 33, 34, 35], [90, 91, 92]],
    [[END], [12, 13, 14, END]],
    [[77, 78, END], [77, 78, 79, 300, END], [77, 80]],  # as the first prompt goes on
    [[200, 201, 202, 203, END], [200, 201, 202], [9, END], [200, 201, 202, 203, END]],
    [[8, 7], [END, END, END]],  # the third prompt once more
    [[60, 61, 62, 63]],
]


def add_adapter(policy, seed=1, size=0.05, r=4, targets=lora.DEFAULT_TARGETS):
    """An adapter as training would leave it: with B = 0 most tests could not fail."""
    config = lora.LoRAConfig(r, 2.0 * r, targets, policy.name)
    lora.inject(policy.model, config, torch.Generator().manual_seed(seed), policy.layer)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for layer in lora.lora_layers(policy.model).values():
            layer.B.copy_(size * torch.randn(layer.B.shape, generator=generator))
    return config


def engine(name, folder, dtype="float32", device="cpu", **adapter):
    policy = load_policy(str(folder), dtype, device, engine=name)
    add_adapter(policy, **adapter)
    return policy


def score(policy, prompts=PROMPTS, replies=REPLIES, temperature=1.0, micro_batch=100, reference=False):
    """log pi, or log pi_ref, of all tokens of the replies to each prompt, in the order of the prompts."""
    method = policy.reference_logps if reference else policy.token_logps
    by_prompt = {}
    for part in policy.batches(prompts, replies, micro_batch):
        logps = iter(method([prompts[i] for i in part], [replies[i] for i in part], temperature))
        by_prompt |= {i: torch.cat([next(logps) for _ in replies[i]]) for i in part}
    return [by_prompt[i] for i in range(len(prompts))]


def uniforms(number, *shape):
    """Random numbers that belong to a seed, such as those that `sample` needs: (P, M, S)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(number))


def ids_of(groups):
    return [[reply.ids for reply in group] for group in groups]


def difference(a, b):
    """The largest, of log-probabilities of the same replies."""
    a, b = (x if torch.is_tensor(x) else torch.cat(list(x)) for x in (a, b))
    return float((a.detach() - b.detach()).abs().max())


def gradients(policy, loss):
    """Those of every A and B; none is left behind."""
    loss.backward()
    result = [p.grad for p in lora.lora_parameters(policy.model)]
    policy.model.zero_grad(set_to_none=True)
    return result


def assert_close(actual, expected, tolerance=1e-3):
    """Tensor by tensor, relative to its norm."""
    for a, b in zip(actual, expected, strict=True):
        assert b.norm() > 1e-5 and (a - b).norm() <= tolerance * b.norm()
