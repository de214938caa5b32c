"""Text as bytes: finding files, reading them, splitting them, and cutting batches."""

import dataclasses
import gzip
import hashlib
import lzma
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from models._cli import Mistake

HELDOUT = 0.1  # the share of files held out, by their hash
MOST_BYTES = 2**31  # read into memory as a whole
CHUNK = 2**20  # bytes read at a time
OPENERS: dict[str, Callable] = {".gz": gzip.open, ".xz": lzma.open}
# Folders of the standard library with tests, tables, documentation, or other people's code.
NOT_SOURCE = {"encodings", "pydoc_data", "test", "tests", "idle_test", "__pycache__"}
NOT_SOURCE |= {"lib2to3", "site-packages", "dist-packages"}


@dataclasses.dataclass(frozen=True)
class Text:
    """Bytes to train on, and bytes of other files that no model sees before it is measured."""

    train: np.ndarray  # uint8
    heldout: np.ndarray  # uint8
    about: str  # one line for the reader

    @property
    def digest(self) -> str:
        """Equal for equal texts: a run can only be resumed on the text it was started with."""
        return hashlib.sha256(self.train.tobytes() + b"|" + self.heldout.tobytes()).hexdigest()[:16]


def load(paths: Sequence[Path], window: int) -> Text:
    """The files and folders named (none: the standard library's source), split in two.

    Whole files are held out, chosen by a hash of their content, so that equal files cannot be on
    both sides and the choice does not depend on names. Where that cannot give about a tenth of the
    text (one file, a few, or one that dwarfs the rest), the end of the text is held out instead.
    """
    name = " ".join(map(str, paths)) or "the source of the Python standard library"
    contents = read(paths or standard_library())
    train, heldout, how = split(contents)
    for part, data in (("training", train), ("held-out", heldout)):
        if len(data) < window:
            raise Mistake(
                f"{name}: {len(data)} bytes of {part} text are fewer than one window of {window}: "
                "give more text with --data, or a smaller --length"
            )
    sizes = f"{len(train) / 1e6:.2f} MB to train on, {len(heldout) / 1e6:.2f} MB held out ({how})"
    return Text(train, heldout, f"{name}: {len(contents)} files, {sizes}")


def standard_library() -> list[Path]:
    """The `.py` files that came with this Python, without tests, tables and documentation."""
    root = Path(sysconfig.get_path("stdlib"))
    found = (path for path in root.rglob("*.py") if path.is_file() and path.stat().st_size)
    source = sorted(path for path in found if not NOT_SOURCE & {*path.relative_to(root).parts})
    if not source:
        raise Mistake(f"no source of the standard library in {root}: name a text with --data PATH")
    return source


def read(paths: Iterable[Path]) -> list[bytes]:
    """The different contents of these files and of all files in these folders, in a fixed order."""
    contents: dict[str, bytes] = {}
    total = 0
    for path in paths:
        for file in files(path):
            content = b"".join(chunks(file, MOST_BYTES + 1))
            if not content and file == path:
                raise Mistake(f"{file} is empty: name a file with text in it")
            contents[hashlib.sha256(content).hexdigest()] = content
            total += len(content)
            if total > MOST_BYTES:
                raise Mistake(f"the text is longer than {MOST_BYTES:,} bytes: name fewer files")
    # in the order of their hashes: names and places do not matter
    found = [contents[key] for key in sorted(contents) if contents[key]]
    if not found:
        raise Mistake(
            f"no text in {', '.join(map(str, paths))}: name a file or folder that has some"
        )
    return found


def split(files: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, str]:
    """(train, heldout, how it was chosen)."""
    below = int(HELDOUT * 2**32)
    chosen = [int(hashlib.sha256(f).hexdigest()[:8], 16) < below for f in files]
    total = sum(map(len, files))
    share = sum(len(f) for f, out in zip(files, chosen, strict=True) if out) / total
    if HELDOUT / 2 <= share <= 2 * HELDOUT:
        parts = (
            [f for f, out in zip(files, chosen, strict=True) if out == side] for side in (0, 1)
        )
        train, heldout = (_join(part) for part in parts)
        return train, heldout, "whole files, by a hash of their content"
    text = _join(files)
    cut = len(text) - round(HELDOUT * len(text))
    return text[:cut], text[cut:], f"the last {HELDOUT:.0%}: too few files to hold out whole ones"


def batch(data: np.ndarray, step: int, *, seed: int, size: int, length: int) -> np.ndarray:
    """`size` windows of `length` bytes and the byte after each, [size, length + 1] int32.

    A function of the seed and the step and nothing else: a run that is resumed needs no position
    in the data, and two models see the same text.
    """
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(0, len(data) - length, size)
    return windows(data, starts, length)


def spread(data: np.ndarray, count: int, length: int) -> np.ndarray:
    """At most `count` windows, evenly spread over all of `data`, [count, length + 1] int32."""
    last = len(data) - length - 1
    return windows(data, np.linspace(0, last, min(count, last + 1)).astype(int), length)


def windows(data: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """`data[start : start + length + 1]` for every start."""
    return data[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def unigram_bits(train: np.ndarray, heldout: np.ndarray) -> float:
    """Bits per byte of `heldout` if every byte is drawn alone, as often as in `train`."""
    counts = _counts(train) + 1.0  # no byte is impossible
    return float(-(np.log2(counts / counts.sum()) * _counts(heldout)).sum() / len(heldout))


def lzma_bits(heldout: np.ndarray) -> float:
    """Bits per byte that `xz -9e` needs for `heldout` alone."""
    packed = lzma.compress(heldout.tobytes(), preset=9 | lzma.PRESET_EXTREME)
    return 8 * len(packed) / len(heldout)


def _counts(data: np.ndarray) -> np.ndarray:
    """How often each byte occurs, in constant memory: `bincount` makes 8 bytes of each."""
    pieces = (data[i : i + CHUNK] for i in range(0, len(data), CHUNK))
    return sum((np.bincount(piece, minlength=256) for piece in pieces), np.zeros(256, int))


def _join(files: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"\n".join(files), np.uint8)


def files(path: Path) -> list[Path]:
    """`path` itself, or all files below it that are not hidden."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        what = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise Mistake(f"{path} {what}: check the path given with --data")
    below = (file.relative_to(path) for file in path.rglob("*"))
    seen = (file for file in below if not any(part.startswith(".") for part in file.parts))
    return sorted(path / file for file in seen if (path / file).is_file())


def chunks(path: Path, most: int, *, size: int = CHUNK) -> Iterator[bytes]:
    """The content of a file, unpacked, in pieces of `size` bytes; ends after `most` bytes."""
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            while most > 0 and (piece := file.read(min(size, most))):
                yield piece
                most -= len(piece)
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise Mistake(
            f"{path} cannot be unpacked ({error}): it is cut off, corrupt, or no "
            f"{path.suffix} file; get it again, or give it another name"
        ) from None
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror}): check its permissions") from None
