"""Images as sequences of bytes: rows from top to bottom, columns from left to right, and of each
pixel its channels. After Child, Gray, Radford and Sutskever 2019."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import _decode
from models import _pixels as pixels
from models import _report as report
from models import _text as texts
from models._cli import Mistake
from models._compare import Material
from models._steps import mean_bits

DRAWN = 16  # images that a model makes in the end
_bits = nnx.jit(mean_bits)


class Pictures(NamedTuple):
    """Images `[n, rows * columns * channels]`, uint8, to train on and to measure on."""

    train: np.ndarray
    heldout: np.ndarray
    shape: tuple[int, int, int]  # rows, columns, channels
    white: int  # the largest value
    about: str

    @property
    def digest(self) -> str:
        """Equal for equal images: a run can only be resumed on those it was started with."""
        return hashlib.sha256(self.train.tobytes() + b"|" + self.heldout.tobytes()).hexdigest()[:16]


def load(where: str) -> Pictures:
    """scikit-learn's "digits" (8 x 8, 17 shades), or those in a folder: MNIST's IDX files, or
    CIFAR-10. Their test images are measured on."""
    path = None if where == "digits" else Path(where)
    if path is not None and not path.exists():
        raise Mistake(f'{path} does not exist: give a folder with --images, or "digits"')
    found = pixels.read(path, test=True)
    train, heldout = (x.reshape(len(x), -1) for x in (found.train, found.held))
    return Pictures(train, heldout, found.train.shape[1:], found.levels - 1, found.about)


def batch(pictures: Pictures, step: int, *, seed: int, size: int) -> np.ndarray:
    """`size` images, [size, 1 + l] int32, by the seed and the step and nothing else."""
    rng = np.random.default_rng([seed, step])
    return begun(pictures.train[rng.integers(0, len(pictures.train), size)])


def begun(some: np.ndarray) -> np.ndarray:
    """Images with a zero before each, which the first byte is predicted from."""
    return np.pad(some, ((0, 0), (1, 0))).astype(np.int32)


def heldout_bits(model: Any, pictures: Pictures, *, count: int, size: int) -> float:
    """Bits per dimension of about `count` bytes, of whole images spread over those held out."""
    wanted = max(1, count // pictures.heldout.shape[1])
    at = np.linspace(0, len(pictures.heldout) - 1, min(wanted, len(pictures.heldout))).astype(int)
    parts = [pictures.heldout[at[i : i + size]] for i in range(0, len(at), size)]
    means = [float(_bits(model, jnp.asarray(begun(part)))) for part in parts]
    return float(np.average(means, weights=[len(part) for part in parts]))


def position_bits(pictures: Pictures) -> float:
    """Bits per dimension if every byte is drawn alone, as often as at its place in training."""
    return pixels.by_position_bits(pictures.train, pictures.heldout, pixels.BYTES)


def material(config: Any, pictures: Pictures) -> Material:
    """What `compare` says of models of these images."""

    def measure(model: Any) -> float:
        return heldout_bits(model, pictures, count=config.heldout_bytes, size=4 * config.batch)

    def lines() -> dict[str, float]:
        return {
            "each place": position_bits(pictures),
            "lzma": texts.lzma_bits(pictures.heldout.reshape(-1)),
        }

    def show(name: str, model: Any, stem: str) -> None:
        made = _decode.images(
            model, DRAWN, pictures.train.shape[1], config.temperature, config.seed
        )
        at = np.linspace(0, len(pictures.heldout) - 1, DRAWN).astype(int)
        sets = {"held out": pictures.heldout[at], name: made}
        report.save_images(f"{stem}-samples.png", sets, pictures.shape, pictures.white)
        print(f"What the {name} model draws is in {stem}-samples.png")

    return Material("dim", "images", measure, lines, show)
