"""Keys and values of an encoder are computed once, and decoding attends to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bsjax.linen
import bsjax.nnx
from bsjax import masks
from tests.helpers import assert_raises, normal
from tests.transformer import oracle

RNG = np.random.default_rng(0)
N, LENGTH, WIDTH, HEADS = 2, 6, 12, 4
X, ENCODED = (normal(RNG, (N, size, WIDTH)) for size in (LENGTH, 9))
LENGTHS = jnp.array([9, 4])
TERMS = 4 * WIDTH + 2 * 4 + LENGTH + 9 + 8
OPTIONS = {
    "attention": {"mask": masks.causal(), "block": 4, "implementation": "dense"},
    "cross_attention": {"block": 4, "persistent": 3, "num_kv_heads": 2, "normalize_qk": True},
    "mlp": {"hidden_features": 8},
}


def make():
    return bsjax.nnx.BlockTransformerLayer(WIDTH, HEADS, rngs=nnx.Rngs(0), **OPTIONS)


@nnx.jit
def decode(layer, x, encoded=None):
    return layer(x, encoded, encoded_lengths=LENGTHS, decode=True)


def test_is_attention_to_the_encoder():
    layer = make()
    want = nnx.jit(lambda layer, *a: layer(*a, encoded_lengths=LENGTHS))(layer, X, ENCODED)
    layer.init_cache(X.shape, encoded=ENCODED)
    assert layer.cross_attention.cached_key.shape == (N, 9, 2, 3)
    for kernel in (layer.cross_attention.key.kernel, layer.cross_attention.value.kernel):
        kernel[...] = jnp.full(kernel.shape, jnp.nan)  # no key is made again
    parts = [decode(layer, X[:, :3]), decode(layer, X[:, 3:])]
    oracle.assert_close(jnp.concatenate(parts, axis=1), want, TERMS)
    layer.init_cache(X.shape)  # forgets them
    assert not layer.cross_attention.has_keys()


def test_what_is_given_goes_first():
    layer = make()
    layer.init_cache(X.shape, encoded=ENCODED)
    other = normal(RNG, ENCODED.shape)
    got = decode(layer, X[:, :3], other)
    layer.init_cache(X.shape, encoded=other)
    oracle.assert_close(got, decode(layer, X[:, :3]), TERMS)


def test_linen():
    layer = make()
    layer.init_cache(X.shape, encoded=ENCODED)
    want = [decode(layer, X[:, i : i + 3]) for i in (0, 3)]
    twin = bsjax.linen.BlockTransformerLayer(HEADS, decode=True, **OPTIONS)
    shapes = jax.eval_shape(twin.init, jax.random.key(0), X, ENCODED)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, bsjax.linen.from_nnx(layer))
    cache = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes["cache"])
    variables = {**bsjax.linen.from_nnx(layer), "cache": cache}
    apply = jax.jit(functools.partial(twin.apply, mutable=["cache"], encoded_lengths=LENGTHS))
    y, state = apply(variables, X[:, :3], ENCODED)
    oracle.assert_close(y, want[0], TERMS)
    cross = variables["params"]["cross_attention"]
    cross = cross | {name: jax.tree.map(lambda a: a * jnp.nan, cross[name]) for name in ("key",)}
    params = variables["params"] | {"cross_attention": cross}
    z, _ = apply({**variables, **state, "params": params}, X[:, 3:])
    oracle.assert_close(z, want[1], TERMS)


def test_attention_alone():
    layer = bsjax.nnx.BlockAttention(HEADS, WIDTH, block=4, rngs=nnx.Rngs(0))
    want = layer(X, ENCODED, 2 * ENCODED)
    layer.cache_keys(ENCODED, 2 * ENCODED)
    np.testing.assert_array_equal(layer(X, decode=True), want)


def test_errors():
    layer = make()
    layer.init_cache(X.shape)
    assert_raises(
        lambda: layer(X[:, :1], decode=True),
        ValueError,
        "BlockTransformerLayer: it attends to what an encoder gives, which is missing: call it "
        "with `encoded`, of shape (..., positions, features).",
    )
    causal = bsjax.nnx.BlockAttention(HEADS, WIDTH, mask=masks.causal(), rngs=nnx.Rngs(0))
    assert_raises(
        lambda: causal.cache_keys(ENCODED),
        ValueError,
        "BlockAttention: a mask, a pattern or rotary positions between decoded queries and "
        "`inputs_k` are not supported, since these have no cache that counts positions: leave "
        "them out of attention to an encoder.",
    )
