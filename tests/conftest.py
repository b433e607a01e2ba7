"""What many tests share: one tiny model and one whole run on it."""

import sys

import pytest

from run.errors import InputError

pytest.register_assert_rewrite("whole_runs", "reference")


@pytest.fixture(autouse=True)
def every_complaint_is_one_line(monkeypatch):
    """Of whatever a test does in this process."""
    longer = []

    def noted(error, *message):
        longer.extend(text for text in message if "\n" in str(text))
        ValueError.__init__(error, *message)

    monkeypatch.setattr(InputError, "__init__", noted, raising=False)
    yield
    assert not longer


@pytest.fixture(scope="session", autouse=True)
def scripts_compute_on_the_cpu():
    """Also where there is a GPU; tests/fast/test_cuda.py is about GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        if "settings" in sys.modules:  # a test that runs a script has imported it
            from whole_runs import on_device

            on_device("cpu", patch.setattr)
        yield


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
def gentle(model_dir, tmp_path_factory):
    """The same with a lower learning rate: what another engine, or more processes, must end in."""
    from whole_runs import GENTLE, Run, rft_flags, run_rft

    folder = tmp_path_factory.mktemp("runs") / "gentle"
    run_rft(rft_flags(model_dir, folder, lr=GENTLE))
    return Run(folder)


@pytest.fixture(scope="session")
def sft_adapter(full):
    return str(full.folder / "sft" / "adapter")


@pytest.fixture
def refused(capsys):
    """refused(main, argv) -> the one `error:` line in which that script ends, with exit status 2."""

    def run(main, argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, argv)))
        out, err = capsys.readouterr()
        (line,) = [line for line in err.splitlines() if "error:" in line]
        said = [line for line in out.splitlines() if not line.startswith("continuing ")]  # --resume
        assert stop.value.code == 2 and not said and "Traceback" not in err
        return line

    return run
