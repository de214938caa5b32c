"""Small cells of all kinds, and sequences for them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bsjax
import bsjax.linen
import bsjax.nnx
from tests.helpers import normal, random_mask, tolerance

IN, HIDDEN, BLOCK, BATCH, TIME = 5, 12, 4, 3, 6
NAMES = ("BlockLSTMCell", "BlockMultiplicativeLSTMCell", "SmallWorldLSTMCell")
MASK = random_mask(3, 3, 0.5) | np.eye(3, dtype=bool)


def make(name="SmallWorldLSTMCell", hidden=HIDDEN, *, seed=0, noisy=False, **options):
    """An NNX cell. With `noisy` no parameter is a constant, so that each of them is seen."""
    options = {"pattern": MASK, "block": BLOCK, "param_dtype": default(), **options}
    cell = getattr(bsjax.nnx, name)(IN, hidden, rngs=nnx.Rngs(seed), **options)
    if noisy:
        rng = np.random.default_rng(seed)
        state = nnx.state(cell, nnx.Param)
        for _, variable in nnx.to_flat_state(state):
            value = variable.get_value()
            variable.set_value(value + 0.3 * normal(rng, value.shape, value.dtype))
        nnx.update(cell, state)
    return cell


def default():
    """float32, or float64 where that is enabled."""
    return jnp.result_type(float)


def sequence(time=TIME, batch=BATCH, dtype=None, features=IN):
    return normal(np.random.default_rng(1), (batch, time, features), dtype or default())


def cotangent(shape, dtype=None):
    return normal(np.random.default_rng(2), shape, dtype or default())


def agree(got, want):
    """Equal but for the order of sums, in float64: over all tokens, and over features of the state.

    An error is relative to the largest number of an array, since larger ones may cancel in it.
    """
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype
        if not jnp.issubdtype(g.dtype, jnp.floating):
            np.testing.assert_array_equal(g, w)
            continue
        assert g.dtype == jnp.float64
        bound = tolerance(g.dtype, BATCH * TIME * HIDDEN)["atol"]
        np.testing.assert_allclose(g, w, rtol=0, atol=bound * max(1, np.abs(w).max()))
