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
import tempfile
import time
from pathlib import Path

from games import MAX_AGENTS, GameError


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line that says what, and how to mend it."""


def reports_errors(main):
    """Decorator for a script's main: an InputError or GameError ends it with one line and exit status 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except (InputError, GameError) as e:
            print(f"error: {e}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("\ninterrupted; what was saved before can be continued with --resume", file=sys.stderr)
            raise SystemExit(130) from None
        except BrokenPipeError:  # for example `eval.py | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None

    return wrapped


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


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: an int or float from low to high."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
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
    """Writes the whole file or leaves the old one as it was."""
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent or ".", prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror}") from None


def write_json(path, value) -> None:
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path):
    """Raises InputError for a file that is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"cannot read {path}: {' '.join(str(e).split())}") from None


def refuse_existing(path) -> None:
    """To be called before any work: an output file that exists, or whose folder does not, is an
    InputError."""
    if Path(path).exists():
        raise InputError(f"{path} exists already and is not overwritten; name another file or remove it")
    if not Path(path).parent.is_dir():
        raise InputError(f"the folder of {path} does not exist; make it first")


def new_run_folder(folder: str, arguments: dict) -> Path:
    """Makes the folder of a new run and writes config.json into it. Refuses a folder that holds anything."""
    path = Path(folder)
    # (A folder with nothing but a config.json is that of a run that failed before its first step: nothing is
    # lost.)
    if path.exists() and (not path.is_dir() or any(entry.name != "config.json" for entry in path.iterdir())):
        raise InputError(
            f"{folder} already holds something and is not overwritten; name another --out, or continue a run "
            f"with --resume {folder}"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot make the run folder {folder}: {e.strerror}") from None
    write_json(path / "config.json", arguments)
    return path


def resumed_arguments(folder: str, script: str) -> dict:
    """The arguments of the run in a folder, which are the only settings a resumed run uses."""
    config = read_json(Path(folder) / "config.json")
    if not isinstance(config, dict) or config.get("script") != script:
        raise InputError(f"{folder} is not a run of {script}: its config.json is not of that script")
    return config


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
    """An append-only log. After a resume the lines of steps that will be done again are dropped, so that no
    step stands in the log twice. `writes` is False in all but one of several processes."""

    def __init__(self, path: Path, next_step: int = 0, writes: bool = True):
        self.file, kept = None, []
        if not writes:
            return
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] < next_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError):  # the half line of a run that was killed while writing
                    pass
        write_atomic(path, "".join(kept).encode())
        self.file = open(path, "a", encoding="utf-8")

    def write(self, value: dict) -> None:
        if self.file:
            self.file.write(json.dumps(value) + "\n")
            self.file.flush()


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
