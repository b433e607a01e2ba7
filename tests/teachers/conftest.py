"""What the tests of language models as experts share."""

import importlib.util
from functools import partial

import pytest
from chat_server import KEY

from play.cast import make_expert
from play.dataset import simulate_many
from prompts import PromptStyle
from teachers import language, record
from teachers.asking import asking
from world.draws import Family

TWO_ROUNDS = (Family("bcz", "GE", 2),)


@pytest.fixture
def forget():
    """Does what the end of a process does."""

    def end():
        for file in record._open.values():
            file.lock.lock.release()
            file.file.close()
        record._open.clear()
        language._made.clear()

    return end


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path, forget):
    """Waits are short, there is no proxy and no GPU, and every file that a test opened is closed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if importlib.util.find_spec("openai"):
        monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    yield
    forget()


@pytest.fixture
def make():
    """make(name, --ask pairs) -> the expert."""

    def build(name, pairs="", style=PromptStyle()):
        how = asking(pairs.split(), style)
        return make_expert(name, partial(language.make, asking=how))

    return build


@pytest.fixture
def ask(monkeypatch, make):
    """ask(server, name of the record, games, ...) -> (records, language expert). pairs: of --ask."""

    def run(server, record="answers.jsonl", games=3, seed=0, name="openai:m", pairs="", **how):
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        pairs = f"record={record} {pairs}"
        how = dict(families=TWO_ROUNDS) | how
        records = simulate_many(games, make(name, pairs), seed, PromptStyle(), (3, 4), **how)
        return records, make(name.replace("noisy:", "").rstrip(":.0123456789"), pairs)

    return run
