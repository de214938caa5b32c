"""Images of digits with their labels: MNIST from IDX files, or scikit-learn's small ones."""

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models._cli import Mistake

PARTS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
CLASSES = 10


class Split(NamedTuple):
    """Images x[n, k] within 0 and 1, and labels y[n]."""

    x: np.ndarray
    y: np.ndarray


class Images(NamedTuple):
    """What to train on and what to measure on; `about` says it in words."""

    train: Split
    measured: Split
    about: str
    digest: str


def load(folder: Path | None, *, test: bool) -> Images:
    """MNIST from the IDX files in `folder`, or scikit-learn's digits if it is None.

    With `test`, all training images and the test images. Without, the last twelfth of the training
    images is measured on (5,000 of MNIST's 60,000), and the test images are not looked at.
    """
    if folder is None:
        name, (train, held) = "scikit-learn's digits, 8 x 8", _bundled()
    else:
        name, (train, held) = f"the images in {folder}", _idx_folder(folder)
    if not test:
        cut = len(train.y) - max(1, len(train.y) // 12)
        held, train = Split(*(a[cut:] for a in train)), Split(*(a[:cut] for a in train))
    digest = hashlib.sha256(b"".join(a.tobytes() for a in (*train, *held))).hexdigest()[:12]
    kind = "test" if test else "validation"
    about = f"{name}: {len(train.y):,} to train on, {len(held.y):,} for {kind}"
    return Images(train, held, about, digest)


def sizes(folder: Path) -> tuple[int, int]:
    """The rows and columns of the images in IDX files, which `load` makes vectors of."""
    _, rows, columns = _read(_find(folder, PARTS[0])).shape
    return rows, columns


def _bundled() -> tuple[Split, Split]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise Mistake(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn, "
            "or give a folder with MNIST by --data"
        ) from None
    images, digits = map(np.asarray, load_digits(return_X_y=True))
    x, y = (images / 16).astype(np.float32), digits.astype(np.int32)
    # in the order of the file writers would differ between the parts: a harder and a noisier test
    order = np.random.default_rng(0).permutation(len(y))
    train, test = order[:1437], order[1437:]
    return Split(x[train], y[train]), Split(x[test], y[test])


def _idx_folder(folder: Path) -> tuple[Split, Split]:
    if not folder.exists():
        raise Mistake(f"{folder} does not exist: check the path given with --data")
    images, labels, test_images, test_labels = (_read(_find(folder, part)) for part in PARTS)
    splits = []
    for part, x, y in ((PARTS[0], images, labels), (PARTS[2], test_images, test_labels)):
        if x.ndim != 3 or y.shape != x.shape[:1] or not len(y):
            raise Mistake(
                f"{part} in {folder} has the shape {x.shape} and its labels {y.shape}: expected "
                "(n, rows, columns) and (n,)"
            )
        if y.max() >= CLASSES:
            raise Mistake(f"a label that belongs to {part} in {folder} is {y.max()}: expected 0-9")
        splits.append(Split((x.reshape(len(x), -1) / np.float32(255)), y.astype(np.int32)))
    if images.shape[1:] != test_images.shape[1:]:
        raise Mistake(
            f"the images to train on in {folder} are {images.shape[1:]}, those of the test "
            f"{test_images.shape[1:]}: they belong to different data"
        )
    return splits[0], splits[1]


def _find(folder: Path, part: str) -> Path:
    for name in (f"{part}-ubyte", f"{part}-ubyte.gz"):
        if (folder / name).is_file():
            return folder / name
    raise Mistake(
        f"{folder} has no {part}-ubyte or {part}-ubyte.gz: give the folder of MNIST's four IDX "
        "files with --data"
    )


def _read(path: Path) -> np.ndarray:
    """Bytes of an IDX file: two zeros, the type 8, the number of axes, their sizes, the data."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise Mistake(f"{path} cannot be read ({error}): download it again") from None
    axes = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    start = 4 + 4 * axes
    if not axes or len(content) < start:
        raise Mistake(f"{path} is no IDX file of bytes: it begins with {content[:4].hex()}")
    shape = struct.unpack(f">{axes}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise Mistake(
            f"{path} says that it holds {math.prod(shape):,} bytes and holds "
            f"{len(content) - start:,}: download it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
