"""CIFAR-10 (Krizhevsky 2009) from its files: binary or Python batches, compressed or in archives.

A binary batch is a row of records of 3,073 bytes: a label within 0 and 9, then 1,024 red, 1,024
green and 1,024 blue bytes, each 32 x 32 and row by row. A Python batch is a pickled dictionary with
`data[n, 3072]`, in the same order, and `labels`.
"""

import gzip
import hashlib
import io
import lzma
import pickle
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models._cli import Mistake
from models._images import Images, Split

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
SIDE, CHANNELS = 32, 3
PIXELS = CHANNELS * SIDE**2
TEST = "test_batch"
PARTS = (*(f"data_batch_{i}" for i in range(1, 6)), TEST)
BATCH = re.compile(r"(?P<part>data_batch_\d+|test_batch)(\.bin)?(\.(gz|xz))?")
ARCHIVE = re.compile(r".*\.(tar(\.(gz|xz))?|tgz|txz)")
WITHIN = ("cifar-10-batches-bin", "cifar-10-batches-py", "cifar-10-binary.*", "cifar-10-python.*")
WHAT = (
    "data_batch_1 to 5 and test_batch (.bin or the Python ones, plain, .gz or .xz) or "
    "cifar-10-binary.tar.gz"
)
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError)


def load(paths: Path | Sequence[Path], *, test: bool) -> Images:
    """Images `x[n, 32, 32, 3]`, uint8, with labels `y[n]`, int32, in the order of the files.

    `paths` is a folder, an archive, or batches, of which those to train on may be fewer than five.
    With `test`, all training images and the test images. Without, the last tenth of the training
    images is measured on (5,000 of 50,000, as He et al. 2016 do), and the test images are not
    looked at. Raises `Mistake` for what is missing, broken, or something else.
    """
    paths = (paths,) if isinstance(paths, Path) else tuple(paths)
    name = "CIFAR-10 in " + ", ".join(map(str, paths))
    parts = _parts(paths)
    training = [parts[part] for part in sorted(parts, key=_number) if part != TEST]
    x, y = (np.concatenate(arrays) for arrays in zip(*training, strict=True))
    train, held = Split(x, y), parts[TEST]
    if not test:
        cut = len(y) - max(1, len(y) // 10)
        if not cut:
            raise Mistake(f"{name} has a single image to train on: nothing is left to measure on")
        train, held = Split(x[:cut], y[:cut]), Split(x[cut:], y[cut:])
    digest = hashlib.sha256()
    for array in (*train, *held):
        digest.update(array)
    kind = "test" if test else "validation"
    about = f"{name}: {len(train.y):,} to train on, {len(held.y):,} for {kind}"
    return Images(train, held, about, digest.hexdigest()[:12])


def _number(part: str) -> int:
    return int(part.rpartition("_")[2]) if part != TEST else 0


def _parts(paths: Sequence[Path]) -> Mapping[str, Split]:
    """Every part of the data by its name."""
    found: dict[str, Split] = {}
    for path in paths:
        if not path.exists():
            raise Mistake(f"{path} does not exist: check the path given with --data")
        for part, where, content in _folder(path) if path.is_dir() else _file(path):
            if part in found:
                raise Mistake(f"{part} was given twice, the second time as {where}: give it once")
            found[part] = (
                _python(content, where) if _is_pickle(content) else _binary(content, where)
            )
    named = "what was given with --data" if len(paths) > 1 else str(paths[0])
    # of files that somebody names a few are enough; elsewhere a missing one is an accident
    whole = any(path.is_dir() or ARCHIVE.fullmatch(path.name) for path in paths)
    missing = [part for part in PARTS if part not in found] if whole else []
    if not missing:
        missing = [] if TEST in found else [TEST]
        missing += [] if found.keys() - {TEST} else ["data_batch_1"]
    if missing:
        raise Mistake(f"{named} has no {', '.join(missing)} of CIFAR-10: expected {WHAT}")
    return found


def _folder(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """(part, where it is, its bytes) of the batches in a folder, or of what was unpacked in it."""
    batches: dict[str, Path] = {}
    # sorted, the plain binary file comes before the compressed ones; one form of each is read
    for path in sorted(folder.iterdir(), key=lambda path: (".bin" not in path.name, path.name)):
        if (match := BATCH.fullmatch(path.name)) and path.is_file():
            batches.setdefault(match["part"], path)
    if batches:
        for path in batches.values():
            yield from _file(path)
        return
    for pattern in WITHIN:
        for path in sorted(folder.glob(pattern)):
            if path.is_dir() or ARCHIVE.fullmatch(path.name):
                yield from _folder(path) if path.is_dir() else _file(path)
                return


def _file(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """(part, where it is, its bytes) of a batch, or of each batch in an archive."""
    match = BATCH.fullmatch(path.name)
    if not match and not ARCHIVE.fullmatch(path.name):
        raise Mistake(f"{path} is not named like a part of CIFAR-10: expected {WHAT}")
    try:
        content = _plain(path.read_bytes())
        if match:
            yield match["part"], str(path), content
            return
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                match = BATCH.fullmatch(Path(member.name).name)
                if match and member.isfile():
                    inner = archive.extractfile(member)
                    assert inner is not None  # as for every regular file
                    yield match["part"], f"{path}: {member.name}", _plain(inner.read())
    except BROKEN as error:
        raise Mistake(f"{path} cannot be read ({error}): download it again") from None


def _plain(content: bytes) -> bytes:
    """Without the compression. No label and no pickle begins like a compressed file."""
    if content.startswith(b"\xfd7zXZ\0"):
        return lzma.decompress(content)
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content


def _binary(content: bytes, where: str) -> Split:
    if not content or len(content) % (1 + PIXELS):
        raise Mistake(
            f"{where} has {len(content):,} bytes, no multiple of a record of CIFAR-10 "
            f"({1 + PIXELS:,}): it is incomplete or something else; download it again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + PIXELS)
    return _split(records[:, 1:], records[:, 0], where)


def _is_pickle(content: bytes) -> bool:
    return content.startswith(b"\x80")  # of a binary batch the first byte is a label


def _python(content: bytes, where: str) -> Split:
    try:
        batch = _Arrays(io.BytesIO(content), encoding="bytes").load()
        batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        data, labels = (np.asarray(batch[name]) for name in ("data", "labels"))
    except Mistake as mistake:
        raise Mistake(f"{where} {mistake}") from None
    except Exception as error:  # broken pickles raise nearly everything
        raise Mistake(
            f"{where} is no Python batch of CIFAR-10 ({type(error).__name__}: {error}): expected a "
            "pickled dictionary with data and labels"
        ) from None
    fits = data.ndim == 2 and data.shape[1] == PIXELS and data.dtype == np.uint8 and len(data)
    if not fits or labels.shape != data.shape[:1] or labels.dtype.kind not in "iu":
        raise Mistake(
            f"{where} has data of the shape {data.shape} ({data.dtype}) and labels of the shape "
            f"{labels.shape} ({labels.dtype}): expected (n, {PIXELS}) of uint8 and (n,) of integers"
        )
    return _split(data, labels, where)


def _split(pixels: np.ndarray, labels: np.ndarray, where: str) -> Split:
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        wrong = labels[(labels < 0) | (labels >= len(CLASSES))][0]
        raise Mistake(f"a label in {where} is {wrong}: expected 0 to {len(CLASSES) - 1}")
    x = pixels.reshape(-1, CHANNELS, SIDE, SIDE).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(x), labels.astype(np.int32))


# What arrays and byte strings are pickled with. Anything else could run code of a stranger.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_SAFE = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: str(text).encode(str(encoding)),
}


class _Arrays(pickle.Unpickler):
    """Reads nothing but built-in containers, numbers, strings and arrays."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _SAFE[module_name, global_name]
        except KeyError:
            raise Mistake(
                f"wants to run {module_name}.{global_name}, which no batch of CIFAR-10 does: it "
                "was not read; get the data from another place"
            ) from None
