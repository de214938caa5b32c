"""Images whose pixels are to be predicted: digits, MNIST, or CIFAR-10, as integer levels."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from models import _cifar as cifar
from models import _images as digits
from models._cli import Mistake

BYTES = 256
SMALL = 17  # levels of scikit-learn's digits, 0 to 16


class Pixels(NamedTuple):
    """Images `[n, h, w, c]`, uint8, to train on and to measure on."""

    train: np.ndarray
    held: np.ndarray
    levels: int
    about: str
    digest: str


def load(path: Path | None, *, test: bool) -> Pixels:
    """The images of `read`, which must be square."""
    found = read(path, test=test)
    height, width = found.train.shape[1:3]
    if height != width:
        raise Mistake(f"images of {height * width} pixels are no squares: give square ones")
    return found


def read(path: Path | None, *, test: bool) -> Pixels:
    """scikit-learn's digits for None; MNIST from a folder of IDX files; else CIFAR-10.

    With `test`, the test images are measured on. Without, some of the training images are.
    """
    if path is not None and not (path.is_dir() and any(path.glob("*-idx3-ubyte*"))):
        found = cifar.load(path, test=test)
        return Pixels(found.train.x, found.measured.x, BYTES, found.about, found.digest)
    found = digits.load(path, test=test)
    levels, sizes = (BYTES, digits.sizes(path)) if path else (SMALL, (8, 8))
    train, held = (
        np.rint(split.x * (levels - 1)).astype(np.uint8).reshape(len(split.x), *sizes, 1)
        for split in (found.train, found.measured)
    )
    return Pixels(train, held, levels, found.about, found.digest)


def batch(images: np.ndarray, step: int, *, seed: int, size: int) -> np.ndarray:
    """Different images for each step, the same ones whenever it is taken."""
    chosen = np.random.default_rng((seed, step)).choice(len(images), size, replace=False)
    return images[chosen]


def by_position_bits(train: np.ndarray, held: np.ndarray, levels: int) -> float:
    """Bits per dimension if each place had its own histogram and knew nothing of the others.

    One is added to each count, so that nothing is impossible (Laplace).
    """
    flat, seen = train.reshape(len(train), -1), held.reshape(len(held), -1)
    counts = np.ones((flat.shape[1], levels))
    np.add.at(counts, (np.arange(flat.shape[1])[None].repeat(len(flat), 0), flat), 1)
    share = counts / counts.sum(1, keepdims=True)
    return float(-np.log2(share[np.arange(seen.shape[1])[None], seen]).mean())
