"""Chat templates of other families: what is taught and sampled is what the next prompt holds."""

import shutil

import pytest
import transformers.utils.chat_template_utils as chat_template_utils
from tiny import make_tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from whole_runs import parsed

import train_sft
from models import pretrained
from models.load import load_policy
from models.template import DAY, Template, with_fixed_day
from run.errors import InputError

LOOP = "{% for m in messages %}"
GEMMA = (  # Gemma 1 and 2: no system role, and another end of a turn than the tokenizer's
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + LOOP
    + "{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)
SILENT = LOOP + (  # drops the system message without a word
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' <|im_end|>' }}{% endif %}{% endfor %}"
)
DATED = "{{ '<|im_start|>' + strftime_now('%d %b %Y') }}"
THINKING = "{% if add_generation_prompt and not enable_thinking %}{{ '<think></think>' }}{% endif %}"
CHAT = [
    {"role": "system", "content": "Rules."},
    {"role": "user", "content": "Links?"},
    {"role": "assistant", "content": "Belief: [0, 1]\nDecision: [0, 1]"},
    {"role": "user", "content": "Effort?"},
]


def tokenizer_with(template, *special):
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def sentencepiece():
    """A tokenizer that, as SentencePiece does, begins every text with a space."""
    letters = "▁<>|\nabcdefghijklmnopqrstuvwxyzBDELR:[]0123456789,.?/INST"
    vocabulary = {c: i for i, c in enumerate(dict.fromkeys(letters))}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="?"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    return tokenizer


PHI = LOOP + (
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.mark.parametrize("text", [PHI, SILENT], ids=["a line end before the reply", "spaces around it"])
@pytest.mark.parametrize("make", [make_tiny_tokenizer, sentencepiece])
def test_a_reply_is_taught_with_the_tokens_that_the_next_prompt_holds(make, text):
    tokenizer = make()
    tokenizer.chat_template = text
    template = Template(tokenizer)
    assert template.end == tokenizer.eos_token_id
    prompt, whole = (template.render(CHAT[:n], tokenize=True, return_dict=False) for n in (2, 4))
    reply = [*template.encode_reply(CHAT[2]["content"]), template.end]
    assert whole[: len(prompt) + len(reply)] == prompt + reply
    part = template.encode_reply("Belief: [0, 1]\nDecision:", whole=False)
    assert reply[: len(part)] == part


def test_the_end_of_a_turn_is_what_the_template_puts_behind_a_reply(model_dir):
    model, _ = pretrained.load(model_dir)
    tokenizer = tokenizer_with(GEMMA, "<start_of_turn>", "<end_of_turn>")
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert pretrained.end_token_ids(model, tokenizer, Template(tokenizer)) == (end, tokenizer.eos_token_id)
    tokenizer = tokenizer_with(LOOP + "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    assert Template(tokenizer).end is None


@pytest.mark.parametrize("text", [GEMMA, SILENT], ids=["refuses", "drops"])
def test_without_a_system_role_the_system_message_begins_the_first_user_message(model_dir, tmp_path, text):
    tokenizer, folder = tokenizer_with(text), shutil.copytree(model_dir, tmp_path / "model")
    tokenizer.save_pretrained(folder)
    policy = load_policy(str(folder))  # it is no longer refused
    said = policy.tokenizer.decode(policy.encode_prompt(CHAT))
    assert "Rules.\n\nLinks?" in said and "Effort?" in said
    assert policy.encode_prompt(CHAT[1:]) != policy.encode_prompt(CHAT)
    assert not Template(make_tiny_tokenizer()).folds


CHATML = make_tiny_tokenizer().chat_template
PARTS = LOOP + (
    "{{ m['role'] }}{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    "text, who",
    [
        (PARTS, "user"),  # texts are lists of parts there, as in multimodal models
        (CHATML.replace("messages", "messages[-2:]"), "system"),
        (CHATML.replace("['content']", "['content'][:100]"), "system"),
        (CHATML.replace("['content']", "['content'] | e"), "system"),
        (LOOP + "{% if m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}", "assistant"),
    ],
)
def test_a_template_that_loses_what_was_said_is_refused(text, who):
    assert text != CHATML
    with pytest.raises(InputError, match=f"does not hand on all that the {who} says in a conversation"):
        Template(tokenizer_with(text))


def in_year(monkeypatch, year):
    class Clock(chat_template_utils.datetime):
        @classmethod
        def now(cls):
            return cls(year, 1, 2)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return Clock.now()


def test_a_date_that_a_template_computes_changes_the_checksum(monkeypatch):
    """So a run is not resumed on another day, where its prompts would differ."""
    template = Template(tokenizer_with("{{ strftime_now('%d' ~ ' %b %Y') }}" + CHATML))
    first, second, again = [(in_year(monkeypatch, year), template.checksum)[1] for year in (2026, 2027, 2026)]
    assert first == again != second


def test_a_template_gets_the_values_of_the_flag_and_no_others():
    tokenizer = tokenizer_with(make_tiny_tokenizer().chat_template + THINKING)
    assert Template(tokenizer).text(CHAT).endswith("<think></think>")
    assert Template(tokenizer, {"enable_thinking": True}).text(CHAT).endswith("assistant\n")
    for name in (
        "thinking_on",
        "thinking",
        "enable",
        "message",
        "messages",
    ):  # parts of its text, and a name of its own
        with pytest.raises(InputError, match=f"--template {name}: .* does not know"):
            Template(tokenizer, {name: True})


def test_the_flag_reaches_the_template(model_dir, tmp_path, refused):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    tokenizer_with(make_tiny_tokenizer().chat_template + THINKING).save_pretrained(folder)
    for value, end in (("true", "assistant\n"), ("false", "<think></think>")):
        argv = ["--model", str(folder), "--template", f"enable_thinking={value}"]
        policy = parsed(argv, train_sft)[1].model.load()
        assert policy.tokenizer.decode(policy.encode_prompt(CHAT)).endswith(end)
    for text in ("enable_thinking", "=true"):  # no value, no name: before anything is loaded
        line = refused(train_sft.main, ["--model", str(folder), "--template", text])
        assert f"--template {text}: write NAME=VALUE" in line


@pytest.mark.parametrize("text", ["%d %b %Y", "%B %d, %Y"])
def test_a_template_that_prints_the_date_prints_the_same_on_every_day(model_dir, tmp_path, monkeypatch, text):
    """So a run that is resumed after midnight reads what it has read."""
    dated, folder = DATED.replace("%d %b %Y", text), shutil.copytree(model_dir, tmp_path / "model")
    tokenizer = tokenizer_with(dated + make_tiny_tokenizer().chat_template)
    tokenizer.save_pretrained(folder)
    prompts = []
    for year in (2026, 2027):
        today = in_year(monkeypatch, year).strftime(text)
        assert str(year) in today and today in tokenizer.apply_chat_template(CHAT, tokenize=False)
        prompts.append(load_policy(str(folder)).encode_prompt(CHAT))
    assert prompts[0] == prompts[1] and DAY.strftime(text) in tokenizer.decode(prompts[0])
    other = "{{ strftime_now('%d' | trim) }}{{ messages[0]['content'].strip('x') }}"
    assert with_fixed_day(other) == other
    assert with_fixed_day({"a": 'strftime_now( "%Y" )'}) == {"a": "'2024'"}
