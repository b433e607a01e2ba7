"""What the tests of language models as experts share."""

import importlib.util

import pytest
from chat_server import KEY

from prompts import PromptStyle
from run.dataset import simulate_many
from teachers import language
from teachers.record import AnswerFile
from world.draws import Family

TWO_ROUNDS = (Family("bcz", "GE", 2),)


@pytest.fixture
def forget():
    """Does what the end of a process does."""

    def end():
        for file in list(AnswerFile._open.values()):
            file.close()
        language._made.clear()

    return end


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path, forget):
    """Waits are short, there is no proxy, and every file that a test opened is closed."""
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec("openai"):
        monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    yield
    forget()


@pytest.fixture
def ask(monkeypatch):
    """ask(server, name of the record, games, ...) -> (records, expert). pairs: of --ask."""

    def run(server, record="answers.jsonl", games=3, seed=0, name="openai:m", pairs="", **how):
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        style = PromptStyle()
        asking = language.asking([f"record={record}", *pairs.split()], style)
        how = dict(families=TWO_ROUNDS) | how
        records = simulate_many(games, name, seed, style, (3, 4), ask=asking, **how)
        return records, language.make(name, asking)

    return run
