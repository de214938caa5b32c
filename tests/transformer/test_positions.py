"""Learned positions are the rows of a table, wherever the positions come from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax.linen
import bsjax.nnx
from tests.helpers import assert_raises, normal

RNG = np.random.default_rng(0)
N, LENGTH, WIDTH = 2, 11, 6
X = normal(RNG, (N, LENGTH, WIDTH))


def make(**options):
    return bsjax.nnx.LearnedPositions(LENGTH, WIDTH, rngs=nnx.Rngs(0), **options)


def linen(layer, x, **options):
    twin = bsjax.linen.LearnedPositions(LENGTH)
    return twin.apply(bsjax.linen.from_nnx(layer), x, **options)


def nnx_call(layer, x, **options):
    return layer(x, **options)


@pytest.mark.parametrize("call", [nnx_call, linen])
def test_rows(call):
    layer = make()
    table = layer.embedding[...]
    np.testing.assert_array_equal(call(layer, X), X + table[None])
    np.testing.assert_array_equal(call(layer, X[0, :5]), X[0, :5] + table[:5])
    each = RNG.integers(0, LENGTH, (N, LENGTH))
    np.testing.assert_array_equal(call(layer, X, input_positions=each), X + table[each])
    np.testing.assert_array_equal(call(layer, X, input_positions=each[0]), X + table[each[:1]])
    y = jax.jit(lambda at: call(layer, X, input_positions=at))(np.arange(LENGTH) - 1)
    assert jnp.isnan(y[:, 0]).all()
    np.testing.assert_array_equal(y[:, 1:], X[:, 1:] + table[None, :-1])
    low = call(layer, X.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    gradient = jax.grad(lambda x: (call(layer, x) * X).sum())(X)
    np.testing.assert_array_equal(gradient, X)


def test_decoding_counts_on():
    layer = make()
    want = layer(X)
    layer.init_cache(X.shape)
    parts = [layer(X[:, i:j], decode=True) for i, j in ((0, 4), (4, 5), (5, 11))]
    np.testing.assert_array_equal(jnp.concatenate(parts, axis=1), want)
    assert jnp.isnan(nnx.jit(lambda layer, x: layer(x, decode=True))(layer, X[:, :1])).all()
    layer.init_cache(X.shape, ragged=True)
    layer(X[:, :3], decode=True, kv_lengths=jnp.array([3, 1]))
    # padding may reach past the end
    y = layer(X[:, :9], decode=True, kv_lengths=jnp.array([8, 9]))
    np.testing.assert_array_equal(y[0, :8], X[0, :8] + layer.embedding[3:])
    np.testing.assert_array_equal(y[1], X[1, :9] + layer.embedding[1:10])
    twin = bsjax.linen.LearnedPositions(LENGTH, decode=True)
    variables = twin.init(jax.random.key(0), X)
    assert variables["cache"]["cache_index"] == 0
    variables["params"] = bsjax.linen.from_nnx(layer)["params"]
    y, state = twin.apply(variables, X[:, :4], mutable=["cache"])
    z, _ = twin.apply(variables | state, X[:, 4:], mutable=["cache"])
    np.testing.assert_array_equal(jnp.concatenate([y, z], axis=1), want)


@pytest.mark.parametrize("call", [nnx_call, linen])
def test_errors(call):
    error, layer = functools.partial(assert_raises, error=ValueError), make()
    error(
        lambda: call(layer, jnp.zeros((N, LENGTH + 1, WIDTH))),
        message="LearnedPositions: position 11 is not one of the 11 of the table: make it for the "
        "longest sequence.",
    )
    error(
        lambda: call(layer, X, input_positions=np.arange(LENGTH) - 1),
        message="LearnedPositions: position -1 is not one of the 11 of the table: make it for the "
        "longest sequence.",
    )
    error(
        lambda: call(layer, X, input_positions=np.arange(3)),
        message="LearnedPositions: `input_positions` of shape (3,) must have (11,) or (2, 11): a "
        "number for each position.",
    )


def test_errors_of_decoding_and_of_features():
    error, layer = functools.partial(assert_raises, error=ValueError), make()
    error(
        lambda: layer(X[..., :5]),
        message="LearnedPositions: `x` of shape (2, 11, 5) must be (..., positions, 6): the table "
        "has 6 features.",
    )
    error(
        lambda: layer(X, decode=True),
        message="LearnedPositions: there is no cache to decode with: call init_cache(input_shape) "
        "first, with the shape of the whole sequence.",
    )
    layer.init_cache(X.shape)
    error(
        lambda: layer(X, decode=True, kv_lengths=jnp.array([3, 1])),
        message="LearnedPositions: `kv_lengths` do not go with this cache, in which all sequences "
        "have the same positions: make one that counts those of each sequence, with "
        "`ragged=True`.",
    )
