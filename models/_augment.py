"""Images for a convolutional network: normalised, augmented, in batches by `grain`.

A batch depends on its number and the seed only, so that a run that goes on from a position sees
what it would have seen. Pixels stay bytes until they are in the program that trains.
"""

from typing import Any, NamedTuple, Self

import grain
import numpy as np

from models import _cifar as cifar
from models import _images as images
from models._cli import Mistake
from models._images import Images, Split

WAYS = ("crop", "flip", "cutout")


class Augmentation(NamedTuple):
    """What is done to an image. Pixels from outside have the colour `fill`."""

    crop: int = 0  # pixels of a border, of which a random part of the image's own size is cut out
    flip: bool = False  # left and right, for every second image
    cutout: int = 0  # side of a square that is filled, partly outside the image


class Moments(NamedTuple):
    """Of the channels of images, which are bytes: normalised, they have mean 0 and deviation 1."""

    mean: np.ndarray
    deviation: np.ndarray


class Data(NamedTuple):
    """Images, what is known of their colours, and the colour of what is outside of them."""

    images: Images
    moments: Moments
    fill: np.ndarray

    @classmethod
    def of(cls, config: Any) -> Self:
        """What the flags of `models.resnet` say."""
        found = load(config.data, test=config.measure == "test")
        splits = {"images": found.train, "measured": found.measured}
        for name, split in splits.items():
            wanted, there = getattr(config, name), len(split.y)
            if wanted > there:
                raise Mistake(f"--{name} {wanted} is more than the {there:,} there are: take fewer")
            splits[name] = Split(*(a[: wanted or None] for a in split))
        about = found.about
        if config.images or config.measured:
            counts = " and ".join(f"{len(split.y):,}" for split in splits.values())
            about += f", of which the first {counts}"
        found = found._replace(train=splits["images"], measured=splits["measured"], about=about)
        known = moments(found.train.x)
        # digits are drawn on black; of photographs it is the mean that says least
        fill = known.mean.round() if config.data else np.zeros_like(known.mean)
        return cls(found, known, fill.astype(np.uint8))


def load(data: Any, *, test: bool) -> Images:
    """CIFAR-10 from the paths `data`, or scikit-learn's digits if there are none: x[n, h, w, c],
    bytes."""
    if data:
        return cifar.load(data, test=test)
    found = images.load(None, test=test)
    side = round(found.train.x.shape[1] ** 0.5)

    def as_bytes(split: Split) -> Split:
        x = np.round(255 * split.x).astype(np.uint8)
        return Split(x.reshape(-1, side, side, 1), split.y)

    return found._replace(train=as_bytes(found.train), measured=as_bytes(found.measured))


def moments(x: np.ndarray) -> Moments:
    """Mean and standard deviation of each channel of bytes, float32, by counting them."""
    levels = np.arange(256)
    shares = [
        np.bincount(x[..., c].ravel(), minlength=256) / x[..., c].size for c in range(x.shape[-1])
    ]
    mean = np.array([share @ levels for share in shares])
    square = np.array([share @ levels**2 for share in shares])
    deviation = np.sqrt(square - mean**2)
    return Moments(mean.astype(np.float32), deviation.astype(np.float32))


def augment(
    x: np.ndarray, how: Augmentation, fill: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Other images than `x[n, h, w, c]`, each changed in its own way.

    Crops and flips as He et al. 2016 (whose border is black, here it is `fill[c]`), cut-out after
    DeVries and Taylor 2017: the middle of the square is anywhere in the image.
    """
    n, h, w, _ = x.shape
    row, column = np.arange(h), np.arange(w)
    if how.crop:
        border = np.broadcast_to(fill, (n, h + 2 * how.crop, w + 2 * how.crop, len(fill)))
        padded = border.astype(x.dtype)
        padded[:, how.crop : how.crop + h, how.crop : how.crop + w] = x
        dy, dx = rng.integers(0, 2 * how.crop + 1, (2, n, 1))
        x = padded[np.arange(n)[:, None, None], (dy + row)[:, :, None], (dx + column)[:, None]]
    if how.flip:
        x = np.where(rng.integers(0, 2, (n, 1, 1, 1)), x[:, :, ::-1], x)
    if how.cutout:
        y0, x0 = rng.integers(0, [[h], [w]], (2, n))[:, :, None] - how.cutout // 2
        inside = ((row >= y0) & (row < y0 + how.cutout))[:, :, None]
        inside = inside & ((column >= x0) & (column < x0 + how.cutout))[:, None]
        x = np.where(inside[..., None], fill, x)
    return x


def batches(
    split: Split, size: int, how: Augmentation, fill: np.ndarray, *, seed: int
) -> grain.MapDataset:
    """`batches(...)[i]` is (x, y) of the training step i, whatever the epoch, and for ever.

    Every epoch has another order; what does not fill a batch at its end is left out.
    """

    def batch(chosen: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return augment(split.x[chosen], how, fill, rng), split.y[chosen]

    numbers = grain.MapDataset.source(range(len(split.y))).seed(seed).shuffle()
    return numbers.batch(size, drop_remainder=True).repeat().random_map(batch)


def stream(data: grain.MapDataset, position: dict[str, int] | None) -> grain.DatasetIterator:
    """The batches in order, from a `get_state()` of such a stream, the next ones being prepared."""
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    found = iter(data.to_iter_dataset(ahead))
    if position is not None:
        found.set_state(position)
    return found
