"""A recurrent recipe that takes seconds, and its text."""

import contextlib
import shlex
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import lstm
from models._cli import parse
from models._recurrent import Size
from models._streams import Streams

TINY = shlex.split(
    "--batch 2 --length 8 --hidden 24 --embedding 4 --depth 2 --block 4 --links 1 --epochs 2 "
    "--bytes 177 --learning_rate 0.03 --warmup 0 --valid 0.1 --test 0.1 --heldout_bytes 40 "
    "--checkpoint_every 6 --measure_every 9 --rounds 1 --sample_length 5"
)
SIZE = Size(24, embedding=4, depth=2, block=4, links=1)


def config(*more):
    return parse(lstm.Config, [*TINY, *more], command="it")


def letters(count, seed=0):
    """Bytes of which every second one is a space."""
    draw = np.random.default_rng(seed).choice(np.frombuffer(b"abcd", np.uint8), count)
    draw[1::2] = ord(" ")
    return draw


def write_letters(folder):
    path = folder / "letters.txt"
    path.write_bytes(letters(1200).tobytes())
    return path


@contextlib.contextmanager
def ctrl_c_at(wanted):
    """A signal as from the keyboard, when the training window of that number is read."""
    window, seen = Streams.window, []

    def interrupting(self, step):
        seen.extend([step] * (len(self.data) == 177))
        if len(seen) - 1 == wanted:
            seen.append(None)
            signal.raise_signal(signal.SIGINT)
        return window(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Streams, "window", interrupting)
        yield


def leaves(tree):
    """Arrays, keys as numbers."""
    raw = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(tree)
    ]
    return [np.asarray(leaf) for leaf in raw]


def count(model):
    """Parameters, one by one."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
