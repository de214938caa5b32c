"""Long texts as streams of bytes: mapped from the disk, never in memory as a whole."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models import _text as texts
from models._cli import Mistake

EVERYTHING = 2**63
SAMPLED = 64  # pieces of a text that its digest looks at


@dataclasses.dataclass(frozen=True)
class Splits:
    """Bytes to train on, to choose flags on, and to report: three ranges of one mapped file."""

    train: np.ndarray  # uint8, as the others
    valid: np.ndarray
    test: np.ndarray
    digest: str  # a run can only be resumed on the text it was started with
    about: str  # one line for the reader


def load(
    paths: Sequence[Path],
    spool: Path,
    *,
    valid: float = 0.05,
    test: float = 0.05,
    most: int | None = None,
) -> Splits:
    """The files and folders named (none: the standard library's source), cut in three.

    One plain file is mapped where it lies. What is compressed or in several files is written once,
    piece by piece, to the file `spool` as raw bytes: each different content once, in the order of
    their hashes, a line break after each. The end of the text is the test part, what comes before
    it the validation part; where a file ends close to a border, the border goes there, so that no
    file is on both sides. `most` bytes of the rest, its first, are trained on (None: all).

    Nobody may cut off a mapped file while it is in use.
    """
    name = " ".join(map(str, paths)) or "the source of the Python standard library"
    source, ends = _raw(paths or texts.standard_library(), spool)
    data = np.memmap(source, np.uint8, "r")
    borders, whole = _borders(len(data), ends, valid, test)
    parts = [data[a:b] for a, b in zip((0, *borders), (*borders, len(data)), strict=True)]
    parts[0] = parts[0][:most]
    train, *held = (f"{len(part) / 1e6:.2f} MB" for part in parts)
    how = "whole files" if whole else "the end of the text"
    about = f"{name}: {train} of {borders[0] / 1e6:.2f} MB to train on, {held[0]} to choose by, "
    about += f"{held[1]} to report ({how})"
    return Splits(*parts, digest=_digest(data, [len(part) for part in parts]), about=about)


class Streams(NamedTuple):
    """`batch` contiguous ranges of a text, side by side, in windows of `length` bytes.

    Stream i begins at byte `i * span` and predicts the `span` bytes after it. All bytes but the
    first, and fewer than `batch` at the end, are predicted once by some stream.
    """

    data: np.ndarray
    batch: int
    length: int

    @property
    def span(self) -> int:
        """Bytes that each stream predicts."""
        return (len(self.data) - 1) // self.batch

    @property
    def windows(self) -> int:
        """Windows of a pass; the last one may be longer than what is left."""
        return -(-self.span // self.length)

    def window(self, step: int) -> tuple[np.ndarray, int]:
        """(bytes [batch, length + 1] int32, how many of the `length` are in the pass).

        Those beyond belong to the next stream. Window -1 is the one before each stream's first:
        text to fill a state with, but for stream 0.
        """
        starts = self.span * np.arange(self.batch)[:, None] + self.length * step
        index = np.clip(starts + np.arange(self.length + 1), 0, len(self.data) - 1)
        return self.data[index].astype(np.int32), min(self.length, self.span - self.length * step)

    def check(self, part: str) -> "Streams":
        """Raises `Mistake` if a stream is shorter than a window."""
        if self.span < self.length:
            raise Mistake(
                f"{len(self.data)} bytes of {part} text are fewer than {self.batch} windows of "
                f"{self.length}: give more text with --data, or a smaller --length or --batch"
            )
        return self


def _raw(paths: Sequence[Path], spool: Path) -> tuple[Path, list[int]]:
    """(a file of raw bytes, where each of its contents ends)."""
    files = [file for path in paths for file in texts.files(path)]
    if len(files) == 1 and files[0].suffix not in texts.OPENERS:
        size = files[0].stat().st_size
        if not size:
            raise Mistake(f"{files[0]} is empty: name a file with text in it")
        return files[0], [size]
    sources = [[str(f.absolute()), (s := f.stat()).st_size, s.st_mtime_ns] for f in files]
    about = spool.with_suffix(".json")
    if ends := _spooled(spool, about, sources):
        return spool, ends
    ends = _write(files, spool)
    if not ends:
        raise Mistake(
            f"no text in {', '.join(map(str, paths))}: name a file or folder that has some"
        )
    about.write_text(json.dumps({"sources": sources, "ends": ends}), encoding="utf-8")
    return spool, ends


def _spooled(spool: Path, about: Path, sources: Any) -> list[int] | None:
    """Where contents end, if `spool` holds these sources already."""
    try:
        found = json.loads(about.read_text(encoding="utf-8"))
        same = found["sources"] == sources and spool.stat().st_size == found["ends"][-1]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
    return found["ends"] if same else None


def _write(files: Sequence[Path], spool: Path) -> list[int]:
    """Writes each different content once, in the order of their hashes; returns where they end."""
    sort = len(files) > 1  # or nothing need be read twice
    order = {_content_hash(file) if sort else "": file for file in files}
    ends, aside = [], spool.with_name(f"{spool.name}.{os.getpid()}")
    try:
        with aside.open("wb") as out:
            for key in sorted(order):
                before = out.tell()
                for piece in texts.chunks(order[key], EVERYTHING):
                    out.write(piece)
                if out.tell() > before:
                    out.write(b"\n")
                    ends.append(out.tell())
        if ends:
            aside.replace(spool)
    finally:
        aside.unlink(missing_ok=True)
    return ends


def _content_hash(file: Path) -> str:
    hashed = hashlib.sha256()
    for piece in texts.chunks(file, EVERYTHING):
        hashed.update(piece)
    return hashed.hexdigest()


def _borders(
    size: int, ends: Sequence[int], valid: float, test: float
) -> tuple[tuple[int, int], bool]:
    """(where validation and test begin, whether both are ends of files)."""
    wanted = size - round(size * (valid + test)), size - round(size * test)
    nearest = [min(ends, key=lambda end: abs(end - border)) for border in wanted]
    close = [
        abs(a - b) <= min(valid, test) * size / 4 for a, b in zip(nearest, wanted, strict=True)
    ]
    first, second = (n if c else w for n, c, w in zip(nearest, close, wanted, strict=True))
    return (first, second), all(close)


def _digest(data: np.ndarray, sizes: Sequence[int]) -> str:
    """Of the sizes and of pieces spread over the text: reading all of it might take minutes."""
    hashed = hashlib.sha256(repr(list(sizes)).encode())
    for start in np.linspace(0, max(0, len(data) - 4096), SAMPLED).astype(int):
        hashed.update(data[start : start + 4096].tobytes())
    return hashed.hexdigest()[:16]
