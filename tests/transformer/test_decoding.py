"""Decoding, one position or several at a time, is the full pass, and reads what it needs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax
import bsjax.linen
import bsjax.nnx
from bsjax import _decoding, masks
from tests.helpers import assert_raises, normal, random_mask, slow
from tests.transformer import oracle

RNG = np.random.default_rng(0)
N, LENGTH, WIDTH, HEADS, BLOCK = 2, 45, 12, 4, 8
X = normal(RNG, (N, LENGTH, WIDTH))
CAUSAL = masks.causal()
TERMS = WIDTH + 4 + LENGTH + 9 + 16  # projections, scores, keys and memory, the last projection
# of many blocks; over the border of two, up to one, from one on; position by position
CHUNKS = (21, 1, 5, 5, 5, *[1] * 8)

DENSE = {"implementation": "dense"}  # compiles faster

CASES = {
    "window and sinks": {"mask": masks.streaming(9, 3), "rotary": True, "num_kv_heads": 2},
    "longformer, with memory": {"mask": CAUSAL & masks.longformer(5, 3), "persistent": 5, **DENSE},
    "one mask per head": {
        "mask": masks.per_head([CAUSAL & masks.window(9), CAUSAL & masks.every(12)] * 2),
        "num_kv_heads": 2,
        "persistent": 9,
    },
    "a pattern of its own": {
        "mask": CAUSAL,
        "pattern": bsjax.BlockPattern.from_mask(random_mask(6, 6, 0.5, seed=1), BLOCK),
        "sinks": True,
        **DENSE,
    },
}


def make(**options):
    options = {"block": BLOCK, **options}
    return bsjax.nnx.BlockAttention(HEADS, WIDTH, 16, rngs=nnx.Rngs(0), **options)


TABLE = normal(RNG, (HEADS, LENGTH))


def by_distance(head, q, k):
    return TABLE[head, jnp.maximum(q - k, 0)]


@functools.partial(nnx.jit, static_argnames="bias")
def full(layer, x, bias=None):
    return layer(x, bias=bias)


@functools.partial(nnx.jit, static_argnames="bias")
def decode(layer, x, bias=None):
    return layer(x, decode=True, bias=bias)


def in_chunks(layer, x, chunks, bias=None):
    layer.init_cache(x.shape)
    parts = jnp.split(x, np.cumsum(chunks), axis=1)[: len(chunks)]
    return jnp.concatenate([decode(layer, part, bias=bias) for part in parts], axis=1)


LONG = "longformer, with memory"


@pytest.mark.parametrize("name", [slow(name) if name == LONG else name for name in CASES])
def test_is_the_full_pass(name):
    layer, bias = make(**CASES[name]), by_distance if name == "one mask per head" else None
    got, want = in_chunks(layer, X, CHUNKS, bias), full(layer, X, bias=bias)
    oracle.assert_close(got, want, TERMS)
    assert int(layer.cache_index[...]) == LENGTH


def test_reads_only_the_blocks_that_are_needed():
    """NaN in all others does not show; and a block of queries gathers no more than it may need."""
    layer = make(**CASES["window and sinks"])
    want = full(layer, X)
    layer.init_cache(X.shape)
    for i in (0, 19):  # 40 positions, two of them twice
        layer.cache_index[...] = jnp.int32(i)
        decode(layer, X[:, i : i + 21])
    needed = layer.options.mask.blocks((LENGTH, LENGTH), BLOCK)[0][40 // BLOCK]
    hidden = jnp.repeat(~needed, BLOCK)[:LENGTH]
    assert hidden.sum() >= 2 * BLOCK
    for cache in (layer.cached_key, layer.cached_value):
        cache[...] = jnp.where(hidden[None, :, None, None], jnp.nan, cache[...])
    oracle.assert_close(decode(layer, X[:, 40:41]), want[:, 40:41], TERMS)
    q, k = (jax.ShapeDtypeStruct((N, size, 4, 4), jnp.float32) for size in (1, 4096))
    o = make(mask=masks.streaming(64, 4)).options
    program = str(
        jax.make_jaxpr(functools.partial(_decoding.attend_cached, o, pattern=None))(
            q, k, k, jax.ShapeDtypeStruct((), jnp.int32)
        )
    )
    assert "f32[2,80,4,4]" in program  # ten blocks of a row: nine of the window, and the sinks
    assert program.count("f32[2,4096,4,4]") <= 4  # nothing is made of the cache


def test_the_blocks_of_a_traced_pattern():
    """They cannot be counted, and yet the others are not read."""
    layer = make(**(CASES["a pattern of its own"] | {"implementation": "auto"}))
    layer.init_cache(X.shape)
    layer.cached_key[...], layer.cached_value[...] = normal(RNG, (2, N, LENGTH, HEADS, 4))

    def at_40():
        layer.cache_index[...] = jnp.int32(40)
        return decode(layer, X[:, 40:41])

    want, stored = at_40(), layer.pattern.get_value().mask()[40 // BLOCK]
    assert 1 < stored.sum() < 6
    hidden = ~jnp.repeat(stored, BLOCK)[None, :LENGTH, None, None]
    for cache in (layer.cached_key, layer.cached_value):
        cache[...] = jnp.where(hidden, jnp.nan, cache[...])
    np.testing.assert_array_equal(at_40(), want)
    assert jnp.isfinite(want).all()


def test_nothing_behind_itself_is_seen():
    """Also where the mask would say so: the same for chunks of any size."""
    layer = make(mask=masks.longformer(5, 3), **DENSE)
    causal = make(mask=CAUSAL & masks.longformer(5, 3), **DENSE)
    got, want = in_chunks(layer, X, (21, 5)), full(causal, X)[:, :26]
    oracle.assert_close(got, want, TERMS)


def test_bfloat16_and_the_past_is_fixed():
    layer = make(mask=masks.streaming(9, 3), dtype=jnp.bfloat16, **DENSE)
    got = in_chunks(layer, X, (21, 5))
    assert got.dtype == layer.cached_key.dtype == jnp.bfloat16
    other = in_chunks(layer, X.at[:, 25].add(1), (21, 5))
    np.testing.assert_array_equal(got[:, :25], other[:, :25])
    assert not np.array_equal(got[:, 25], other[:, 25])
    # what is attended to, a projection and its bias, in both
    oracle.assert_close(got, full(layer, X)[:, :26], TERMS, roundings=2 * 3)


def test_linen():
    ours = make(**CASES["window and sinks"])
    twin = bsjax.linen.BlockAttention(
        HEADS, qkv_features=16, block=BLOCK, decode=True, **CASES["window and sinks"]
    )
    shapes = jax.eval_shape(twin.init, jax.random.key(0), X)
    cache = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes["cache"])
    variables, parts = bsjax.linen.from_nnx(ours), []
    apply = jax.jit(functools.partial(twin.apply, mutable=["cache"]))
    want = in_chunks(ours, X, (21, 1))
    for part in (X[:, :21], X[:, 21:22]):
        y, state = apply({**variables, "cache": cache}, part)
        cache = state["cache"]
        parts.append(y)
    oracle.assert_close(jnp.concatenate(parts, axis=1), want, TERMS)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(
        jnp.shape, bsjax.linen.from_nnx(ours)["cache"]
    )


def test_errors():
    error = functools.partial(assert_raises, error=ValueError)
    layer = make(mask=CAUSAL)
    one = X[:, :1]
    error(
        lambda: layer(one, decode=True),
        message="BlockAttention: there is no cache to decode with: call init_cache(input_shape) "
        "first, with the shape of the whole sequence.",
    )
    layer.init_cache((N, 2, WIDTH))
    error(
        lambda: layer(X[:, :3], decode=True),
        message="BlockAttention: the cache holds 2 positions and 0 are taken, so 3 more do not "
        "fit: make it for the longest sequence.",
    )
    error(
        lambda: layer(one[0], decode=True),
        message="BlockAttention: the cache has shape (2, 2, 4, 4), but new keys have (1, 4, 4): "
        "make it for inputs of these leading axes.",
    )
    error(
        lambda: layer(one, decode=True, kv_lengths=jnp.ones(N, jnp.int32)),
        message="BlockAttention: `kv_lengths` do not go with this cache, in which all sequences "
        "have the same positions: make one that counts those of each sequence, with "
        "`ragged=True`.",
    )
    error(
        lambda: layer(one, X, decode=True),
        message="BlockAttention: a mask, a pattern or rotary positions between decoded queries and "
        "`inputs_k` are not supported, since these have no cache that counts positions: leave "
        "them out of attention to an encoder.",
    )
    with_pattern = make(**CASES["a pattern of its own"])
    with_pattern.init_cache((N, 20, WIDTH))
    error(
        lambda: with_pattern(one, decode=True),
        message="BlockAttention: 20 positions in blocks of (8, 8) are a grid of (3, 3), but "
        "`pattern` has (6, 6): the inputs, or the cache of a decoder, must be as long as the "
        "sequences that the pattern is for.",
    )
    error(
        lambda: jax.jit(_decoding.written)(jnp.zeros((2, 4, 4)), jnp.zeros((3, 4, 4)), 0),
        message="BlockAttention: 3 positions do not fit a cache of 2: make it for the longest "
        "sequence.",
    )
    # under jit it cannot be seen: no number is better than a wrong one
    layer.cache_index[...] = jnp.int32(2)
    assert jnp.isnan(decode(layer, one)).all()
