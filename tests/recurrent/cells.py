"""Small cells of all kinds, and sequences for them."""

import numpy as np
from flax import nnx

import bsjax
import bsjax.linen
import bsjax.nnx
from tests.helpers import normal, random_mask

IN, HIDDEN, BLOCK, BATCH, TIME = 5, 12, 4, 3, 6
NAMES = ("BlockLSTMCell", "BlockMultiplicativeLSTMCell", "SmallWorldLSTMCell")
MASK = random_mask(3, 3, 0.5) | np.eye(3, dtype=bool)


def make(name="SmallWorldLSTMCell", hidden=HIDDEN, *, seed=0, noisy=False, **options):
    """An NNX cell. With `noisy` no parameter is a constant, so that each of them is seen."""
    options = {"pattern": MASK, "block": BLOCK, **options}
    cell = getattr(bsjax.nnx, name)(IN, hidden, rngs=nnx.Rngs(seed), **options)
    if noisy:
        rng = np.random.default_rng(seed)
        state = nnx.state(cell, nnx.Param)
        for _, variable in nnx.to_flat_state(state):
            value = variable.get_value()
            variable.set_value(value + 0.3 * normal(rng, value.shape, value.dtype))
        nnx.update(cell, state)
    return cell


def sequence(time=TIME, batch=BATCH, dtype=np.float32, features=IN):
    return normal(np.random.default_rng(1), (batch, time, features), dtype)


def cotangent(shape, dtype=np.float32):
    return normal(np.random.default_rng(2), shape, dtype)
