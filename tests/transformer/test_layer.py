"""`BlockTransformerLayer`: what it adds up to, both dialects, transformations, training."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bsjax
import bsjax.linen
import bsjax.nnx
from bsjax import masks
from tests.helpers import assert_raises, normal, random_mask
from tests.transformer import oracle

RNG = np.random.default_rng(0)
N, LENGTH, WIDTH, HEADS, BLOCK = 2, 19, 16, 4, 8
TERMS = WIDTH + 4 + LENGTH + WIDTH + WIDTH + 32  # projections, scores, their sum, an MLP
X, ENCODED = (normal(RNG, (N, size, WIDTH)) for size in (LENGTH, 11))
MASK = masks.causal() & masks.window(9)
# "dense" compiles fastest; which one runs does not matter here
ATTENTION = {"mask": MASK, "block": BLOCK, "implementation": "dense"}
ATTENTION |= {"rotary": True, "num_kv_heads": 2}
DENSE = {"hidden_features": 24, "gated": True, "activation": "silu"}
SPARSE = {"hidden_features": 32, "pattern": random_mask(2, 4, 0.7), "block": 8}
CASES = {
    "sparse": {
        "attention": {**ATTENTION, "sinks": True, "projection_pattern": random_mask(4, 4, 0.7),
                      "projection_block": 4, "num_kv_heads": None},
        "mlp": SPARSE,
        "residual_gain": 0.5,
    },
    "encoder-decoder": {
        "attention": ATTENTION,
        "cross_attention": {"block": BLOCK, "implementation": "dense"},
        "mlp": DENSE,
    },
    "all-attention": {"attention": {**ATTENTION, "persistent": 12}, "norm": "layer"},
}  # fmt: skip


def make(name, **options):
    options = CASES[name] | options
    return bsjax.nnx.BlockTransformerLayer(WIDTH, HEADS, rngs=nnx.Rngs(0), **options)


def linen(name, **options):
    return bsjax.linen.BlockTransformerLayer(HEADS, **(CASES[name] | options))


def inputs(name):
    return (X, ENCODED) if name == "encoder-decoder" else (X,)


@nnx.jit
def run(layer, *args):
    return layer(*args)


def normalized(norm, x):
    if isinstance(norm, nnx.RMSNorm):
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * norm.scale[...].reshape(1, 1, -1)
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * norm.scale[...].reshape(1, 1, -1) + norm.bias[...].reshape(1, 1, -1)


def want(layer, x, encoded=None):
    seen = oracle.elements(MASK, HEADS, LENGTH)
    y = oracle.attention(layer.attention, normalized(layer.attention_norm, x), seen=seen)
    x = x + y
    if encoded is not None:
        x = x + oracle.attention(layer.cross_attention, normalized(layer.cross_norm, x), encoded)
    if layer.mlp is None:
        return x
    h, up, down = normalized(layer.mlp_norm, x), layer.mlp.up, layer.mlp.down
    if layer.mlp.gate is None:
        return x + oracle.linear(down, jax.nn.gelu(oracle.linear(up, h)))
    hidden = jax.nn.silu(oracle.linear(layer.mlp.gate, h)) * oracle.linear(up, h)
    return x + oracle.linear(down, hidden)


@pytest.mark.parametrize("name", CASES)
def test_both_dialects_are_the_dense_computation(name):
    layer, twin, args = make(name), linen(name), inputs(name)
    layer.attention_norm.scale[...] += normal(RNG, (WIDTH,)) / 8

    @nnx.jit
    def losses(layer, args):
        def of(f):
            def loss(layer):
                y = f(layer, *args)
                return jnp.sin(y).sum(), y

            return nnx.grad(loss, has_aux=True)(layer)

        return of(lambda layer, *args: layer(*args)), of(want)

    (grads, y), wanted = losses(layer, args)
    leaves = zip(jax.tree.leaves((y, grads)), jax.tree.leaves(wanted[::-1]), strict=True)
    for a, b in leaves:
        # forward and backward, and over all positions of the batch in the gradients of parameters;
        # what cancels in the gradients of the keys' biases is a quarter and more
        oracle.assert_close(a, b, 2 * TERMS + N * LENGTH, least=0.25)
    small = [float(jnp.abs(a).max()) < 1e-5 for a in jax.tree.leaves(grads)]
    # softmax does not see what a bias of keys adds to all of its scores
    assert sum(small) <= 1 + (name == "encoder-decoder")
    variables = bsjax.linen.from_nnx(layer)
    oracle.assert_close(jax.jit(twin.apply)(variables, *args), y, TERMS)
    shapes = jax.eval_shape(twin.init, jax.random.key(0), *args)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    assert twin == linen(name)
    assert hash(twin) == hash(linen(name))
    bsjax.linen.to_nnx(variables, make(name))


@pytest.mark.slow
def test_dropout_and_sampling():
    """Both draw anew in training and rest outside of it, in both dialects."""
    options: dict = {
        "attention": {**ATTENTION, "dropout_rate": 0.2},
        "mlp": {"hidden_features": 8},
        "sampling": {"fraction": 0.5},
        "dropout_rate": 0.2,
    }
    layer = make("sparse", **options)
    call = nnx.jit(lambda layer, x, off: layer(x, deterministic=off), static_argnums=2)
    first, second = (call(layer, X, False) for _ in range(2))
    assert not np.array_equal(first, second)
    still = call(layer, X, True)
    np.testing.assert_array_equal(call(layer, X, True), still)
    twin, variables = linen("sparse", **options), bsjax.linen.from_nnx(layer)
    apply = jax.jit(twin.apply, static_argnames="deterministic")
    got = apply(variables, X, deterministic=True)
    oracle.assert_close(got, still, TERMS)
    keys = {"dropout": jax.random.key(0), "sampling": jax.random.key(1)}
    assert not np.array_equal(apply(variables, X, deterministic=False, rngs=keys), got)


class Step(nn.Module):
    """A layer of a scan."""

    def setup(self):
        self.layer = linen("sparse")

    def __call__(self, x):
        return self.layer(x), None


@nnx.split_rngs(splits=2)
@nnx.vmap
def stack(rngs):
    return bsjax.nnx.BlockTransformerLayer(WIDTH, HEADS, **CASES["sparse"], rngs=rngs)


def through(layers, x, decode=False):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    @nnx.remat
    def step(x, layer):
        return layer(x, decode=decode)

    return step(x, layers)


def test_scan_over_layers_and_remat():
    """A stack of layers is each of them in turn, with the gradients of those."""
    layers = stack(nnx.Rngs(0))

    @nnx.jit
    def both(layers, x):
        def loss(layers):
            y = through(layers, x)
            return y.sum(), y

        return nnx.grad(loss, has_aux=True)(layers)

    (grads, y), x = both(layers, X), X
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(grads))
    graph, state = nnx.split(layers)
    for i in range(2):
        x = run(nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state)), x)
    oracle.assert_close(y, x, 2 * TERMS)


@pytest.mark.slow
def test_scan_in_linen_and_decoding():
    """The same stack in Linen; and its caches are a stack too."""
    layers = stack(nnx.Rngs(0))
    y = nnx.jit(through)(layers, X)
    axes = {"params": 0, "patterns": 0}
    scanned = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=2)()
    variables = bsjax.linen.from_nnx(nnx.Dict(layer=layers))
    oracle.assert_close(jax.jit(scanned.apply)(variables, X)[0], y, 2 * TERMS)
    nnx.vmap(lambda layer: layer.init_cache(X.shape))(layers)
    decode = nnx.jit(lambda layers, x: through(layers, x, decode=True))
    parts = [decode(layers, X[:, i : i + 9]) for i in (0, 9)]
    oracle.assert_close(jnp.concatenate(parts, axis=1), y[:, :18], 2 * TERMS)


def test_bfloat16():
    layer = make("all-attention", dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # norms of Flax promote
        y = run(layer, X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert layer.attention.persistent_key.dtype == jnp.float32
    # inputs, a norm, a projection and its bias, what is attended to, another and its bias, the sum
    oracle.assert_close(y, nnx.jit(want)(layer, X), TERMS, roundings=8)


@pytest.mark.parametrize(("name", "kind"), [("sparse", "values"), ("encoder-decoder", "kernel")])
def test_the_residual_gain(name, kind):
    plain, small = (make(name, residual_gain=gain) for gain in (1.0, 0.25))
    last = {plain.attention.out: small.attention.out, plain.mlp.down: small.mlp.down}
    if plain.cross_attention is not None:
        last[plain.cross_attention.out] = small.cross_attention.out
    for one, other in last.items():
        np.testing.assert_array_equal(getattr(other, kind)[...], getattr(one, kind)[...] / 4)
    for part in ("attention.query", "mlp.up"):
        one, other = (operator.attrgetter(f"{part}.{kind}")(layer) for layer in (plain, small))
        np.testing.assert_array_equal(other[...], one[...])


@pytest.mark.parametrize("make", [make, linen])
def test_errors(make):
    def error(call, message):
        assert_raises(lambda: nnx.eval_shape(call), ValueError, message)

    error(
        lambda: make("sparse", norm="batch"),
        message='BlockTransformerLayer: `norm` must be "rms" or "layer", got \'batch\'.',
    )
    error(
        lambda: make("sparse", mlp={"gated": True}),
        message="BlockTransformerLayer: `mlp` must say `hidden_features`, got ['gated']: for "
        'example mlp={"hidden_features": 2048}.',
    )
    error(
        lambda: make("sparse", mlp=None),
        message="BlockTransformerLayer: there is neither an `mlp` nor persistent memory in its "
        'place: give mlp={"hidden_features": ...}, or attention={"persistent": ...}.',
    )

    def call(name, *args):
        layer = make(name)
        return (
            layer.init(jax.random.key(0), *args) if isinstance(layer, nn.Module) else layer(*args)
        )

    error(
        lambda: call("encoder-decoder", X),
        message="BlockTransformerLayer: it attends to what an encoder gives, which is missing: "
        "call it with `encoded`, of shape (..., positions, features).",
    )
    error(
        lambda: call("sparse", X, ENCODED),
        message="BlockTransformerLayer: `encoded` is given, but the layer does not attend to it: "
        "make it with cross_attention={}.",
    )
