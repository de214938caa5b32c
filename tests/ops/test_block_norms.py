"""`block_norms`: an unbiased sketch, its spread, and the order that it is used for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from tests.helpers import assert_close, assert_raises, normal

KEY = jax.random.key(0)


def exact(x, dy, br, bc):
    """`||x^T dy||_F` of every block, in float64."""
    x, dy = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (x, dy))
    dense = x.T @ dy
    blocks = dense.reshape(dense.shape[0] // br, br, dense.shape[1] // bc, bc)
    return np.sqrt(np.square(blocks).sum((1, 3)))


def activations(lead, k, m, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return normal(rng, (*lead, k), dtype), normal(rng, (*lead, m), dtype)


@pytest.mark.parametrize(("lead", "block"), [((), 8), ((5,), (4, 16)), ((2, 3), (16, 1))], ids=str)
def test_exact_where_the_rank_is_not_smaller_than_the_block(block, lead):
    x, dy = activations(lead, 32, 48)
    got = bsjax.block_norms(x, dy, block, key=KEY, rank=16)
    br, bc = block if isinstance(block, tuple) else (block, block)
    assert got.shape == (32 // br, 48 // bc)
    # a norm of up to 64 entries, each a sum over at most 6 tokens
    assert_close(got, exact(x, dy, br, bc), 6 * 64)


def squared_ratios(x, dy, block, rank, keys):
    """`||M||^2 / ||x^T dy||^2` of every block, `[keys, r, c]`."""
    draw = jax.jit(jax.vmap(lambda key: bsjax.block_norms(x, dy, block, key=key, rank=rank)))
    norms = np.asarray(draw(jax.random.split(KEY, keys)), np.float64)
    return np.square(norms / exact(x, dy, *block))


def variance(rank):
    """Of that ratio for one token, where it is a product of two means of `rank` squared normals,
    each of variance `2 / rank`. Blocks of a higher rank spread less."""
    return (1 + 2 / rank) ** 2 - 1


def test_unbiased():
    """`E ||M||^2 = ||x^T dy||^2` for every rectangular block, within five standard errors."""
    keys, rank = 256, 4
    ratio = squared_ratios(*activations((3,), 64, 64), (32, 8), rank, keys).mean(0)
    error = np.sqrt(variance(rank) / keys)
    assert ratio.shape == (2, 8)
    assert np.all(np.abs(ratio - 1) < 5 * error)
    # and closer over all blocks: at least the two block-rows are independent
    assert abs(ratio.mean() - 1) < 5 * error / np.sqrt(2)


@pytest.mark.parametrize("rank", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_spread_of_one_token_is_as_derived(rank):
    """Neither smaller, which would be a biased estimate, nor larger."""
    ratios = squared_ratios(*activations((1,), 32, 32), (16, 16), rank, 1000)
    np.testing.assert_allclose(ratios.var(), variance(rank), rtol=0.35)
    np.testing.assert_allclose(ratios.mean(), 1, atol=5 * np.sqrt(variance(rank) / 2000))


def order(a):
    """The place of each number among all of them."""
    return np.argsort(np.argsort(a.ravel()))


def test_large_blocks_come_first():
    """24 x 24 blocks of 32, 512 tokens, features of unequal scale, a tenth of the blocks with a
    gradient that does not cancel: rank correlations near those of algorithms 3.9."""
    rng, blocks, side, n = np.random.default_rng(0), 24, 32, 512
    scales = rng.lognormal(sigma=0.7, size=(2, 1, blocks, 1))
    x, dy = rng.normal(size=(2, n, blocks, side)) * scales
    for i, j in np.argwhere(rng.random((blocks, blocks)) < 0.1):
        shared = rng.normal(size=(n, 1)) / 2
        x[:, i] += shared * rng.normal(size=side)
        dy[:, j] += shared * rng.normal(size=side)
    x, dy = (jnp.asarray(a.reshape(n, -1), jnp.float32) for a in (x, dy))
    truth = exact(x, dy, side, side)
    top = truth >= np.quantile(truth, 0.9)
    for rank, correlation, recall in ((2, 0.7, 0.5), (4, 0.85, 0.6), (8, 0.93, 0.75)):
        norms = np.asarray(bsjax.block_norms(x, dy, side, key=KEY, rank=rank))
        assert np.corrcoef(order(norms), order(truth))[0, 1] > correlation
        assert (top & (norms >= np.quantile(norms, 0.9))).sum() > recall * top.sum()


def test_sees_cancellation():
    """What a product of norms cannot: tokens whose contributions cancel give nothing."""
    x, dy = activations((4,), 16, 16)
    both = jnp.concatenate([x, x]), jnp.concatenate([dy, -dy])
    norms = bsjax.block_norms(*both, 8, key=KEY, rank=4)
    assert_close(norms, np.zeros((2, 2)), 8 * 64)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_result_is_float32(dtype):
    x, dy = activations((6,), 16, 16, dtype)
    got = bsjax.block_norms(x, dy, 8, key=KEY)
    assert got.dtype == jnp.float32
    assert_close(got, exact(x, dy, 8, 8), 6 * 64)


def test_float64_gives_float32_too():
    with jax.enable_x64(True):
        x, dy = activations((6,), 16, 16, jnp.float64)
        assert bsjax.block_norms(x, dy, 8, key=KEY, rank=4).dtype == jnp.float32


def test_empty():
    x, dy = activations((0,), 16, 16)
    np.testing.assert_array_equal(bsjax.block_norms(x, dy, 8, key=KEY, rank=4), np.zeros((2, 2)))
    x, dy = activations((3,), 0, 24)
    assert bsjax.block_norms(x, dy, 8, key=KEY).shape == (0, 3)


def test_keys():
    """Typed or raw; the same key the same estimate, another key another; both sides differ."""
    x, dy = activations((5,), 16, 16)
    first = bsjax.block_norms(x, dy, 8, key=KEY, rank=4)
    np.testing.assert_array_equal(first, bsjax.block_norms(x, dy, 8, key=KEY, rank=4))
    raw = bsjax.block_norms(x, dy, 8, key=jax.random.key_data(KEY), rank=4)
    np.testing.assert_array_equal(first, raw)
    other = bsjax.block_norms(x, dy, 8, key=jax.random.key(1), rank=4)
    assert not np.allclose(first, other)
    # one projection for both sides would make x^T x of one token a square: never too small
    ratios = [
        bsjax.block_norms(x[:1], x[:1], 16, key=jax.random.key(i), rank=1)[0, 0] for i in range(60)
    ]
    squares = np.square(np.asarray(ratios) / exact(x[:1], x[:1], 16, 16)[0, 0])
    # independent sides have mean 1, one shared projection 3
    assert squares.mean() < 2


def test_no_derivative():
    """A score, not a loss: its gradient is zero and not an error."""
    x, dy = activations((5,), 16, 16)
    dx = jax.grad(lambda x: bsjax.block_norms(x, dy, 8, key=KEY, rank=4).sum())(x)
    assert not np.any(dx)


X, Y = jnp.ones((5, 24)), jnp.ones((5, 64))
SEVERAL = jax.random.split(KEY)

WRONG = {
    "seed": (
        lambda: bsjax.block_norms(X, Y, (8, 16), key=0),
        TypeError,
        "block_norms: `key` must be one PRNG key, got 0: make one with jax.random.key(seed) and "
        "split it for every call.",
    ),
    "several keys": (
        lambda: bsjax.block_norms(X, Y, (8, 16), key=SEVERAL),
        TypeError,
        f"block_norms: `key` must be one PRNG key, got {SEVERAL!r}: make one with "
        "jax.random.key(seed) and split it for every call.",
    ),
    "block": (
        lambda: bsjax.block_norms(X, Y, 16, key=KEY),
        ValueError,
        "block_norms: the features of `x`, shape (5, 24), must be a multiple of the block side "
        "16: pad them with zeros.",
    ),
    "block of the gradient": (
        lambda: bsjax.block_norms(X, Y, (8, 24), key=KEY),
        ValueError,
        "block_norms: the features of `dy`, shape (5, 64), must be a multiple of the block side "
        "24: pad them with zeros.",
    ),
    "no block": (
        lambda: bsjax.block_norms(X, Y, 0, key=KEY),
        ValueError,
        "block_norms: `block` must be at least 1, got 0.",
    ),
    "tokens of the gradient": (
        lambda: bsjax.block_norms(X, Y[:4], 8, key=KEY),
        ValueError,
        "block_norms: `x` and `dy` must have the same leading axes, got shapes (5, 24) and "
        "(4, 64).",
    ),
    "no rank": (
        lambda: bsjax.block_norms(X, Y, 8, key=KEY, rank=0),
        ValueError,
        "block_norms: `rank` must be at least 1, got 0.",
    ),
    "half a rank": (
        lambda: bsjax.block_norms(X, Y, 8, key=KEY, rank=0.5),
        TypeError,
        "block_norms: `rank` must be a whole number, got 0.5 of type float.",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_message(call, error, message):
    assert_raises(call, error, message)
