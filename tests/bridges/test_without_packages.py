"""A bridge whose package is not installed says what to install."""

import runpy
import sys

import pytest


@pytest.mark.parametrize(
    "bridge, package, requirements",
    [("trl_tompo", "trl", "bench"), ("verifiers_tompo", "verifiers.v1", "verifiers")],
)
def test_without_its_package_there_is_one_line(bridge, package, requirements, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"bridges.{bridge}")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith(f"; pip install -r requirements-{requirements}.txt")
