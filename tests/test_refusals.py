"""What the scripts refuse in one line, before any work: bad flags, and to overwrite what is there."""

import importlib
import shutil

import pytest
from whole_runs import given, tree

MODELS = ("eval", "tools.crossplay", "tools.others", "tools.merge")  # have --model, and need none for this


@pytest.mark.parametrize("command", given("scripts"))
def test_bad_commands_are_one_line_and_change_nothing(command, model_dir, sft_adapter, tmp_path, refused):
    shutil.copytree(sft_adapter, tmp_path / "adapter")
    (tmp_path / "list").write_text("[]")
    before = tree(tmp_path)
    script, *argv = command.replace("FOLDER", str(tmp_path)).split()
    line = refused(importlib.import_module(script).main, argv + ["--model", model_dir] * (script in MODELS))
    assert tree(tmp_path) == before
    if f"{tmp_path}/list" in argv[-1:] and "--seeds" not in argv:
        assert f"{argv[-1]} exists already and is not overwritten" in line
