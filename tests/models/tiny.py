"""A run of the recipe that takes a second or two, and an interruption on time."""

import contextlib
import shlex
import signal

import jax
import pytest

from models import transformer
from models._cli import parse
from models.transformer import Config

TINY = shlex.split(
    "--steps 30 --learning_rate 0.02 --batch 2 --length 16 --width 32 --layers 1 --heads 2 "
    "--block 8 --density 0.25 --heldout_bytes 100 --rounds 2 --sample_length 5"
)

# sums one after another, from a byte to its logits: into q, k and v, over the features of a head,
# over keys, out of attention, into the MLP and out of it, and into the head
TERMS = 32 + 16 + 16 + 32 + 32 + 128 + 32


def config(*more):
    return parse(Config, [*TINY, *more], command="it")


def write_words(folder, text):
    path = folder / "words.txt"
    path.write_bytes(text.train.tobytes())
    return path


def optax_promotes():
    """Adam raises a float to the power of an integer step, which strict promotion refuses."""
    return jax.numpy_dtype_promotion("standard")


@contextlib.contextmanager
def ctrl_c_at(wanted):
    """A signal as from the keyboard, while a step is under way."""
    batch = transformer.batch

    def interrupting(config, text, step):
        if step == wanted:
            signal.raise_signal(signal.SIGINT)
        return batch(config, text, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "batch", interrupting)
        yield
