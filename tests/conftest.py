"""Let the tests import the flat modules of the repository and the helpers beside them, and share one tiny model
and one whole run on it."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

pytest.register_assert_rewrite("whole_runs", "reference")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """Folder of a tiny random chat model; tests read it and write elsewhere."""
    from tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def model_dir(tiny_model_dir):
    return str(tiny_model_dir)


@pytest.fixture(scope="session")
def full(model_dir, tmp_path_factory):
    """One whole run; tests read its folder and copy it to change it."""
    from whole_runs import whole_run

    return whole_run(model_dir, tmp_path_factory.mktemp("runs") / "full")


@pytest.fixture(scope="session")
def sft_adapter(full):
    return str(full.folder / "sft" / "adapter")
