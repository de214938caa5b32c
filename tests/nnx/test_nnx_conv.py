"""`bsjax.nnx.BlockConv`, and batch normalisation that is folded into it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization

import bsjax
from bsjax.nnx import BlockConv, BlockLinear, fold_batch_norm
from tests.helpers import assert_close, assert_raises, normal, slow
from tests.ops.conv import kernel, lax_conv

MASK = np.array([[1, 0, 1], [1, 1, 0]], bool)
FULL = np.ones((1, 2), bool)


def layer(mask=MASK, block=4, features=(8, 12), kernel_size=(3, 3), **options):
    return BlockConv(*features, kernel_size, pattern=mask, block=block, rngs=nnx.Rngs(0), **options)


def image(*shape):
    return normal(np.random.default_rng(0), shape)


def twin(conv, **options):
    """`nnx.Conv` with the same numbers, where blocks divide the features."""
    dense = nnx.Conv(
        conv.in_features,
        conv.out_features,
        conv.kernel_size,
        conv.strides,
        rngs=nnx.Rngs(1),
        **options,
    )
    dense.kernel[...] = jnp.asarray(kernel(conv.values[...], conv.pattern.get_value()))
    if conv.bias is not None:
        dense.bias[...] = conv.bias[...]
    return dense


@pytest.mark.parametrize(
    ("strides", "options"),
    [
        (2, {"padding": ((0, 1), (2, 0)), "kernel_dilation": 2}),
        slow(1, {"padding": "CIRCULAR"}),
        slow(None, {"padding": "VALID", "use_bias": False}),
        slow((1, 2), {"padding": "REFLECT", "kernel_dilation": (1, 2)}),
    ],
)
def test_is_flax_with_the_dense_kernel(strides, options):
    conv = layer(strides=strides, bias_init=jax.nn.initializers.normal(), **options)
    x = image(2, 7, 6, 8)
    want = twin(conv, precision="highest", **options)(x)
    assert_close(conv(x), np.asarray(want), 72)


@pytest.mark.slow
def test_causal():
    conv = layer(kernel_size=3, padding="CAUSAL", kernel_dilation=2)
    x = image(2, 9, 8)
    want = twin(conv, precision="highest", padding="CAUSAL", kernel_dilation=2)(x)
    assert_close(conv(x), np.asarray(want), 24)
    message = (
        'BlockConv: `padding` "CAUSAL" is for one axis of space, but kernel_size is (3, 3): give a '
        "pair (before, after) for each axis."
    )
    assert_raises(lambda: layer(padding="CAUSAL")(image(1, 4, 4, 8)), ValueError, message)


def test_an_rgb_image_and_odd_channels_out():
    """Three channels in a block of 4, ten out of three blocks of 4: padding counts nowhere."""
    conv = layer(np.ones((1, 3), bool), features=(3, 10))
    x, residual = image(2, 6, 5, 3), image(2, 6, 5, 10)
    values = conv.values[...]
    assert values.shape == (3, 3, 3, 4, 4)
    assert not np.any(values[..., 3, :])
    assert not np.any(values[2, ..., 2:])
    w = np.concatenate(np.asarray(values), -1)[:, :, :3, :10]
    got = conv(x, activation="relu", residual=residual)
    assert_close(got, np.asarray(jax.nn.relu(lax_conv(x, w)) + residual), 27)
    grads = nnx.grad(lambda conv: jnp.vdot(conv(x), residual))(conv)
    assert not np.any(grads["values"][...][..., 3, :])


def test_dtypes():
    conv = layer(dtype=jnp.bfloat16)
    assert conv(image(1, 3, 3, 8)).dtype == jnp.bfloat16
    assert conv.values.dtype == jnp.float32
    assert layer(param_dtype=jnp.float16).values.dtype == jnp.float16


@pytest.mark.slow
def test_variance_is_kept():
    """Taps of stored inputs are what an output sums over: 9 * 2 of 3 blocks of 16."""
    mask = np.array([[1, 0], [1, 1], [0, 1]], bool)
    conv = layer(mask, block=16, features=(48, 32), padding="VALID")
    y = conv(image(16, 12, 12, 48))
    assert abs(float(y.std()) - 1) < 0.1


def test_trains_and_leaves_the_pattern_alone():
    conv = layer()
    x, target = image(2, 4, 4, 8), image(2, 4, 4, 12)

    @nnx.jit
    def step(conv):
        loss, grads = nnx.value_and_grad(lambda c: jnp.mean((c(x) - target) ** 2))(conv)
        new = jax.tree.map(lambda w, g: w - 0.3 * g, nnx.state(conv, nnx.Param), grads)
        nnx.update(conv, new)
        return loss

    losses = [float(step(conv)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)


def test_serialization():
    conv, other = layer(), layer(bias_init=jax.nn.initializers.ones)
    state = serialization.to_state_dict(nnx.to_pure_dict(nnx.state(other)))
    data = serialization.msgpack_serialize(jax.tree.map(np.asarray, state))
    pure = serialization.from_state_dict(
        nnx.to_pure_dict(nnx.state(conv)), serialization.msgpack_restore(data)
    )
    whole = nnx.state(conv)
    nnx.replace_by_pure_dict(whole, pure)
    nnx.update(conv, whole)
    np.testing.assert_array_equal(conv.bias[...], 1)
    np.testing.assert_array_equal(conv(image(1, 3, 3, 8)), other(image(1, 3, 3, 8)))


def normalised(features, **options):
    """A BatchNorm with statistics and parameters that are none of 0 and 1."""
    norm = nnx.BatchNorm(features, use_running_average=True, rngs=nnx.Rngs(0), **options)
    rng = np.random.default_rng(2)
    for one in (norm.mean, norm.scale, norm.bias):
        if one is not None:
            one[...] = normal(rng, (features,))
    norm.var[...] = jnp.exp(normal(rng, (features,)))
    return norm


@pytest.mark.parametrize(
    ("conv_options", "norm_options"),
    [
        ({"strides": 2, "bias_init": jax.nn.initializers.normal()}, {}),
        slow({"use_bias": False, "features": (7, 10)}, {"epsilon": 0.1}),
        slow({"use_bias": False}, {"use_scale": False}),
        slow({}, {"use_bias": False, "use_scale": False}),
    ],
)
def test_batch_norm_is_folded(conv_options, norm_options):
    conv = layer(**conv_options)
    norm = normalised(conv.out_features, **norm_options)
    x = image(2, 5, 4, conv.in_features)
    want = np.asarray(norm(conv(x)))
    before = np.asarray(conv.values[...])
    folded = fold_batch_norm(conv, norm)
    assert_close(folded(x), want, 72 * 4)
    np.testing.assert_array_equal(conv.values[...], before)
    assert folded.use_bias
    assert folded.strides == conv.strides


@pytest.mark.slow
def test_batch_norm_is_folded_into_a_linear_layer():
    linear = BlockLinear(8, 12, pattern=MASK, block=4, rngs=nnx.Rngs(0))
    norm, x = normalised(12), image(5, 8)
    assert_close(fold_batch_norm(linear, norm)(x), np.asarray(norm(linear(x))), 40)


def test_what_cannot_be_folded():
    conv, norm = layer(), normalised(12)
    for call, error, message in (
        (
            lambda: fold_batch_norm(norm, conv),
            TypeError,
            "fold_batch_norm: `layer` is a BatchNorm: only a convolution followed by its "
            "normalisation can be folded, fold_batch_norm(conv, norm) for norm(conv(x)).",
        ),
        (
            lambda: fold_batch_norm(conv, conv),
            TypeError,
            "fold_batch_norm: `norm` must be a BatchNorm, got BlockConv.",
        ),
        (
            lambda: fold_batch_norm(lambda x: x, norm),
            TypeError,
            "fold_batch_norm: `layer` must be a BlockConv or a BlockLinear, got function.",
        ),
        (
            lambda: fold_batch_norm(conv, normalised(8)),
            ValueError,
            "fold_batch_norm: `norm` has 8 features, but `layer` has 12 out: give the "
            "normalisation that follows the layer.",
        ),
        (
            lambda: fold_batch_norm(conv, normalised(12, axis=1)),
            ValueError,
            "fold_batch_norm: `norm` normalises axis 1, but the channels out of a layer are the "
            "last axis: expected axis=-1.",
        ),
    ):
        assert_raises(call, error, message)


def test_messages():
    message = (
        "BlockConv: `kernel_size` must have one to three sizes, one for each axis of space, got "
        "(1, 2, 3, 4)."
    )
    assert_raises(lambda: layer(kernel_size=(1, 2, 3, 4)), ValueError, message)
    message = "BlockConv: expected inputs of shape (..., 8), got (1, 3, 3, 7)."
    assert_raises(lambda: layer()(image(1, 3, 3, 7)), ValueError, message)
    message = (
        "BlockConv: in_features=9 needs 3 blocks of 4, but `pattern` has a grid (2, 3) of blocks "
        "(4, 4): its in_features may be 5 to 8."
    )
    assert_raises(lambda: layer(features=(9, 12)), ValueError, message)
    message = (
        "BlockConv: `residual` of shape (1, 3, 3, 8) must have shape (..., 12), that of the output."
    )
    assert_raises(
        lambda: layer()(image(1, 3, 3, 8), residual=image(1, 3, 3, 8)), ValueError, message
    )


def test_layers_of_one_pattern_can_be_donated():
    """No buffer is that of two layers."""
    p = bsjax.BlockPattern.from_mask(np.eye(2, dtype=bool), 4)
    layers = [BlockConv(8, 8, 1, pattern=p, rngs=nnx.Rngs(i)) for i in range(2)]
    step = nnx.jit(lambda model, x: model[1](model[0](x)), donate_argnums=0)
    assert step(nnx.List(layers), jnp.ones((1, 3, 8))).shape == (1, 3, 8)
