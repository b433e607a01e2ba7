"""Flags: the fields of dataclasses as the flags of a script, and the flags of a run that is resumed.

@dataclass(frozen=True)
class LoRA:
    '''The adapter of each stage: h = W x + (alpha / r) B A x.'''

    title = "LoRA"
    rank: int = flag("--rank", 32, "LoRA rank r", values.number(int, 1, 4096))

add_flags(parser, LoRA)                      # the parser has --rank, in a group with this title and text
from_flags(LoRA, parser.parse_args())        # LoRA(rank=32)
"""

import argparse
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any

from run.errors import InputError
from run.files import RECORDED, resumed_flags


def flag(usage: str, default: Any, help: Any, type: Callable | None = None, **options: Any) -> Any:
    """A field that is a flag, with the same default. usage: as a manual writes it, `--name` or `--name WORD`,
    and `...` behind it if several values may be given; help: what it means; type: what makes a value of its
    text (run/values.py); options: what else argparse's add_argument takes, such as choices. Where help or
    choices depend on a table that may still grow, they are functions."""
    name, *words = usage.split()
    if "..." in words:
        words.remove("...")
        options["nargs"] = "+"
    if words:
        options["metavar"] = words[0]
    if type:
        options["type"] = type
    return field(default=default, metadata={"flag": name, "options": {"help": help, **options}})


def add_flags(parser: argparse.ArgumentParser, *kinds: Any) -> None:
    """A group of flags for each dataclass, with its title and its docstring. The fields that a class inherits
    are not in its group."""
    for kind in kinds:
        group = parser.add_argument_group(kind.title, kind.__doc__)
        for f in fields(kind):
            if "flag" in f.metadata and f.name in kind.__annotations__:
                options = dict(f.metadata["options"])
                for name in {"help", "choices"} & set(options):
                    options[name] = options[name]() if callable(options[name]) else options[name]
                group.add_argument(f.metadata["flag"], default=f.default, **options)


def from_flags(kind: Any, args: argparse.Namespace, **others: Any) -> Any:
    """The dataclass with the values of its flags; lists become tuples. others: fields with other values."""
    values = {}
    for f in fields(kind):
        if "flag" in f.metadata:
            value = getattr(args, f.metadata["flag"].removeprefix("--").replace("-", "_"))
            values[f.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values | others)


# -------------------- a run that is resumed


def parse_run(
    parser: argparse.ArgumentParser, script: str, presets: dict[str, dict], argv: list[str] | None = None
) -> tuple[argparse.Namespace, str | None]:
    """-> (the values of the flags, the run that is resumed). The values of the chosen preset are defaults;
    with --resume all values are those in its config.json, and a flag that is newer has its default."""
    known, _ = parser.parse_known_args(argv)
    folder, names = known.resume, {action.dest for action in parser._actions}
    if folder:
        print(f"continuing {folder} with the settings in its config.json (other flags do not count)")
        flags = resumed_flags(folder, script) | {"out": folder}
        if gone := sorted(set(flags) - names - {"script"} - RECORDED):
            advice = "continue it with the version of the code that it was made with"
            raise InputError(f"{folder} was made with settings that are gone ({', '.join(gone)}); {advice}")
        parser.set_defaults(**{name: flags[name] for name in flags if name not in names})
        argv = argv_of(parser, flags)
        known, _ = parser.parse_known_args(argv)
    preset = presets[known.preset]
    parser.set_defaults(**{name: value for name, value in preset.items() if name in names})
    return parser.parse_args(argv), folder


def argv_of(parser: argparse.ArgumentParser, values: dict) -> list[str]:
    """The command line that gives these values, so that the values of a file pass the checks of flags."""
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
