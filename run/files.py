"""Files of a run, signals and clocks: what every script shares. Needs no torch (but for `run_folder`)."""

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path

import filelock

from run.errors import InputError, library_errors, memory_errors
from run.threads import cores


def replace(old: Path, new: Path) -> None:
    """os.replace, a few times: Windows refuses it while a virus scanner or an editor has the file open."""
    for pause in (0.1, 0.2, 0.4, None):
        try:
            return os.replace(old, new)
        except PermissionError:
            if pause is None:
                raise
            time.sleep(pause)


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Writes the whole file or leaves the old one as it was. The temporary file of a path has always the same
    name, so the next write takes over what a killed one has left."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    with library_errors(f"cannot write {path}"):
        try:
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: str | os.PathLike, value) -> None:
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: str | os.PathLike):
    """InputError: the file is missing or is not JSON."""
    with library_errors(f"cannot read {path}"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    """The lines of a JSONL file that are whole objects; [] if there is no file. A kill may leave half a line,
    and neither a picture nor a resume must fail for it."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [row for row in rows if isinstance(row, dict)]


def refuse_existing(path: str | os.PathLike) -> None:
    """To be called before any work. InputError: the output file exists, or its folder does not."""
    if Path(path).exists():
        raise InputError(f"{path} exists already and is not overwritten; name another file or remove it")
    refuse_missing_folder(path)


def refuse_missing_folder(path: str | os.PathLike) -> None:
    """The same for a file that may be overwritten."""
    if not Path(path).parent.is_dir():
        raise InputError(f"the folder of {path} does not exist; make it first")


def lock(path: str | os.PathLike, taken: str):
    """A context manager that holds a lock on a file of this name. The death of the process frees it too.
    InputError with the text `taken`: another process has the lock."""
    with library_errors(f"cannot lock {path}"):
        Path(path).absolute().parent.stat()  # filelock would make a folder that is missing
        try:
            return filelock.FileLock(path).acquire(timeout=0)
        except filelock.Timeout:
            raise InputError(taken) from None


@contextmanager
def run_folder(folder: str | os.PathLike, flags: dict | None):
    """Inside the block, no other run can use the folder. Of several processes, the first one does all this.

    flags: what config.json is to hold; the folder of a new run is made, and may hold nothing. None for a run
    that is resumed. InputError: the folder holds something, or another process trains in it."""
    from run import ranks  # here, since it imports torch

    path = Path(folder)
    with ExitStack() as stack:
        with ranks.first_goes_first():
            if ranks.first():
                if flags is not None:
                    _make_folder(path)
                busy = f"another process is training in {path}; wait until it has ended"
                stack.enter_context(lock(path / ".lock", busy))
                if flags is not None:
                    write_json(path / "config.json", flags)
        yield path


def _make_folder(path: Path) -> None:
    # A run that failed before its first step leaves only these files, and nothing is lost with them.
    early = {"config.json", "config.json.tmp", ".lock"}
    with library_errors(f"cannot make the run folder {path}"):
        if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - early):
            advice = f"name another --out, or continue a run with --resume {path}"
            raise InputError(f"{path} already holds something and is not overwritten; {advice}")
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path} is a link to a folder that does not exist; name another --out")
        path.mkdir(parents=True, exist_ok=True)


# Stand in config.json beside the flags (settings.py).
RECORDED = {"versions", "chat_template_sha256", "expert_games_sha256", "sft_adapter_sha256"}


def resumed_flags(folder: str | os.PathLike, script: str) -> dict:
    """The flags of the run in a folder, as its config.json holds them."""
    config = read_json(Path(folder) / "config.json")
    if not isinstance(config, dict) or config.get("script") != script:
        raise InputError(f"{folder} is not a run of {script}: its config.json is not of that script")
    return config


class JsonLines:
    """An append-only log (JSONL).

    rows: the lines that the file had already and that `keeps` accepts. The others are removed, so that after
    a resume no step stands in it twice. count: how many lines the file has. writes: whether this process
    writes; of several, one does."""

    def __init__(self, path: Path, keeps: Callable[[dict], bool], writes: bool = True):
        self.path, self.rows = path, [row for row in read_lines(path) if keeps(row)]
        self.count = len(self.rows)
        if writes:
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        self.file = open(path if writes else os.devnull, "ab", buffering=0)

    def write(self, row: dict) -> None:
        data = (json.dumps(row) + "\n").encode()
        with library_errors(f"cannot write {self.path}"):
            while data:  # a disk that is almost full takes a part of it
                data = data[self.file.write(data) :]
        self.count += 1

    def sync(self) -> None:
        """What was written is on the disk when it returns."""
        if self.file.name != os.devnull:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Nothing can be written any more. Windows lets nobody replace a file that is open."""
        self.file.close()


class StopSignal:
    """Inside the block, Ctrl-C or SIGTERM sets `requested`: the step in progress is to end and be saved. A
    second one interrupts at once if it comes more than a second later (launchers may send one twice)."""

    def __enter__(self):
        self.requested = False
        self.old = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, number, frame):
        if self.requested:
            if time.monotonic() - self.time > 1:
                raise KeyboardInterrupt
            return
        self.requested, self.time = True, time.monotonic()
        if os.environ.get("RANK", "0") == "0":  # of several processes, one prints
            print("\nstopping after this step (again to stop at once, without saving) ...", file=sys.stderr)

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)


class Stopwatch:
    """Wall seconds by part of the work: `with clock("sample"): ...`."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str):
        started = time.perf_counter()
        with memory_errors(part):
            yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory_gib() -> float | None:
    """The most memory that this process has held; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == "darwin" else 2**20)


def print_times(folder: Path, clock: Stopwatch) -> None:
    """Prints the minutes of each part and the peak memory; writes them and the machine to timing.json."""
    minutes = ", ".join(f"{part} {seconds / 60:.1f} min" for part, seconds in clock.seconds.items())
    memory = peak_memory_gib()
    machine = f"{cpu_name()}, {cores()} cores, {platform.system()}, Python {platform.python_version()}"
    timing = {"seconds": clock.seconds, "peak_memory_gib": memory, "machine": machine}
    write_json(folder / "timing.json", timing)
    print(f"\ntime: {minutes}" + (f"; peak memory {memory:.1f} GiB" if memory else ""))
