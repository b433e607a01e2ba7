"""The plain way to score replies, for comparison: transformers' own model and attention, one pass per reply."""

import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import lora


def plain_model(folder, policy=None):
    """ids -> logits of the folder loaded afresh, with W + scaling B A of the policy's adapter as its weights (so that
    gradients reach A and B)."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    weights = dict(model.named_parameters())
    for name, layer in lora.lora_layers(policy.model).items() if policy else ():
        weights[name + ".weight"] = weights[name + ".weight"] + layer.scaling * layer.B @ layer.A
    return lambda ids: functional_call(model, weights, (torch.tensor([ids]),)).logits[0]


def plain_logps(model, prompt, reply, temperature=1.0):
    law = (model(prompt + reply) / temperature).log_softmax(-1)
    return torch.stack([law[len(prompt) - 1 + t, token] for t, token in enumerate(reply)])


def take_gradients(policy):
    found = [p.grad.clone() for p in lora.lora_parameters(policy.model)]
    policy.model.zero_grad(set_to_none=True)
    return found
