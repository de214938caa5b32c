"""`bsjax.nnx.BlockLinear` against a dense computation, and what it refuses."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax.nnx
from bsjax import inits
from bsjax.nnx import BlockLinear
from tests.helpers import assert_close, hub_mask, normal, random_mask

MASK = hub_mask(4, 3)  # of blocks of 8: 25 to 32 features in, 17 to 24 out
IN, OUT = 29, 18


def layer(in_features=IN, out_features=OUT, *, seed=0, **options):
    options = {"pattern": MASK, "block": 8, "bias_init": nnx.initializers.normal(1.0)} | options
    return BlockLinear(in_features, out_features, rngs=nnx.Rngs(seed), **options)


def inputs(shape=(5, IN), dtype=jnp.float32, seed=0):
    return normal(np.random.default_rng(seed), shape, dtype)


def dense(values, bias, x, p):
    """What the layer means, with a matrix and without padding, in float32."""
    kernel = bsjax.todense(values, p).astype(jnp.float32)[: x.shape[-1], : len(bias)]
    return jnp.dot(x.astype(jnp.float32), kernel, precision="highest") + bias[None]


def test_signature():
    """As design.md fixes it: `block` is for masks, all else as in `nnx.Linear`."""
    given = inspect.signature(inspect.unwrap(BlockLinear.__init__)).parameters
    keywords = {name for name, p in given.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert list(given)[:3] == ["self", "in_features", "out_features"]
    assert keywords == {
        *("pattern", "block", "use_bias", "dtype", "param_dtype", "precision"),
        *("kernel_init", "bias_init", "implementation", "rngs"),
    }


def gradients(ours, x, dy):
    """Of the parameters and of x, under the cotangent dy."""

    def loss(layer, x):
        return (layer(x).astype(jnp.float32) * dy).sum()

    return nnx.grad(loss, argnums=(0, 1))(ours, x)


@pytest.mark.parametrize("features", [(32, 24), (29, 18), (25, 17)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_equals_a_dense_layer(features, use_bias):
    """y and all gradients, for sizes that blocks divide and sizes that they do not."""
    ours = layer(*features, use_bias=use_bias)
    p, values = ours.pattern.get_value(), ours.values[...]
    bias = ours.bias[...] if use_bias else jnp.zeros(features[1])
    x, dy = inputs((5, features[0])), inputs((5, features[1]), seed=1)

    want, want_pull = jax.vjp(functools.partial(dense, p=p), values, bias, x)
    assert_close(ours(x), want, 32)
    grads, dx = gradients(ours, x, dy)
    want_values, want_bias, want_x = want_pull(dy)
    assert_close(dx, want_x, 24)
    assert_close(grads["values"][...], want_values, 5)
    if use_bias:
        assert_close(grads["bias"][...], want_bias, 5)
    assert ("bias" in grads) == use_bias


@pytest.mark.parametrize("lead", [(), (3,), (2, 0), (2, 3, 1)])
def test_leading_axes(lead):
    ours, x = layer(), inputs((*lead, IN))
    y = ours(x)
    assert y.shape == (*lead, OUT)
    np.testing.assert_allclose(y.reshape(-1, OUT), ours(x.reshape(-1, IN)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "dense", "reference"])
def test_implementations_agree(implementation):
    ours, x = layer(implementation=implementation), inputs()
    want = dense(ours.values[...], ours.bias[...], x, ours.pattern.get_value())
    assert_close(ours(x), want, IN)


def p():
    return bsjax.BlockPattern.from_mask(MASK, 8)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_computes_in_dtype_and_keeps_parameters_in_param_dtype(dtype):
    ours, x = layer(dtype=dtype), inputs()
    y = ours(x)
    assert y.dtype == dtype
    assert ours.values.dtype == ours.bias.dtype == jnp.float32
    grads, dx = gradients(ours, x, inputs((5, OUT), seed=1))
    assert grads["values"][...].dtype == grads["bias"][...].dtype == dx.dtype == jnp.float32

    low = layer(param_dtype=dtype)
    assert low.values.dtype == low.bias.dtype == dtype
    low.values[...], low.bias[...] = ours.values[...].astype(dtype), ours.bias[...].astype(dtype)
    np.testing.assert_array_equal(y, low(x.astype(dtype)))
    bias = low.bias[...].astype(jnp.float32)
    assert_close(y, dense(low.values[...], bias, x.astype(dtype), p()), IN)


def test_the_common_dtype_is_the_default():
    ours = layer()
    with jax.numpy_dtype_promotion("standard"):
        assert ours(inputs(dtype=jnp.bfloat16)).dtype == jnp.float32
        assert layer(param_dtype=jnp.bfloat16)(inputs()).dtype == jnp.float32
        assert ours(np.ones((2, IN), np.int32)).dtype == jnp.float32
    assert layer(param_dtype=jnp.bfloat16)(inputs(dtype=jnp.bfloat16)).dtype == jnp.bfloat16


def test_pattern_or_mask():
    by_mask, by_pattern = layer(), layer(pattern=p(), block=None)
    np.testing.assert_array_equal(by_mask(inputs()), by_pattern(inputs()))
    assert by_mask.pattern.get_value().equals(p())
    oblong = layer(pattern=random_mask(4, 2), block=(8, 12))
    assert oblong.values.shape[1:] == (8, 12)


def test_spare_slots_change_nothing():
    spare = bsjax.BlockPattern.from_mask(MASK, 8, capacity=12)
    ours, plain = layer(pattern=spare, block=None), layer()
    ours.values[...] = jnp.full_like(ours.values[...], jnp.nan).at[: p().nnz].set(plain.values[...])
    ours.bias[...] = plain.bias[...]
    np.testing.assert_array_equal(ours(inputs()), plain(inputs()))


def test_variables():
    ours = layer()
    kinds = {path: type(v) for path, v in nnx.to_flat_state(nnx.state(ours))}
    assert kinds == {
        ("values",): nnx.Param,
        ("bias",): nnx.Param,
        ("pattern",): bsjax.nnx.Pattern,
    }
    assert not issubclass(bsjax.nnx.Pattern, nnx.Param)
    assert nnx.state(layer(use_bias=False), nnx.Param).keys() == {"values"}


@pytest.mark.parametrize(
    "name", ["lecun_normal", "he_uniform", "orthogonal", "zeros_init", "ones_init"]
)
def test_a_full_pattern_starts_as_a_dense_layer(name):
    init = getattr(nnx.initializers, name)()
    ours = layer(pattern=np.ones((4, 3), bool), kernel_init=init)
    flax = nnx.Linear(
        IN, OUT, kernel_init=init, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0)
    )
    kernel = bsjax.todense(ours.values[...], ours.pattern.get_value())[:IN, :OUT]
    np.testing.assert_array_equal(kernel, flax.kernel[...])
    np.testing.assert_array_equal(ours.bias[...], flax.bias[...])


def test_padding_starts_as_zero():
    ours = layer(IN - 4, OUT - 1)
    full = np.asarray(bsjax.todense(ours.values[...], p()))
    assert not full[IN - 4 :].any()
    assert not full[:, OUT - 1 :].any()


def test_initialisers_of_ones_own():
    @inits.by_pattern
    def slots(key, p, dtype, features, *, first=0):
        return jnp.broadcast_to(
            jnp.arange(first, first + p.capacity)[:, None, None], (p.capacity, *p.block)
        )

    for init, first in ((slots, 0), (functools.partial(slots, first=3), 3)):
        ours = layer(32, 24, kernel_init=init)
        np.testing.assert_array_equal(ours.values[:, 0, 0], np.arange(p().nnz) + first)


def test_sharding_annotations_reach_the_parameter():
    init = nnx.with_metadata(inits.stored_fan_in(), note="by block")
    assert layer(kernel_init=init).values.note == "by block"
    np.testing.assert_array_equal(layer(kernel_init=init).values[...], layer().values[...])


ERRORS = {
    "mask without block": (
        lambda: layer(block=None),
        ValueError,
        "BlockLinear: `pattern` is a mask, so its block size is not known: give `block=`, for "
        "example block=64, or a BlockPattern.",
    ),
    "another block": (
        lambda: layer(pattern=p(), block=16),
        ValueError,
        "BlockLinear: `block` is (16, 16) but the pattern has blocks (8, 8): leave `block` out "
        "when a BlockPattern is given.",
    ),
    "in_features": (
        lambda: layer(24, 24),
        ValueError,
        "BlockLinear: in_features=24 needs 3 blocks of 8, but `pattern` has a grid (4, 3) of "
        "blocks (8, 8): its in_features may be 25 to 32.",
    ),
    "out_features": (
        lambda: layer(32, 25),
        ValueError,
        "BlockLinear: out_features=25 needs 4 blocks of 8, but `pattern` has a grid (4, 3) of "
        "blocks (8, 8): its out_features may be 17 to 24.",
    ),
    "inputs": (
        lambda: layer()(jnp.ones((2, 32))),
        ValueError,
        "BlockLinear: expected inputs of shape (..., 29), got (2, 32).",
    ),
    "a scalar": (
        lambda: layer()(jnp.float32(1)),
        ValueError,
        "BlockLinear: expected inputs of shape (..., 29), got ().",
    ),
    "no pattern": (
        lambda: layer(pattern=None),
        TypeError,
        "`mask` must be a bool array of shape (r, c), got NoneType",
    ),
    "float mask": (
        lambda: layer(pattern=MASK.astype(float)),
        TypeError,
        "`mask` must be bool, got float64: say which entries are stored, for example `mask != 0`.",
    ),
    "implementation": (
        lambda: layer(implementation="mosaic")(inputs()),
        ValueError,
        'implementation="mosaic" cannot run here',
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_a_model_cast_wholesale_says_what_to_do():
    ours = layer()
    nnx.update(ours, jax.tree.map(lambda a: a.astype(jnp.bfloat16), nnx.state(ours)))
    with pytest.raises(TypeError, match=r"must be int32, got bfloat16.*update only nnx.Param"):
        ours(inputs(dtype=jnp.bfloat16))


def test_the_cure_works():
    ours = layer()
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), nnx.state(ours, nnx.Param))
    nnx.update(ours, cast)
    assert ours(inputs(dtype=jnp.bfloat16)).dtype == jnp.bfloat16


def test_layers_of_one_pattern_can_be_donated():
    """No buffer is that of two layers."""
    p = bsjax.BlockPattern.from_mask(np.eye(2, dtype=bool), 4)
    model = nnx.List([bsjax.nnx.BlockLinear(8, 8, pattern=p, rngs=nnx.Rngs(i)) for i in range(2)])
    step = nnx.jit(lambda model, x: model[1](model[0](x)), donate_argnums=0)
    assert step(model, jnp.ones((1, 8))).shape == (1, 8)
