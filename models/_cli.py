"""A frozen dataclass is its own command line, and a mistake of the user's is one line.

@dataclass(frozen=True, kw_only=True)
class Config:
    width: int = option(512, "features of the residual stream", least=1)

config = parse(Config, ["--width", "256"])
"""

import argparse
import dataclasses
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended


class Mistake(Exception):
    """Something the user can put right. Its text says what and how, on one line."""


def option(default: Any, help: str, **rules: Any) -> Any:
    """A field with its help text.

    Rules: `least`, `above` and `most` bound numbers, `choices` lists all that is allowed;
    `same=True` says that a run can only be resumed with the value it was started with.
    """
    return dataclasses.field(default=default, metadata={"help": help, **rules})


def parse[T](cls: type[T], argv: list[str] | None = None, *, command: str, about: str = "") -> T:
    """`cls` from `--name value` pairs. Raises `Mistake` for a value that breaks a rule."""
    parser = _Parser(prog=command, description=about, formatter_class=_Help, allow_abbrev=False)
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        parser.add_argument(f"--{field.name}", default=field.default, **_reader(field))
    argv = sys.argv[1:] if argv is None else argv
    config = cls(**vars(parser.parse_args([_underscored(word) for word in argv])))
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        value = getattr(config, field.name)
        for one in value if isinstance(value, tuple) else (value,):
            check(field.name, one, **field.metadata)
    return config


def check(name: str, value: Any, *, least=None, above=None, most=None, **_: Any) -> None:
    """Raises `Mistake` unless `value` is within the bounds given."""
    bounds = [f"at least {least}"] * (least is not None)
    bounds += [f"above {above}"] * (above is not None) + [f"at most {most}"] * (most is not None)
    if not isinstance(value, int | float):
        return
    fits = math.isfinite(value) and (least is None or value >= least)
    if not (fits and (above is None or value > above) and (most is None or value <= most)):
        raise Mistake(f"--{name} must be {' and '.join(bounds) or 'a finite number'}, got {value}")


def check_multiple(name: str, value: int, of: str, unit: int) -> None:
    """Raises `Mistake` unless `unit` divides `value`."""
    if value % unit:
        low = value // unit * unit
        near = f"{low} or {low + unit}" if low else str(unit)
        raise Mistake(f"--{name} {value} is no multiple of {of} ({unit}): try {near}")


def fixed(config: Any) -> dict[str, Any]:
    """The values that a run must be resumed with (`same=True`)."""
    fields = [field for field in dataclasses.fields(config) if field.metadata.get("same")]
    return {f"--{field.name}": getattr(config, field.name) for field in fields}


def shell_command(module: str, config: Any) -> str:
    """What to type for a run with `config`."""
    python = Path(sys.executable)
    here = python.is_relative_to(Path.cwd())
    words = [str(python.relative_to(Path.cwd()) if here else python), "-m", module]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{field.name}" if value else f"--no-{field.name}")
        else:
            words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def stopped(module: str, config: Any, where: str) -> int:
    """Says after Ctrl-C where things are and how to go on; the exit code."""
    again = shell_command(module, dataclasses.replace(config, resume=True))
    print(f"Stopped. {where}; go on with\n  {again}")
    return INTERRUPTED


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main`, turns a `Mistake` or Ctrl-C into one line on stderr, and exits."""
    try:
        sys.exit(main() or 0)
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # the disk is full, a file went away
        if isinstance(error, BrokenPipeError):  # the reader of our output did (`| head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Mistake(f"{message}; `{self.prog} --help` lists every flag")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if all(action.default is not none for none in (None, (), False, argparse.SUPPRESS)):
            value = action.default
            value = os.path.relpath(value) if action.type is Path else value
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            text += f" (default: {shown})"
        return text.replace("%", "%%")


def _underscored(word: str) -> str:
    """`--learning-rate=1` as `--learning_rate=1`: both ways to write a flag are common."""
    name, equals, value = word.partition("=")
    negation = "--no-"
    if not name.startswith("--") or " " in name:
        return word
    start = negation if name.startswith(negation) else "--"
    return start + name[len(start) :].replace("-", "_") + equals + value


def _reader(field: dataclasses.Field) -> dict[str, Any]:
    """How argparse reads one field."""
    text = {"help": field.metadata["help"]}
    if field.type is bool:
        return text | {"action": argparse.BooleanOptionalAction}
    kind: Any = (get_args(field.type) or (field.type,))[0]  # of `tuple[Path, ...]`, `Path | None`
    text |= {"nargs": "+", "action": _Tuple} if get_origin(field.type) is tuple else {}
    return text | {
        "type": kind,
        "choices": field.metadata.get("choices"),
        "metavar": None if "choices" in field.metadata else kind.__name__.upper(),
    }


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        del parser, option_string
        setattr(namespace, self.dest, tuple(values))  # pyright: ignore[reportArgumentType]
