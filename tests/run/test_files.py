"""Run folders and logs: what is refused and left as it was, what a kill leaves, full disks, terminals."""

import ast
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from whole_runs import ROOT, lines_of, tree

from lora import LoRAConfig
from models import adapters
from run import checkpoint, files
from run.curves import plot_curves
from run.errors import InputError, library_errors, reports_errors
from run.files import JsonLines, write_atomic


def refuses(message, folder, flags):
    with pytest.raises(InputError, match=message), files.run_folder(folder, flags):
        raise AssertionError


def test_a_folder_that_holds_something_is_refused_and_unchanged(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine too")
    for name in ("used", "file"):
        refuses(f"{name} already holds something and is not overwritten; name", tmp_path / name, {})
    assert tree(tmp_path) == {"used/notes.txt": b"mine", "file": b"mine too"}


def test_a_folder_that_is_empty_or_of_a_run_without_a_step_is_taken(tmp_path):
    for name in ("empty", "failed"):
        (tmp_path / name).mkdir()
    for file in ("config.json", "config.json.tmp", ".lock"):  # the second one by a kill
        (tmp_path / "failed" / file).write_text("{}")
    for name in ("empty", "failed", "a/new/one"):
        with files.run_folder(tmp_path / name, {"agents": (3, 4)}) as folder:
            assert files.read_json(folder / "config.json") == {"agents": [3, 4]}
        assert tree(folder).keys() - {".lock"} == {"config.json"}  # what a kill left was taken over


@pytest.mark.parametrize("name", ["x" * 300, "nul\0"], ids=["long", "nul"])
@pytest.mark.parametrize("flags", [{}, None], ids=["new", "resumed"])
def test_names_that_no_file_has_are_one_line(name, flags, tmp_path):
    refuses("^cannot ", tmp_path / name, flags)


def test_a_resume_of_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, text in (("broken", "{"), ("list", "[]"), ("other", '{"script": "train_sft.py"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    for name in ("empty", "missing", "broken", "list", "other"):
        with pytest.raises(InputError, match=name):
            files.resumed_flags(tmp_path / name, "train_rft.py")
    assert files.resumed_flags(tmp_path / "other", "train_sft.py") == {"script": "train_sft.py"}


def test_a_run_folder_is_of_one_process_at_a_time(tmp_path):
    """(That the death of a process frees it, too: test_a_run_that_was_killed_ends_the_same.)"""
    with files.run_folder(tmp_path / "run", {}):
        for flags in (None, {"a": 1}):  # a resume, and a second start of the same command
            refuses("another process is training in", tmp_path / "run", flags)
        assert files.read_json(tmp_path / "run" / "config.json") == {}
    with files.run_folder(tmp_path / "run", None) as folder:
        assert folder == tmp_path / "run"


@pytest.fixture
def disk(tmp_path):
    """A folder that holds 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no small disk can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_one_line_and_costs_nothing(disk):
    p, name = torch.nn.Parameter(torch.ones(2, 4)), "base_model.model.x.lora_A.weight"
    optimizer, config = torch.optim.AdamW([p], lr=0.1), LoRAConfig(2, 4, ("x",))
    p.sum().backward()
    optimizer.step()
    old, new = {name: p.detach().clone()}, {name: torch.zeros(2, 20_000)}
    checkpoint.save(disk, 1, {"p": p}, optimizer, {"memory": {}})
    adapters.write_adapter(disk / "adapter", old, config)
    log = JsonLines(disk / "log.jsonl", lambda row: True)
    log.write({"step": 0})
    (disk / "other").write_bytes(b"x" * 8192)
    before = {k: v for k, v in tree(disk).items() if k != "log.jsonl"}
    writers = {
        "log.jsonl": lambda: [log.write({"step": 1, "text": "x" * 1000}) for _ in range(100)],
        "step-000002": lambda: checkpoint.save(disk, 2, new, optimizer, {}),
        "adapter_model.safetensors": lambda: adapters.write_adapter(disk / "adapter", new, config),
        "new.json": lambda: write_atomic(disk / "new.json", b"x" * 100_000),
    }
    for file, write in writers.items():
        with pytest.raises(InputError, match=rf"{file}.*No space left"):
            write()
    left = tree(disk)
    assert left | before == left and not [file for file in left if "step-000002/" in file or ".tmp" in file]
    assert log.count == left["log.jsonl"].count(b"\n")  # the line of which a part was written does not count
    p.data.zero_()
    assert checkpoint.restore(disk, {"p": p}, optimizer) == (1, {"memory": {}}) and torch.equal(p, old[name])
    assert torch.equal(adapters.read_adapter(disk / "adapter")[0][name], old[name])
    (disk / "other").unlink()
    again = JsonLines(disk / "log.jsonl", lambda row: row["step"] < 1)  # what a resume does, with room again
    again.write({"step": 1})
    assert [line["step"] for line in lines_of(disk / "log.jsonl")] == [0, 1]


def test_a_file_that_another_process_has_open_is_replaced_when_it_is_closed(tmp_path, monkeypatch):
    """As on Windows, where a virus scanner may have it."""
    times, replace = [1, 1, 0, *[1] * 9], os.replace

    def refusing(old, new):
        if times.pop(0):
            raise PermissionError(13, "The process cannot access the file")
        replace(old, new)

    monkeypatch.setattr(os, "replace", refusing)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and len(times) == 9
    with pytest.raises(InputError, match="cannot write .*a: The process cannot access the file"):
        write_atomic(tmp_path / "a", b"newer")
    assert tree(tmp_path) == {"a": b"new"}


FOLDERS = "bridges docs fast models play run teachers tools variants world".split()
SOURCES = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]


def test_every_text_file_has_its_encoding_named():
    """Else it would be that of the machine, on Windows not UTF-8."""
    nodes = [(path, node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    named = 0
    for path, call in nodes:
        if not isinstance(call, ast.Call):
            continue
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        name = ast.unparse(call.func).rpartition(".")[2]
        opens = ast.unparse(call.func) == "open" and not re.search("'[rwax+]*b[rwax+]*'", ast.unparse(call))
        assert keywords.get("text") != "True", f"{path}: {ast.unparse(call)}"
        if opens or name in ("read_text", "write_text"):
            assert "encoding" in keywords, f"{path}: {ast.unparse(call)}"
            named += 1
    assert len(SOURCES) > 60 and named > 10


def printing(stdout, text="the results", **environment):
    """A script that prints a line to `stdout`, which is buffered: (exit status, standard error)."""
    code = f"from run.errors import reports_errors; reports_errors(lambda: print({ascii(text)}))()"
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | environment
    how = dict(cwd=ROOT, env=buffered, stdout=stdout, stderr=subprocess.PIPE, text=True)
    done = subprocess.run([sys.executable, "-c", code], **how)
    return done.returncode, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
def test_a_full_disk_behind_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        status, err = printing(full)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_output_that_nobody_reads_on_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    assert printing(writer) == (1, "")
    os.close(writer)


def test_what_a_terminal_cannot_show_is_no_error(tmp_path):
    """A name of a folder, or a model's reply, on Windows; bytes of a name that are no UTF-8."""
    cases = [("cp1252", "\u0394 \xb1", b"\\u0394 \xb1"), ("utf-8", "\udcff", b"\\udcff")]
    for encoding, text, shown in cases:
        with open(tmp_path / encoding, "w") as file:
            assert printing(file, text, PYTHONIOENCODING=encoding) == (0, "")
        assert (tmp_path / encoding).read_bytes().rstrip() == shown


@pytest.mark.parametrize("closed, said", [(1, b"e"), (2, b"a\nb\n")], ids=["output", "error"])
def test_without_standard_output_or_error_a_script_runs_to_its_end(closed, said, tmp_path):
    """Closed when it was started, as by `>&-`: a file that is opened later must not take its place, and what
    is meant for it must not come out of the other one."""
    code = "from run.errors import reports_errors; from tqdm import tqdm\n@reports_errors\ndef main():\n"
    code += "    f = open('file', 'w'); print('a', flush=True); tqdm.write('b'); f.write('c')\n"
    code += "    import os, sys; print(end='e', file=sys.stderr, flush=True)\n"
    code += f"    os.write({closed}, b'of a library in C')\nmain()"
    command = f'{sys.executable} -c "$0" {closed}>&-'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    how = dict(cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    done = subprocess.run(["bash", "-c", command, code], **how)
    assert (done.returncode, done.stdout + done.stderr) == (0, said)
    assert (tmp_path / "file").read_text() == "c"


FULL = [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")]
FULL += map(
    RuntimeError, ["DefaultCPUAllocator: can't allocate memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"]
)


@pytest.mark.parametrize("error", FULL)
def test_running_out_of_memory_is_one_line_that_names_the_stage(capsys, error):
    @reports_errors
    def main():
        with files.Stopwatch()("SFT"):
            raise error

    with pytest.raises(SystemExit):
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory in SFT (") and "--micro-batch" in line
    with pytest.raises(RuntimeError, match="another"):
        reports_errors(lambda: exec("raise RuntimeError('another')"))()


def test_a_link_to_nothing_is_no_run_folder(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    refuses("run is a link to a folder that does not exist", tmp_path / "run", {})


def test_a_log_that_cannot_be_drawn_costs_no_run(tmp_path, capsys):
    (tmp_path / "curves.png").write_bytes(b"old")
    (tmp_path / "probe.jsonl").write_text('{"stage": "SFT"}\n')
    plot_curves(tmp_path)
    assert capsys.readouterr().out == f"no {tmp_path / 'curves.png'}: 'seconds'\n"
    assert (tmp_path / "curves.png").read_bytes() == b"old"


def test_errors_of_strangers_cannot_steer_the_terminal(capsys):
    @reports_errors
    def main():
        with library_errors("the server"):
            raise ValueError("\x1b]0;owned\x07\x1b[2J and\na second line \ud800")

    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "error: the server: ?]0;owned??[2J and a second line ?\n"
