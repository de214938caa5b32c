"""What all initialisers keep: padding, spare slots, keys, traced patterns; and what they refuse."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers as standard

import bsjax
from bsjax import inits
from tests.test_inits import KEY, OTHER, column, pattern, ragged, within_sampling_error

EVERY = {
    "stored_fan_in": inits.stored_fan_in(),
    "sinkhorn": inits.sinkhorn(),
    "identity": inits.identity(),
    "orthogonal": inits.orthogonal(),
    "from_dense": inits.from_dense(standard.he_uniform()),
}
DRAWN = [name for name in EVERY if name != "identity"]
TRACED = ["stored_fan_in", "sinkhorn", "identity", "orthogonal"]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_padding_and_spare_slots_are_zero(name, dtype):
    p, (k, m) = ragged()
    values = EVERY[name](KEY, p, dtype, (k, m))
    assert values.dtype == dtype
    assert values.shape == (p.capacity, *p.block)
    assert not np.any(values[p.nnz :])
    dense = bsjax.todense(values, p)
    assert not dense[k:].any()
    assert not dense[:, m:].any()
    assert bool(dense.any())
    assert not np.any(dense[:, 6:12])  # the empty block-column


@pytest.mark.parametrize("name", ["stored_fan_in", "from_dense"])
def test_padding_does_not_count_as_fan_in(name):
    """A block-column with nothing but the last block-row: 3 real inputs of 64."""
    mask = np.array([[False, True], [True, True]])
    p = bsjax.BlockPattern.from_mask(mask, (64, 512))
    init = inits.stored_fan_in(2**0.5) if name == "stored_fan_in" else EVERY[name]
    values = init(KEY, p, jnp.float32, (67, 1024))
    for j, fan in ((0, 3), (1, 67)):
        sample = column(values, p, j, (67, 1024))
        assert len(sample) == fan
        within_sampling_error(sample, 2 / fan)


@pytest.mark.parametrize("name", DRAWN)
def test_keys_decide(name):
    p = pattern("random, 4")
    one, same, other = (np.asarray(EVERY[name](k, p))[: p.nnz] for k in (KEY, KEY, OTHER))
    np.testing.assert_array_equal(one, same)
    assert not np.any(one == other)
    assert len(np.unique(one)) == one.size  # nothing is drawn twice


def test_raw_keys_are_keys():
    p = pattern("random, 4")
    assert inits.stored_fan_in()(jax.random.PRNGKey(0), p).shape == (16, 16, 16)


@pytest.mark.parametrize("name", TRACED)
def test_traced_patterns(name):
    p, features = ragged()
    init = jax.jit(EVERY[name], static_argnums=(2, 3))
    want = EVERY[name](KEY, p, jnp.float32, features)
    np.testing.assert_allclose(init(KEY, p, jnp.float32, features), want, rtol=1e-5)


def test_traced_patterns_are_refused_where_counts_are_shapes():
    p, _ = ragged()
    with pytest.raises(
        ValueError, match=r"from_dense: the pattern is traced.*or use stored_fan_in"
    ):
        jax.jit(EVERY["from_dense"])(KEY, p)


@pytest.mark.parametrize("name", ["orthogonal", "from_dense"])
def test_known_patterns_inside_jit(name):
    p, features = ragged()
    inside = jax.jit(lambda key: EVERY[name](key, p, jnp.float32, features))(KEY)
    np.testing.assert_allclose(
        inside, EVERY[name](KEY, p, jnp.float32, features), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", EVERY)
def test_nothing_stored(name):
    like, features = ragged()
    p = bsjax.BlockPattern.from_mask(np.zeros(like.grid, bool), like.block, capacity=like.capacity)
    values = EVERY[name](KEY, p, jnp.float32, features)
    np.testing.assert_array_equal(values, np.zeros((like.capacity, 8, 6)))


# ---------------------------------------------------------------- initialisers of one's own


@inits.by_pattern
def counting(key, p, dtype, features, *, scale=1.0):
    """Slot i holds i + 1."""
    return scale * jnp.ones((p.capacity, *p.block)) * jnp.arange(1.0, p.capacity + 1)[:, None, None]


def test_a_marked_initialiser_gets_the_pattern():
    p, features = ragged()
    values = inits.initialize(counting, KEY, p, jnp.bfloat16, features)
    assert values.dtype == jnp.bfloat16
    assert values[0, 0, 0] == 1
    assert not np.any(values[p.nnz :])
    doubled = inits.initialize(
        functools.partial(counting, scale=2.0), KEY, p, jnp.float32, features
    )
    np.testing.assert_array_equal(doubled, 2 * values.astype(jnp.float32))
    assert counting.__doc__ == "Slot i holds i + 1."


def test_ours_are_marked_whatever_wraps_them():
    p = pattern("random, 4")
    want = inits.stored_fan_in()(KEY, p)

    @functools.wraps(inits.stored_fan_in())
    def wrapper(*args, **kwargs):
        return inits.stored_fan_in()(*args, **kwargs)

    for init in (wrapper, functools.partial(inits.stored_fan_in()), functools.partial(wrapper)):
        np.testing.assert_array_equal(inits.initialize(init, KEY, p, jnp.float32), want)


# ---------------------------------------------------------------- errors


@inits.by_pattern
def misshapen(key, p, dtype, features):
    return jnp.zeros((p.capacity, 3))


ERRORS = {
    "a seed": (
        lambda p: inits.stored_fan_in()(3, p),
        TypeError,
        "stored_fan_in: `key` must be a key, got 3: write jax.random.key(3).",
    ),
    "a shape": (
        lambda p: inits.sinkhorn()(KEY, (64, 64)),
        TypeError,
        "sinkhorn: `p` must be a BlockPattern, got tuple",
    ),
    "features": (
        lambda p: inits.identity()(KEY, p, features=(64, 48)),
        ValueError,
        "identity: `features` (64, 48) do not fit a grid (4, 4) of blocks (16, 16): each size must "
        "end inside the last block.",
    ),
    "returned shape": (
        lambda p: misshapen(KEY, p),
        ValueError,
        "misshapen: returned shape (16, 3) for a pattern whose values are (e, br, bc) = "
        "(16, 16, 16): return one block for each slot.",
    ),
    "dense shape": (
        lambda p: inits.from_dense(lambda key, shape, dtype: jnp.zeros(3))(KEY, p),
        TypeError,
        "from_dense: the initialiser must return an array of shape (16, 32), got ArrayImpl: put "
        "what wraps arrays, such as with_partitioning, around from_dense(init), not inside.",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call(pattern("random, 4"))


@pytest.mark.parametrize("name", EVERY)
def test_float64(name):
    """Under x64 and strict promotion no index is of another width."""
    p, features = ragged()
    with jax.enable_x64(True):
        values = EVERY[name](KEY, p, jnp.float64, features)
    assert values.dtype == np.float64
    assert np.isfinite(values).all()
