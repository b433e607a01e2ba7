"""Files of a run, and errors a user can mend: what every script shares. Needs neither torch nor
transformers.
"""

import argparse
import functools
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import filelock

from games import MAX_AGENTS, GameError


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line that says what, and how to mend it."""


def one_line(text, longest: int = 300) -> str:
    """What an error or a server says, on one line. Control characters, with which a file or a server could
    steer the user's terminal, become ?."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    return (line or type(text).__name__) if len(line) <= longest else line[: longest - 3] + "..."


@contextmanager
def library_errors(what: str, advice: str = "", kind: type[InputError] = InputError):
    """Whatever a library raises inside, of whatever type, becomes an InputError: WHAT, its words, ADVICE."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        raise kind(f"{what}: {one_line(getattr(e, 'strerror', None) or e)}{advice}") from e


def reports_errors(main):
    """Decorator for a script's main: an error that is no fault of the code ends it with one line and exit
    status 2. OSError is for what no library_errors has named, such as standard output on a full disk."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            main(*args, **kwargs)
            print(end="", flush=True)  # what is left in the buffer may not fit on the disk either
        except KeyboardInterrupt:
            advice = "training goes on with --resume, other scripts with the same command"
            print(f"\ninterrupted; what was saved before is kept: {advice}", file=sys.stderr)
            raise SystemExit(130) from None
        except BrokenPipeError:  # for example `eval.py | head`
            _drop_output()
            raise SystemExit(1) from None
        except (InputError, GameError, OSError) as e:
            print(f"error: {one_line(e, 2000)}", file=sys.stderr)
            try:
                print(end="", flush=True)
            except OSError:
                _drop_output()
            raise SystemExit(2) from None

    return wrapped


def _drop_output() -> None:
    """Else the end of the process would try once more to write it, and tell of that."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse_range(text: str) -> tuple[int, int]:
    """`4` -> (4, 4), `4-8` -> (4, 8); for argparse."""
    low, dash, high = text.partition("-")
    try:
        a, b = int(low), int(high) if dash else int(low)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number such as 4 or a range such as 4-8"
        ) from None
    if not 2 <= a <= b <= MAX_AGENTS:
        raise argparse.ArgumentTypeError(f"{text!r} must rise, and a game needs 2 to {MAX_AGENTS} agents")
    return a, b


def number(kind: type, low: float, high: float = math.inf, above: bool = False):
    """An argparse type: an int or float from low (or, with `above`, from anything above it) to high."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)) or (above and value == low):
            least = f"{'above' if above else 'at least'} {low}"
            bounds = least if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole' if kind is int else 'a'} number {bounds}"
            )
        return value

    return parse


positive_int = number(int, 1)
seed_int = number(int, 0)
share = number(float, 0, 1)


def seat_choice(*words: str):
    """An argparse type: a seat, counted from 0, or one of the words."""
    return lambda text: text if text in words else seed_int(text)


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Writes the whole file or leaves the old one as it was. The file that is renamed at the end always has
    the same name, so what a kill leaves of it is taken over by the next write."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    with library_errors(f"cannot write {path}"):
        try:
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path, value) -> None:
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path):
    """Raises InputError for a file that is missing or not JSON."""
    with library_errors(f"cannot read {path}"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    """Of a JSONL file, the lines that are whole objects: a kill may leave half a line, and a picture or a
    resume must not cost the user a long run."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [row for row in rows if isinstance(row, dict)]


def refuse_existing(path) -> None:
    """To be called before any work: an output file that exists, or whose folder does not, is an
    InputError."""
    if Path(path).exists():
        raise InputError(f"{path} exists already and is not overwritten; name another file or remove it")
    if not Path(path).parent.is_dir():
        raise InputError(f"the folder of {path} does not exist; make it first")


def lock(path: str | os.PathLike, taken: str):
    """Holds a lock on a file of this name, which the death of the process frees too. A context manager;
    raises InputError, which says `taken`, where another process has it."""
    with library_errors(f"cannot lock {path}"):
        Path(path).absolute().parent.stat()  # filelock would make a folder that is not there
        try:
            return filelock.FileLock(path).acquire(timeout=0)
        except filelock.Timeout:
            raise InputError(taken) from None


@contextmanager
def run_folder(folder: str, arguments: dict | None):
    """Inside, the run folder is this process's alone. arguments: what config.json says of a new run, whose
    folder is made and may hold nothing; None for one that is resumed."""
    path = Path(folder)
    # (A run that failed before its first step leaves no more than these, and nothing is lost with them.)
    early = {"config.json", "config.json.tmp", ".lock"}
    if arguments is not None:
        if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - early):
            advice = f"name another --out, or continue a run with --resume {folder}"
            raise InputError(f"{folder} already holds something and is not overwritten; {advice}")
        with library_errors(f"cannot make the run folder {folder}"):
            path.mkdir(parents=True, exist_ok=True)
    with lock(path / ".lock", f"another process is training in {folder}; wait until it has ended"):
        if arguments is not None:
            write_json(path / "config.json", arguments)
        yield path


def resumed_arguments(folder: str, script: str) -> dict:
    """The arguments of the run in a folder, which are the only settings a resumed run uses."""
    config = read_json(Path(folder) / "config.json")
    if not isinstance(config, dict) or config.get("script") != script:
        raise InputError(f"{folder} is not a run of {script}: its config.json is not of that script")
    return config


def argv_of(parser: argparse.ArgumentParser, values: dict) -> list[str]:
    """The command line that gives these values, so that those of a file pass the checks of flags."""
    argv = []
    for action in parser._actions:
        value = values.get(action.dest)
        if action.dest not in values or (value is None and action.default is None):
            continue
        if type(value) is bool and action.nargs == 0:
            argv.append(action.option_strings[not value])  # --belief, --no-belief
        elif action.nargs in (None, 0):
            text = "-".join(map(str, value)) if isinstance(value, list) else value  # a range of agents
            argv.append(f"{action.option_strings[0]}={text}")
        else:
            argv += [action.option_strings[0], *map(str, value if isinstance(value, list) else [value])]
    return argv


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory_gib() -> float | None:
    """The most memory that this process has held; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == "darwin" else 2**20)


class JsonLines:
    """An append-only log. Of the lines that it has already, those are kept that `keeps` says; so after a
    resume no step stands in it twice. `writes` is False in all but one of several processes."""

    def __init__(self, path: Path, keeps: Callable[[dict], bool], writes: bool = True):
        self.path, self.file = path, None
        self.rows = [row for row in read_lines(path) if keeps(row)]
        self.count = len(self.rows)
        if writes:
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
            self.file = open(path, "ab", buffering=0)

    def write(self, value: dict) -> None:
        if self.file:
            data = (json.dumps(value) + "\n").encode()
            with library_errors(f"cannot write {self.path}"):
                while data:  # a disk that is almost full takes a part
                    data = data[self.file.write(data) :]
            self.count += 1

    def sync(self) -> None:
        """What was written is on the disk when it returns."""
        if self.file:
            os.fsync(self.file.fileno())


class StopSignal:
    """Ctrl-C (or SIGTERM) asks for a stop: the step in progress ends and is saved. A second one stops at once
    (if it comes more than a second later: launchers may send one signal twice)."""

    def __enter__(self):
        self.requested = False
        self.old = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame):
        if self.requested:
            if time.monotonic() - self.asked > 1:
                raise KeyboardInterrupt
            return
        self.requested, self.asked = True, time.monotonic()
        if os.environ.get("RANK", "0") == "0":  # several processes: one speaks
            print("\nstopping after this step (again to stop at once, without saving) ...", file=sys.stderr)

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)


class Stopwatch:
    """Wall seconds by stage."""

    def __init__(self):
        self.seconds: dict[str, float] = {}  # in all
        self.last: dict[str, float] = {}  # of the last time

    def __call__(self, stage: str) -> "Stopwatch":
        self.stage = stage
        return self

    def __enter__(self):
        self.started = time.perf_counter()

    def __exit__(self, *_):
        elapsed = time.perf_counter() - self.started
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + elapsed
        self.last[self.stage] = elapsed


def print_times(folder: Path, clock: Stopwatch) -> None:
    """The minutes of each stage and the peak memory, on the screen and, with the machine, in timing.json."""
    minutes = ", ".join(f"{stage} {seconds / 60:.1f} min" for stage, seconds in clock.seconds.items())
    memory = peak_memory_gib()
    machine = f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    timing = {"seconds": clock.seconds, "peak_memory_gib": memory, "machine": machine}
    write_json(folder / "timing.json", timing)
    print(f"\ntime: {minutes}" + (f"; peak memory {memory:.1f} GiB" if memory else ""))
