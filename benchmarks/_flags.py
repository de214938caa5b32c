"""Flags of the benchmarks: lists with commas, whose parts are checked one by one."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def many(item: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(dict.fromkeys(item(part.strip()) for part in text.split(",")))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 up, got {text!r}")
    return int(text)


def _number(text: str, least: float, most: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = least
    if not least < value <= most:
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
    return value


def density(text: str) -> float:
    return _number(text, 0, 1, "a density above 0, at most 1")


def fraction(text: str) -> float:
    return _number(text, 0, 1, "a fraction above 0, at most 1")


def seconds(text: str) -> float:
    return _number(text, 0, 3600, "seconds above 0, at most 3600")


def shape(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected KxM, such as 1024x4096, got {text!r}")
    return int(parts[0]), int(parts[1])


def one_of(known: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}, got {text!r}")
        return text

    return parse
