"""`bsjax.nnx.SampledLinear`: what it adds to `bsjax.sampled_matmul`, foremost random numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import bsjax
from bsjax.nnx import SampledLinear
from tests.helpers import assert_close, assert_raises, normal

IN, OUT = 16, 6
KEY = jax.random.key(7)


def layer(rngs=0, **options):
    options = {"fraction": 0.5, "bias_init": nnx.initializers.normal(1.0)} | options
    rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
    return SampledLinear(IN, OUT, **options, rngs=rngs)


def inputs(shape=(5, IN), dtype=jnp.float32, seed=0):
    return normal(np.random.default_rng(seed), shape, dtype)


def exact(layer, x):
    """By NumPy, in float64."""
    kernel, bias = (np.asarray(v[...], np.float64) for v in (layer.kernel, layer.bias))
    return (np.asarray(x, np.float64) @ kernel + bias).astype(np.float32)


def same(a, b):
    """Whether two results are of the same sample: others are nowhere near."""
    return np.allclose(a, b, rtol=1e-4, atol=1e-4)


@nnx.jit
def gradients(layer, x, dy):
    """y, and the gradients of the parameters and of x under the cotangent dy; the key is `KEY`."""

    def loss(layer, x):
        y = layer(x, rngs=KEY)
        return (y * dy).sum(), y

    grads, y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
    return y, *grads


@functools.partial(nnx.jit, static_argnames="deterministic")
def call(layer, x, deterministic=None):
    return layer(x, deterministic=deterministic)


def test_starts_as_a_dense_layer():
    ours, theirs = layer(bias_init=nnx.initializers.zeros), nnx.Linear(IN, OUT, rngs=nnx.Rngs(0))
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(ours, nnx.Param), nnx.state(theirs, nnx.Param)
    )
    assert nnx.state(layer(use_bias=False), nnx.Param).keys() == {"kernel"}


def test_uniform_by_hand():
    """With "uniform" every feature that is taken counts 1 / fraction: y and its gradients."""
    ours, x, dy = layer(sampler="uniform"), inputs((2, 3, IN)), inputs((2, 3, OUT), seed=1)

    y, grads, dx = gradients(ours, x, dy)
    taken = np.any(np.asarray(dx) != 0, axis=(0, 1))
    assert taken.sum() == IN / 2
    mask = np.where(taken, 2.0, 0.0)
    kernel, bias, x, dy = (np.asarray(a[...], np.float64) for a in (ours.kernel, ours.bias, x, dy))
    assert_close(y, (x * mask @ kernel + bias).astype(np.float32), 2 * IN)
    assert_close(dx, (dy @ kernel.T * mask).astype(np.float32), 2 * OUT)
    assert_close(
        grads["kernel"][...], np.einsum("abk,abm->km", x * mask, dy).astype(np.float32), 2 * 6
    )
    assert_close(grads["bias"][...], dy.sum((0, 1)).astype(np.float32), 6)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "backward", "block": 2, "sampler": "priority"},
        {"policy": "weight", "implementation": "dense"},
        {"block": 4, "fraction": 0.25, "sampler": "top_k"},
    ],
)
def test_its_options_are_those_of_the_product(options):
    ours, x, dy = layer(**options), inputs(), inputs((5, OUT), seed=1)
    options = {"fraction": 0.5} | options

    @jax.jit
    def want(kernel, x):
        y, pull = jax.vjp(functools.partial(bsjax.sampled_matmul, key=KEY, **options), x, kernel)
        return y, *pull(dy)

    y, grads, dx = gradients(ours, x, dy)
    want_y, want_x, want_kernel = want(ours.kernel[...], x)
    assert_close(y, want_y + ours.bias[...][None], IN)
    assert_close(dx, want_x, OUT)
    assert_close(grads["kernel"][...], want_kernel, 5)


def test_exact_when_deterministic():
    ours, x = layer(sampler="uniform"), inputs()
    want = exact(ours, x)
    assert_close(call(ours, x, deterministic=True), want, IN)
    whole = layer(nnx.Rngs(params=0), fraction=1)
    assert_close(call(whole, x), exact(whole, x), IN)
    ours.eval()
    assert_close(call(ours, x), want, IN)
    assert not same(call(ours, x, deterministic=False), want)  # goes before the attribute
    ours.train()
    assert not same(call(ours, x), want)
    assert_close(call(nnx.view(ours, deterministic=True), x), want, IN)
    assert not ours.deterministic


@pytest.mark.parametrize("dtype", [jnp.bfloat16, None])
def test_dtypes(dtype):
    ours = layer(dtype=dtype, deterministic=True)
    assert jax.eval_shape(ours, inputs()).dtype == (dtype or jnp.float32)
    assert ours.kernel.dtype == jnp.float32
    low = layer(param_dtype=jnp.bfloat16, deterministic=True)
    assert low.kernel.dtype == low.bias.dtype == jnp.bfloat16
    assert jax.eval_shape(low, inputs(dtype=jnp.bfloat16)).dtype == jnp.bfloat16


def assert_same_leaf(a, b):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rngs", [nnx.Rngs(0), nnx.Rngs(0, sampling=1), nnx.Rngs(3).fork()])
def test_keeps_a_stream_as_dropout_does(rngs):
    twin = nnx.clone(rngs)
    ours = layer(rngs)
    twin.params(), twin.params()
    theirs = nnx.Dropout(0.5, rng_collection="sampling", rngs=twin)
    for mine, want in ((ours.rngs, theirs.rngs), (rngs, twin)):
        jax.tree.map(assert_same_leaf, nnx.state(mine), nnx.state(want))


def test_streams_given_to_a_call():
    ours, x = layer(sampler="uniform"), inputs()
    before = nnx.clone(ours)
    rngs = nnx.Rngs(sampling=KEY)
    first = ours(x, rngs=jax.random.fold_in(KEY, 0))
    np.testing.assert_array_equal(ours(x, rngs=rngs), first)
    np.testing.assert_array_equal(ours(x, rngs=nnx.Rngs(KEY).default), first)
    assert not same(ours(x, rngs=rngs), first)
    np.testing.assert_array_equal(ours(x), before(x))  # its own stream was left alone


@functools.partial(nnx.jit, static_argnames="remat")
def step(model, x, remat=False):
    """A call and its gradient: of the same sample, or they would not fit each other."""

    def loss(model, x):
        y = model(x)
        return (y**2).sum() / 2, y

    loss = nnx.remat(loss) if remat else loss
    grads, y = nnx.grad(loss, has_aux=True)(model, x)
    return y, grads


def test_each_step_draws_and_remat_repeats():
    ours, x = layer(), inputs()
    first, again = nnx.clone(ours)(x), nnx.merge(*nnx.split(ours), copy=True)
    ys = []
    for _ in range(3):
        y, grads = step(ours, x)
        y2, grads2 = step(again, x, remat=True)
        np.testing.assert_allclose(y, y2, rtol=1e-6)
        np.testing.assert_allclose(grads["kernel"][...], grads2["kernel"][...], rtol=1e-5)
        ys.append(y)
    assert same(ys[0], first)  # as without jit
    assert not same(ys[0], ys[1])
    assert not same(ys[1], ys[2])
    assert ours.rngs.count[...] == 3


def test_a_checkpoint_keeps_the_stream(tmp_path):
    ours, other, x = layer(), layer(1), inputs()
    step(ours, x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.to_pure_dict(nnx.state(ours)))
    state = nnx.state(other)
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore(tmp_path / "model", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, saved)
    nnx.update(other, state)
    np.testing.assert_array_equal(step(other, x)[0], step(ours, x)[0])


def test_stacked_layers_draw_for_themselves():
    """Made by `nnx.vmap`, run by `nnx.scan`: equal kernels tell samples apart."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return SampledLinear(IN, IN, fraction=0.5, sampler="uniform", rngs=rngs)

    layers = make(nnx.Rngs(0))
    assert len(np.unique(layers.kernel[:, 0, 0])) == 3
    layers.kernel[...] = jnp.broadcast_to(jnp.eye(IN), (3, IN, IN))
    assert_draws_for_each(layers)


def assert_draws_for_each(layers):
    """Three stacked layers whose kernels are the identity, over features that are all one."""

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def run(x, layer):
        return x, layer(x)

    x = jnp.ones((1, IN))
    (_, first), (_, second) = run(x, layers), run(x, layers)
    rows = np.concatenate([first[:, 0], second[:, 0]])
    assert ((rows != 0).sum(1) == IN / 2).all()
    assert len(np.unique(rows != 0, axis=0)) == 6


def test_a_stack_whose_stream_is_not_scanned():
    keys = nnx.RngStream(jax.random.split(KEY, 3), tag="sampling")
    assert_raises(
        lambda: layer()(inputs(), rngs=keys),
        ValueError,
        "SampledLinear: the stream has keys of shape (3,), those of a stack of layers: scan or map "
        "over nnx.RngState as over nnx.Param, with in_axes=0.",
    )


TO_SAMPLE = (
    'SampledLinear: no stream "sampling" to sample with: make the layer with '
    "rngs=nnx.Rngs(0, sampling=1), call it with rngs=, or with deterministic=True."
)
ERRORS = {
    "no stream": (lambda: layer(nnx.Rngs(params=0))(inputs()), ValueError, TO_SAMPLE),
    "none in the call": (
        lambda: layer()(inputs(), rngs=nnx.Rngs(params=0)),
        ValueError,
        TO_SAMPLE,
    ),
    "a seed": (
        lambda: layer()(inputs(), rngs=3),
        TypeError,
        "SampledLinear: `rngs` must be nnx.Rngs or nnx.RngStream, got 3: for example "
        "nnx.Rngs(0, sampling=1).",
    ),
    "neither": (
        lambda: layer(deterministic=None)(inputs()),
        ValueError,
        "SampledLinear: `deterministic` is None here and in the layer: call the layer with "
        "deterministic=False to sample, or deterministic=True for the exact product.",
    ),
    "inputs": (
        lambda: layer()(inputs((2, IN + 1))),
        ValueError,
        "SampledLinear: expected inputs of shape (..., 16), got (2, 17).",
    ),
    "fraction": (
        lambda: layer(fraction=0),
        ValueError,
        "SampledLinear: `fraction` must be over 0 and at most 1, got 0.",
    ),
    "block": (
        lambda: layer(block=5),
        ValueError,
        'SampledLinear: `block` must divide the features that policy="forward" samples, 16 for '
        "weights of shape (16, 6), got 5: take a divisor of them, or pad with zeros.",
    ),
    "policy": (
        lambda: layer(policy="both"),
        ValueError,
        'SampledLinear: `policy` must be one of "forward", "backward", "weight", got \'both\'.',
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, kind, message):
    assert_raises(call, kind, message)
