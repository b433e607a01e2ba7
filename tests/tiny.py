"""A tiny random Llama with a byte-level tokenizer and SmolLM2's chat template: the tests' model."""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# SmolLM2-135M-Instruct's own template, letter for letter: ChatML with a default system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}{{ tail }}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2, as in SmolLM2
MERGE_TEXTS = [
    "system user assistant You are a player. Decision: [1, 0, 1] Belief: [1.20, 0.95] Decision: 1.5",
    "Decision Decision Belief Belief round round the the payoff payoff neighbour neighbour cooperate",
    "one\n\n\ntwo\n\n\nthree   four   five",  # two line ends, and two spaces, get one code, as in SmolLM2
]


def make_tiny_tokenizer(extra_texts=()):
    """Return a byte-level BPE tokenizer that encodes any text; the words of extra_texts get short codes.

    All 256 bytes are in the vocabulary, ids are below 400, and pad is eos is <|im_end|>: a trap on purpose,
    since a mask made from token values would then hide the end of the turn.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=399, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*MERGE_TEXTS, *extra_texts], trainer)
    unknown, begin, end = SPECIAL
    names = dict(unk_token=unknown, bos_token=begin, eos_token=end, pad_token=end)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_tiny_model(folder, extra_texts=(), seed=0):
    """Save a random Llama (about 100 thousand parameters) and its tokenizer in folder and return the folder.

    The same arguments give the same files. The initial weights are larger than usual so that the logits are
    far from uniform: greedy decoding, entropies and log-ratios then have something to show.
    """
    folder = Path(folder)
    tokenizer = make_tiny_tokenizer(extra_texts)
    shape = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlamaConfig(**shape, **ids, tie_word_embeddings=True, initializer_range=0.2)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are left as they were
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def changed_copy(source, folder, **config):
    """A copy of a model's folder with other values in its config."""
    shutil.copytree(source, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder
