"""A dataclass as a command line; mistakes as one line."""

import dataclasses
import shlex
import sys
from pathlib import Path

import pytest

from models._cli import (
    INTERRUPTED,
    Mistake,
    check_multiple,
    fixed,
    option,
    parse,
    run_main,
    shell_command,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    data: tuple[Path, ...] = option((), "some files")
    share: float = option(0.5, "between 0 and 100%", above=0, most=1, same=True)
    steps: int = option(3, "how many", least=1)
    learning_rate: float = option(0.1, "how fast", same=True)
    resume: bool = option(False, "go on")
    kind: str = option("a", "which", choices=("a", "b"))
    shares: tuple[float, ...] = option((0.5, 1.0), "several", above=0, most=1)
    kinds: tuple[str, ...] = option(("a",), "several", choices=("a", "b"))
    folder: Path | None = option(None, "maybe one")  # noqa: RUF009


def read(*argv):
    return parse(Config, list(argv), command="python -m it")


def test_every_field_is_a_flag():
    given = ["--data", "a.txt", "b c", "--share", "1", "--steps=7", "--resume", "--kind", "b"]
    assert read(*given) == Config(
        data=(Path("a.txt"), Path("b c")), share=1.0, steps=7, resume=True, kind="b"
    )


def test_several_values_and_none():
    assert read().folder is None
    assert read("--folder", "a b").folder == Path("a b")
    given = read("--shares", "1", "0.25", "--kinds", "b", "a")
    assert (given.shares, given.kinds) == ((1.0, 0.25), ("b", "a"))
    for argv, message in {
        "--shares 0.5 2": r"^--shares must be above 0 and at most 1, got 2\.0$",
        "--kinds a c": "argument --kinds: invalid choice: 'c'",
        "--shares": "argument --shares: expected at least one argument",
    }.items():
        with pytest.raises(Mistake, match=message):
            read(*argv.split())


def test_without_flags_the_defaults_hold():
    assert read() == Config()


@pytest.mark.parametrize("flag", ["--learning_rate", "--learning-rate"])
def test_flags_are_written_either_way(flag):
    assert read(flag, "1e-3").learning_rate == read(f"{flag}=1e-3").learning_rate == 1e-3


def test_a_value_may_hold_dashes():
    assert read("--data", "a-b", "--data=--c-d").data == (Path("--c-d"),)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--share", "0"], r"^--share must be above 0 and at most 1, got 0\.0$"),
        (["--share", "1.5"], r"^--share must be above 0 and at most 1, got 1\.5$"),
        (["--share", "nan"], r"^--share must be above 0 and at most 1, got nan$"),
        (["--learning_rate", "inf"], r"^--learning_rate must be a finite number, got inf$"),
        (["--steps", "0"], r"^--steps must be at least 1, got 0$"),
        (
            ["--steps", "many"],
            r"argument --steps: invalid int value: 'many'; `python -m it --help`",
        ),
        (["--kind", "c"], r"argument --kind: invalid choice: 'c' .*--help` lists every flag$"),
        (["--stepz", "3"], r"unrecognized arguments: --stepz 3; `python -m it --help`"),
        (["--step", "3"], r"unrecognized arguments: --step 3; "),  # no abbreviations
        (["--data"], r"argument --data: expected at least one argument"),
    ],
)
def test_a_bad_value_is_named(argv, message):
    with pytest.raises(Mistake, match=message):
        read(*argv)


def test_multiples():
    check_multiple("width", 128, "--block", 64)
    with pytest.raises(Mistake, match=r"^--width 100 is no multiple of --block \(64\): try 64 or "):
        check_multiple("width", 100, "--block", 64)
    with pytest.raises(Mistake, match=r"^--width 10 is no multiple of --block \(64\): try 64$"):
        check_multiple("width", 10, "--block", 64)


def test_help_shows_each_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        read("--help")
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert "between 0 and 100% (default: 0.5)" in text
    assert "some files\n" in text  # no default worth showing
    assert all(f"--{field.name}" in text for field in dataclasses.fields(Config))


def test_the_command_leads_back_to_the_config():
    config = Config(data=(Path("a b"), Path("c")), resume=True, steps=9)
    python, *words = shlex.split(shell_command("models.it", config))
    assert Path(python).samefile(sys.executable)
    assert words[:2] == ["-m", "models.it"]
    assert read(*words[2:]) == config


def test_what_must_stay_the_same():
    assert fixed(Config(steps=9)) == {"--share": 0.5, "--learning_rate": 0.1}


def mistaken():
    raise Mistake("do this instead")


def unwritable():
    Path(sys.executable, "below").write_text("")


def interrupted():
    raise KeyboardInterrupt  # what Ctrl-C is in Python; a job in the background ignores the signal


@pytest.mark.parametrize(
    ("main", "code", "line"),
    [
        (mistaken, 2, "error: do this instead\n"),
        (unwritable, 2, f"error: {Path(sys.executable, 'below')}: Not a directory\n"),
        (interrupted, INTERRUPTED, "\ninterrupted\n"),
        (lambda: 7, 7, ""),
        (lambda: None, 0, ""),
    ],
)
def test_the_end_of_a_program(main, code, line, capsys):
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)
