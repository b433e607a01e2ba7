"""Runs on the tiny model in forks of a process that has done one already, so that a start takes no time, and
a hook on everything that a process does to the files of a folder.
"""

import builtins
import errno
import io
import os
import shutil
import signal
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
import whole_runs
from tqdm import tqdm
from whole_runs import Run, ended, results, rft_flags, start, tree

import train_sft
from play import probe
from run import stage

SMALL = dict(sft_steps=2, sft_batch=1, steps=3, eval_games=1, max_new_tokens=6)
SMALL |= dict(games=2, prompts=[1, 1], rank=2)


def prepare(root):
    """Folder and model of the campaign; runs here, and in every fork, are small and draw no picture."""
    from tiny import make_tiny_model

    torch.set_num_threads(1)  # threads of a parent are not there in its forks
    tqdm.set_lock(threading.RLock())  # the usual one is of all forks together, and a killed one would keep it
    small = [(stage, "SAVE_EVERY", 1), (train_sft, "HELD_OUT_GAMES", 1), (probe, "GAMES", 1)]
    whole_runs.REPLACED += small + whole_runs.WITHOUT_CURVES
    whole_runs.on_device("cpu")
    make_tiny_model(root / "model")
    global MODEL
    MODEL = root / "model"
    whole_runs.run_rft(flags(root / "warm"))  # so that forks need not import what is imported late


def flags(folder, **changes):
    return rft_flags(MODEL, folder, **SMALL | changes)


@contextmanager
def new_folder():
    folder = tempfile.mkdtemp(prefix="case-", dir=MODEL.parent)
    yield Path(folder)
    shutil.rmtree(folder, ignore_errors=True)


def fork(argv, output, **more):
    """-> (exit status, what it said), of one process to its end."""
    Path(output).write_text("")
    (status,) = ended(start(list(map(str, argv)), output, method="fork", **more), 120)
    return status, Path(output).read_text(errors="replace")


def finish(run, before=None, ranks=1):
    """What a user does after a crash: --resume, or the same command if nothing was begun."""
    begun = (run / "config.json").exists()
    output = run.parent / "said"
    output.write_text("")
    argv = ["--resume", str(run)] if begun else flags(run)
    statuses = ended(start(argv, output, ranks, method="fork", before=before), 120)
    return max(statuses, key=abs), output.read_text(errors="replace")


def wrong(status, said, allowed=(0, 2)):
    """What is wrong with the end of a process: None, or in words. An error is one line, and no traceback."""
    if "Traceback" in said:
        return f"traceback: {said.strip().splitlines()[-1][:150]}"
    if status not in allowed:
        return f"exit status {status}: {said[-150:]!r}"
    if status == 2 and said.count("error:") != 1:
        return f"{said.count('error:')} lines of error: {said[-150:]!r}"


def not_the_same(run, full, status_and_said):
    """None where the run has ended as the one that was never stopped, and has left no other file."""
    bad = wrong(*status_and_said, allowed=(0,))
    if bad:
        return f"after the crash: {bad}"
    a, b = results(Run(run)), results(Run(full))
    differ = [name for name in b if a[name] != b[name]]
    litter = sorted(set(tree(run)) - set(tree(full)))
    return f"differs in {differ}, litter {litter}" if differ or litter else None


class Watch:
    """From now on this process counts what it does to the files of a folder: open for writing, mkdir, write,
    half of a write, fsync, rename, unlink, rmdir. At the operation `at` it does `act`: a signal's number (the
    process gets it), an errno (the operation fails with it; for ENOSPC all that take room after it too).
    count: a file that gets a line for each."""

    def __init__(self, folder, at=None, act=None, count=None):
        self.folder, self.at, self.act, self.done = str(folder), at, act, 0
        self.count = os.open(count, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if count else None
        self.full = False
        sys.addaudithook(self.hear)
        fsync, real = os.fsync, builtins.open

        def watched_fsync(fd):
            self.touch("fsync", self.folder)
            fsync(fd)

        def watched_open(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *more):
            if not set(mode) & set("wax") or not self.inside(file):
                return real(file, mode, buffering, encoding, errors, newline, *more)
            raw = Watched(self, os.fspath(file), mode.replace("b", "").replace("t", ""))
            buffered = raw if buffering == 0 else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        os.fsync, builtins.open, io.open = watched_fsync, watched_open, watched_open

    def inside(self, path):
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.folder)

    def hear(self, event, args):
        if event == "open" and args[2] and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            if self.inside(args[0]):
                self.touch("open", args[0])
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            if self.inside(args[0]) or (event in ("os.remove", "os.rmdir") and args[1] != -1):  # of rmtree
                self.touch(event, args[0])

    def touch(self, what, path, first=lambda: None):
        number, self.done = self.done, self.done + 1
        if self.count is not None:
            os.write(self.count, f"{what} {path}\n".encode())
        if number == self.at:
            first()
            self.full = self.act == errno.ENOSPC
            if isinstance(self.act, signal.Signals):
                os.kill(os.getpid(), self.act)
            else:
                raise OSError(self.act, os.strerror(self.act))
        elif self.full and what in ("open", "write", "os.mkdir", "fsync"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Watched(io.FileIO):
    def __init__(self, watch, *args):
        super().__init__(*args)
        self.watch = watch

    def write(self, data):
        half = lambda: io.FileIO.write(self, bytes(data)[: len(data) // 2])
        self.watch.touch("write", self.name)
        self.watch.touch("half a write", self.name, half)
        return super().write(data)
