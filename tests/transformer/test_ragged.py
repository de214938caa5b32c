"""Prompts of unequal length in one batch: each sequence is decoded as if it were alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax.linen
import bsjax.nnx
from bsjax import masks
from tests.helpers import assert_raises, normal, slow
from tests.transformer import oracle

RNG = np.random.default_rng(0)
LENGTH, WIDTH, HEADS, BLOCK = 29, 12, 4, (8, 4)
X = normal(RNG, (3, LENGTH, WIDTH))
TERMS = WIDTH + 4 + LENGTH + 5 + 16  # projections, scores, keys and memory, the last projection
# new positions of each sequence: prompts in two chunks, one by one, and to the end
CHUNKS = (
    (8, (8, 7, 0)), (8, (8, 3, 1)), (1, (1, 1, 1)), (1, (1, 0, 1)), (8, (8, 8, 8)), (8, (3, 8, 8)),
)  # fmt: skip
CASES = {
    "window and rotary": {
        "mask": masks.streaming(9, 3), "rotary": True, "num_kv_heads": 2, "implementation": "dense",
    },
    "top blocks and memory": {
        "mask": masks.per_head([masks.causal() & masks.window(17), masks.causal()] * 2),
        "top_blocks": 2, "persistent": 5, "num_kv_heads": 2, "rotary": True,
    },
    "bigbird, sinks and a bias": {
        "mask": masks.bigbird(block=4, window=1, random=1, causal=True),
        "block": 4, "sinks": True, "implementation": "dense",
    },
}  # fmt: skip
TABLE = normal(RNG, (HEADS, LENGTH))


def by_distance(head, q, k):
    return TABLE[head, (q - k).clip(0, LENGTH - 1)]


def make(name):
    options = {"block": BLOCK, "bias_init": nnx.initializers.normal(), **CASES[name]}
    layer = bsjax.nnx.BlockAttention(HEADS, WIDTH, 16, rngs=nnx.Rngs(0), **options)
    if layer.sinks is not None:
        layer.sinks[...] = normal(np.random.default_rng(1), (HEADS,))
    return layer


@functools.partial(nnx.jit, static_argnames="bias")
def full(layer, x, bias=None):
    return layer(x, bias=bias)


@functools.partial(nnx.jit, static_argnames="bias")
def decode(layer, x, lengths=None, bias=None):
    return layer(x, decode=True, kv_lengths=lengths, bias=bias)


def chunks(x):
    """The next positions of each sequence, NaN behind them, where they begin, and how many."""
    start = np.zeros(len(x), int)
    for size, lengths in CHUNKS:
        part = np.full((len(x), size, WIDTH), np.nan, np.float32)
        for n, length in enumerate(lengths):
            part[n, :length] = x[n, start[n] : start[n] + length]
        yield jnp.asarray(part), start.copy(), np.int32(lengths)
        start += lengths


QUICK = ("top blocks and memory",)


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in CASES])
def test_each_sequence_is_alone(name):
    layer, bias = make(name), by_distance if name.startswith("bigbird") else None
    want = full(layer, X, bias=bias)
    most = float(jnp.abs(want).max())
    layer.init_cache(X.shape, ragged=True)
    for part, start, lengths in chunks(X):
        got = decode(layer, part, lengths, bias=bias)
        for n, length in enumerate(lengths):
            here = slice(start[n], start[n] + length)
            if length:
                oracle.assert_close(got[n, :length], want[n, here], TERMS, least=most)
        np.testing.assert_array_equal(layer.cache_index[...], start + lengths)
    assert start[0] + lengths[0] == LENGTH
    assert jnp.isfinite(layer.cached_key[...]).all()
    # what does not fit is no number, of that sequence only
    y = decode(layer, X[:, :1], bias=bias)
    np.testing.assert_array_equal(jnp.isnan(y).all((1, 2)), start + lengths == LENGTH)


def test_linen_and_a_layer_with_learned_positions():
    """The same in Linen, of a model of both."""
    attention = {"block": BLOCK, "qkv_features": 16, **CASES["window and rotary"]}
    ours = bsjax.nnx.BlockTransformerLayer(
        WIDTH, HEADS, attention=attention, mlp={"hidden_features": 8}, rngs=nnx.Rngs(0)
    )
    places = bsjax.nnx.LearnedPositions(LENGTH, WIDTH, rngs=nnx.Rngs(1))
    want = nnx.jit(lambda places, layer, x: layer(places(x)))(places, ours, X)
    most = float(jnp.abs(want).max())
    for one in (places, ours):
        one.init_cache(X.shape, ragged=True)

    @nnx.jit
    def step(places, layer, x, lengths):
        x = places(x, decode=True, kv_lengths=lengths)
        return layer(x, decode=True, kv_lengths=lengths)

    twin = bsjax.linen.BlockTransformerLayer(
        HEADS, attention=attention | {"ragged": True}, mlp={"hidden_features": 8}, decode=True
    )
    twins = bsjax.linen.LearnedPositions(LENGTH, decode=True, ragged=True), twin
    variables = [bsjax.linen.from_nnx(one) for one in (places, ours)]
    for one, state in zip(twins, variables, strict=True):
        shapes = jax.eval_shape(one.init, jax.random.key(0), X)
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, state)

    @jax.jit
    def linen(variables, x, lengths):
        state = []
        for one, own in zip(twins, variables, strict=True):
            x, cache = one.apply(own, x, kv_lengths=lengths, mutable=["cache"])
            state.append({**own, **cache})
        return x, state

    for part, start, lengths in list(chunks(X))[:2]:
        y = step(places, ours, part, lengths)
        z, variables = linen(variables, part, lengths)
        for n, length in enumerate(lengths):
            here = slice(start[n], start[n] + length)
            for got in (y, z):
                if length:
                    oracle.assert_close(got[n, :length], want[n, here], 2 * TERMS, least=most)


def test_errors():
    error = functools.partial(assert_raises, error=ValueError)
    layer = make("window and rotary")
    layer.init_cache((3, 4, WIDTH), ragged=True)
    error(
        lambda: layer(X[:, :2], decode=True, kv_lengths=jnp.ones(2, jnp.int32)),
        message="BlockAttention: `kv_lengths` of shape (2,) must have (3,): how many of the new "
        "positions each sequence has.",
    )
    layer.cache_index[...] = jnp.array([1, 3, 2])
    error(
        lambda: layer(X[:, :2], decode=True),
        message="BlockAttention: the cache holds 4 positions and 3 are taken, so 2 more do not "
        "fit: make it for the longest sequence.",
    )
    error(
        lambda: layer(X[:, :2], decode=True, q_segment_ids=jnp.zeros(2, jnp.int32)),
        message="BlockAttention: segments do not go with decoding: decode each document as a "
        "sequence of its own, with `kv_lengths` and a cache that is `ragged`.",
    )
