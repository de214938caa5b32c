"""Results of runs as JSON lines: each is on the disk as soon as it is known, and is not run again.

A line holds the settings that decide a result, the result, and where it was found.
"""

import collections
import concurrent.futures
import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models._cli import Mistake

CHECKOUT = Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "optax", "numpy")
BINS = 200  # numbers that the losses of a run are kept as


def whereabouts(command: str) -> dict[str, Any]:
    """The command, the commit, the versions and the device of a run."""
    device = jax.devices()[0]
    return {
        "command": command,
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "device": device.device_kind,
        "platform": device.platform,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
    }


class Runs:
    """The lines of a file. Without `resume` an older file is put aside as `NAME-before.jsonl`."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path, self._found = path, {}
        if resume:
            self._read()
        elif path.exists():
            path.replace(path.with_name(f"{path.stem}-before{path.suffix}"))

    def get(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was found with exactly these settings."""
        return self._found.get(_key(settings))

    def add(self, settings: Mapping[str, Any], result: Mapping[str, Any], where: Any) -> None:
        """Keeps a result, here and in the file."""
        line = {"settings": dict(settings), "result": dict(result), "where": where}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        self._found[_key(settings)] = dict(result)

    def _read(self) -> None:
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self._found[_key(record["settings"])] = dict(record["result"])
            except (ValueError, KeyError, TypeError):
                if number == len(lines) and not text.endswith("\n"):  # killed while writing it
                    self.path.write_text("".join(f"{one}\n" for one in lines[:-1]), "utf-8")
                    break
                raise Mistake(
                    f"line {number} of {self.path} is no result: remove it, or start without "
                    "--resume"
                ) from None


def binned(losses: Sequence[float]) -> list[list[float]]:
    """`[step, mean]` at the end of each of at most `BINS` parts of the losses; a part with one that
    is not finite is left out."""
    bins = np.array_split(np.asarray(losses), min(BINS, len(losses)))
    ends = np.cumsum([len(one) for one in bins])
    return [
        [int(end), float(one.mean())]
        for end, one in zip(ends, bins, strict=True)
        if np.isfinite(one).all()
    ]


@contextlib.contextmanager
def in_advance[T](tasks: Iterable[Callable[[], T]], workers: int) -> Iterator[Iterator[T]]:
    """`with in_advance(...) as results:` the results in order, `workers` of them being prepared
    while the caller is busy with an earlier one."""
    pool = concurrent.futures.ThreadPoolExecutor(workers)

    def results() -> Iterator[T]:
        waiting = collections.deque()
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _commit() -> str:
    """The commit of this checkout, with a "+" if tracked files differ from it."""
    name = _says("git", "rev-parse", "--short=12", "HEAD")
    changed = _says("git", "status", "--porcelain", "--untracked-files=no")
    return f"{name}{'+' if changed else ''}" if name else "unknown"


def _says(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
