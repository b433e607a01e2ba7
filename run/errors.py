"""Errors that a user can mend, and how a script reports them. This module needs no other of the project."""

import functools
import os
import re
import sys
from contextlib import contextmanager


class InputError(ValueError):
    """Something that the user gave is wrong. The message is one line, which says what and how to mend it."""


def refuse(applies: object, text: str) -> None:
    """Raises InputError with this text where it applies."""
    if applies:
        raise InputError(text)


def one_line(text, longest: int = 300) -> str:
    """The text of an error or of a server on one line of at most `longest` characters. Control characters,
    with which a file or a server could steer the user's terminal, become question marks."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    return (line or type(text).__name__) if len(line) <= longest else line[: longest - 3] + "..."


@contextmanager
def library_errors(what: str, advice: str = ""):
    """Turns whatever a library raises inside the block into an InputError: "WHAT: its own words ADVICE"."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        raise InputError(f"{what}: {one_line(getattr(e, 'strerror', None) or e)}{advice}") from e


def out_of_memory(e: Exception) -> bool:
    """Whether this says that the memory of the CPU or of a GPU is full."""
    return isinstance(e, MemoryError) or bool(re.search("out of memory|allocate memory|ALLOC_FAILED", str(e)))


@contextmanager
def memory_errors(what: str):
    """Turns running out of memory inside the block, of the CPU or of a GPU, into an InputError."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as e:  # OSError: of a file that is mapped into memory
        if not out_of_memory(e):
            raise
        advice = "less is needed with a smaller --micro-batch, --m or --prompts, or with --dtype bfloat16"
        raise InputError(f"out of memory in {what} ({one_line(e, 120)}); {advice}") from e


def reports_errors(main):
    """Decorator for a script's main: an error that is not the fault of the code ends the script with one line
    and exit status 2. An OSError is one that no library_errors has named, such as a full disk behind standard
    output."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        for name in ("stdout", "stderr"):  # None if it was closed when the script was started
            if getattr(sys, name) is None:
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        if hasattr(sys.stdout, "reconfigure"):  # the terminal of Windows does not know all characters
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with memory_errors("this script"):
                main(*args, **kwargs)
            print(end="", flush=True)  # the rest of the output may not fit on the disk either
        except KeyboardInterrupt:
            advice = "training goes on with --resume, other scripts with the same command"
            print(f"\ninterrupted; what was saved before is kept: {advice}", file=sys.stderr)
            raise SystemExit(130) from None
        except BrokenPipeError:  # for example `eval.py | head`
            _drop_output()
            raise SystemExit(1) from None
        except (InputError, OSError) as e:
            print(f"error: {one_line(e, 2000)}", file=sys.stderr)
            try:
                print(end="", flush=True)
            except OSError:
                _drop_output()
            raise SystemExit(2) from None

    return wrapped


def _drop_output() -> None:
    """Discards what is left of standard output. Python would try to write it again at exit, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
