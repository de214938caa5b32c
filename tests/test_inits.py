"""Initialisers: the variance they promise, on patterns small and large."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers as standard

import bsjax
from bsjax import inits, patterns

KEY, OTHER = jax.random.key(7), jax.random.key(8)
MASKS = {
    "random, 4": patterns.random((4, 4), 0.5, seed=1),
    "Barabasi-Albert, 4": patterns.barabasi_albert(4, 2),
    "full, 4": np.ones((4, 4), bool),
    "random, 64": patterns.random((64, 64), 0.1, seed=1),
    "Barabasi-Albert, 64": patterns.barabasi_albert(64, 4),
    "full, 64": np.ones((64, 64), bool),
}


CAPACITY = {"4": 16, "64": 600}  # of one length, so that one compilation serves several patterns


def pattern(name):
    capacity = None if name == "full, 64" else CAPACITY[name.split()[-1]]
    return bsjax.BlockPattern.from_mask(MASKS[name], 16, capacity=capacity)


def ragged():
    """An empty block-row and block-column, a hub, spare slots, odd sizes, oblong blocks."""
    mask = patterns.random((5, 4), 0.5, seed=3)
    mask[:, 2] = True
    mask[1] = mask[:, 1] = False
    mask[-1, -1] = True
    p = bsjax.BlockPattern.from_mask(mask, (8, 6), capacity=int(mask.sum()) + 3)
    return p, (5 * 8 - 5, 4 * 6 - 2)


def column(values, p, j, features=None):
    """The stored inputs of block-column `j` as a matrix, without padding."""
    k, m = features or p.shape
    dense = np.asarray(bsjax.todense(values, p), np.float64)[:k, :m]
    rows = np.repeat(np.asarray(p.mask())[:, j], p.block[0])[:k]
    return dense[rows, j * p.block[1] : (j + 1) * p.block[1]]


def within_sampling_error(sample, variance):
    """The mean square of n draws of a normal is off by `sqrt(2 / n)`, a flatter one less."""
    np.testing.assert_allclose(np.mean(sample**2), variance, rtol=6 * (2 / sample.size) ** 0.5)


def mean_out(p):
    """Fan-out as `from_dense` counts it: stored outputs of an input on average, in whole blocks."""
    return max(1, round(p.nnz / p.grid[0])) * p.block[1]


VARIANCES = {
    "stored_fan_in": (inits.stored_fan_in(), lambda fan, out: 1 / fan),
    "stored_fan_in, ReLU": (inits.stored_fan_in(2**0.5), lambda fan, out: 2 / fan),
    "lecun_normal": (standard.lecun_normal(), lambda fan, out: 1 / fan),
    "he_uniform": (standard.he_uniform(), lambda fan, out: 2 / fan),
    "glorot_uniform": (standard.glorot_uniform(), lambda fan, out: 2 / (fan + out)),
    "orthogonal of dense": (standard.orthogonal(), lambda fan, out: 1 / max(fan, out)),
    "normal": (standard.normal(0.1), lambda fan, out: 0.01),
    "constant": (standard.constant(0.3), lambda fan, out: 0.09),
    "orthogonal": (inits.orthogonal(), lambda fan, out: 1 / max(fan, 16)),
}
OURS = ["stored_fan_in", "orthogonal"]


def slow(init, name):
    """Each stored fan-in compiles a standard initialiser anew; large grids and hubs have many."""
    return init not in OURS and name not in ("random, 4", "full, 4")


@pytest.mark.parametrize(
    ("init", "name"),
    [
        pytest.param(init, name, marks=pytest.mark.slow if slow(init, name) else ())
        for init in VARIANCES
        for name in MASKS
    ],
)
def test_variance_of_each_block_column(init, name):
    p = pattern(name)
    init, variance = VARIANCES[init]
    values = inits.initialize(init, KEY, p, jnp.float32)
    assert values.shape == (p.capacity, *p.block)
    for j in np.flatnonzero(p.mask().any(0)):
        sample = column(values, p, j)
        within_sampling_error(sample, variance(len(sample), mean_out(p)))


# ---------------------------------------------------------------- both directions


@pytest.fixture
def unit_draws(monkeypatch):
    """Draws of exactly one: the values of a normal initialiser are its standard deviations."""

    def ones(key, variance, block):
        return jnp.broadcast_to(jnp.sqrt(variance)[:, None, None], (len(variance), *block))

    monkeypatch.setattr(inits, "_normal", ones)


@pytest.mark.parametrize("gain", [1.0, 2**0.5])
@pytest.mark.parametrize(
    "mask",
    [
        patterns.barabasi_albert(4, 2),
        patterns.barabasi_albert(64, 4),
        patterns.barabasi_albert(576, 8),
        patterns.watts_strogatz(4, 1, 0.2),
        patterns.watts_strogatz(576, 8, 0.2),
    ],
    ids=["BA 4", "BA 64", "BA 576", "WS 4", "WS 576"],
)
def test_sinkhorn_keeps_variance_in_both_directions(unit_draws, mask, gain):
    p = bsjax.BlockPattern.from_mask(mask, 1)
    variance = np.asarray(bsjax.todense(inits.sinkhorn(gain)(KEY, p), p)) ** 2
    np.testing.assert_allclose(variance.sum(0), gain**2, rtol=0.02)  # of y, for unit x
    np.testing.assert_allclose(variance.sum(1), gain**2, rtol=0.02)  # of dx, for unit dy


def test_fan_in_alone_is_unfair_to_gradients(unit_draws):
    """Why `sinkhorn` exists: the numbers of a hub pattern under the rule that counts fan-in."""
    p = bsjax.BlockPattern.from_mask(patterns.barabasi_albert(576, 8), 1)
    variance = np.asarray(bsjax.todense(inits.stored_fan_in()(KEY, p), p)) ** 2
    np.testing.assert_allclose(variance.sum(0), 1, rtol=1e-5)
    assert variance.sum(1).max() > 4


@pytest.mark.parametrize("mask", [np.ones((5, 4), bool), patterns.banded((5, 4), 1)])
def test_sinkhorn_of_a_rectangle_with_padding(unit_draws, mask):
    p, (k, m) = bsjax.BlockPattern.from_mask(mask, (8, 6)), (37, 20)
    variance = np.asarray(bsjax.todense(inits.sinkhorn()(KEY, p, features=(k, m)), p)) ** 2
    np.testing.assert_allclose(variance.sum(0)[:m], 1, rtol=1e-3)
    np.testing.assert_allclose(variance.sum(1)[:k], m / k, rtol=1e-3)


def test_sinkhorn_draws_a_normal():
    p = pattern("full, 64")
    values = np.asarray(inits.sinkhorn()(KEY, p), np.float64)
    within_sampling_error(values, 1 / p.shape[0])
    assert abs(np.mean(values**4) / np.mean(values**2) ** 2 - 3) < 0.05  # the kurtosis of a normal


# ---------------------------------------------------------------- identity and orthogonal


@pytest.mark.parametrize("name", MASKS)
def test_identity_passes_everything_through(name):
    p = pattern(name)
    x = jax.random.normal(KEY, (3, p.shape[0]))
    stored = np.repeat(np.diag(p.mask()), 16)
    y = bsjax.matmul(x, inits.identity(2.0)(KEY, p), p)
    np.testing.assert_array_equal(y, np.where(stored, 2 * x, 0))


def test_identity_with_oblong_blocks():
    p = bsjax.BlockPattern.from_mask(np.ones((6, 3), bool), (4, 8))
    np.testing.assert_array_equal(bsjax.todense(inits.identity()(KEY, p), p), np.eye(24))


@pytest.mark.parametrize("grid", [(6, 2), (2, 6), (5, 3)])
def test_identity_of_a_rectangle_stacks_identities(grid):
    p = bsjax.BlockPattern.from_mask(np.ones(grid, bool), 4)
    dense = np.asarray(bsjax.todense(inits.identity()(KEY, p), p))
    k, m = p.shape
    at = np.arange(k)[:, None] % m == np.arange(m) % k
    np.testing.assert_array_equal(dense != 0, at)
    np.testing.assert_allclose((dense**2).sum(0), 1, rtol=1e-6)


def test_orthogonal_columns():
    for p, features in (ragged(), (pattern("random, 64"), (1024, 1024))):
        values = inits.orthogonal(3.0)(KEY, p, features=features)
        for j in np.flatnonzero(p.mask().any(0)):
            q = column(values, p, j, features)
            small = q.T @ q if q.shape[0] >= q.shape[1] else q @ q.T
            np.testing.assert_allclose(small, 9 * np.eye(len(small)), atol=9e-5)


def test_orthogonal_is_uniform():
    """LAPACK gives the first number of Q a sign of its own choice."""
    p = pattern("random, 64")
    values, start = inits.orthogonal()(KEY, p), np.searchsorted(p.col, np.arange(64))
    assert 10 < np.sum(np.asarray(values)[start, 0, 0] > 0) < 54


# ---------------------------------------------------------------- standard initialisers


DENSE = {
    "lecun_normal": standard.lecun_normal(),
    "he_uniform": standard.he_uniform(),
    "glorot_normal": standard.glorot_normal(),
    "orthogonal": standard.orthogonal(),
    "constant": standard.constant(0.3),
}


@pytest.mark.parametrize("init", DENSE)
@pytest.mark.parametrize("features", [(40, 24), (37, 20)])
def test_a_full_pattern_gets_the_numbers_of_a_dense_layer(init, features):
    dtype = jnp.bfloat16 if init == "he_uniform" else jnp.float32
    init = DENSE[init]
    p = bsjax.BlockPattern.from_mask(np.ones((5, 4), bool), (8, 6))
    dense = bsjax.todense(inits.from_dense(init)(KEY, p, dtype, features), p)
    (k, m), want = features, init(KEY, features, dtype)
    assert dense.dtype == want.dtype
    np.testing.assert_array_equal(dense[:k, :m], want)
    assert not dense[k:].any()
    assert not dense[:, m:].any()


def test_a_standard_initialiser_is_drawn_wide():
    """Once for every `group` block-columns, not once for each."""
    shapes = []

    def init(key, shape, dtype):
        shapes.append(shape)
        return jnp.zeros(shape, dtype)

    mask = np.zeros((64, 64), bool)
    mask[:8, :40] = mask[:4, 40:] = True  # 416 blocks: 6.5 in a block-row
    inits.from_dense(init)(KEY, bsjax.BlockPattern.from_mask(mask, 2))
    assert shapes == [(8, 12)] * 4 + [(16, 12)] * 7
