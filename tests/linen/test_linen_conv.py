"""`bsjax.linen.BlockConv`: the twin of the NNX one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, serialization

import bsjax.linen
import bsjax.nnx
from tests.helpers import assert_close, assert_raises, normal, slow

pytestmark = pytest.mark.usefixtures("quick_compilations")
MASK = np.array([[1, 0, 1], [1, 1, 0]], bool)
OPTIONS = {"pattern": MASK, "block": 4, "padding": "CIRCULAR", "kernel_dilation": (1, 2)}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = bsjax.linen.BlockConv(12, (3, 2), 2, **OPTIONS, name="first")(x, activation="relu")
        y = nn.BatchNorm(use_running_average=True, name="norm")(y)
        return bsjax.linen.BlockConv(
            3, (1, 1), pattern=MASK[:, :1].repeat(2, 0)[:3], block=4, use_bias=False, name="last"
        )(y)


class Twin(nnx.Module):
    def __init__(self, rngs):
        self.first = bsjax.nnx.BlockConv(8, 12, (3, 2), 2, **OPTIONS, rngs=rngs)
        self.norm = nnx.BatchNorm(12, use_running_average=True, rngs=rngs)
        self.last = bsjax.nnx.BlockConv(
            12, 3, (1, 1), pattern=MASK[:, :1].repeat(2, 0)[:3], block=4, use_bias=False, rngs=rngs
        )

    def __call__(self, x):
        return self.last(self.norm(self.first(x, activation="relu")))


X = normal(np.random.default_rng(0), (2, 6, 5, 8))


def test_both_dialects_are_one():
    """The variables of one give the outputs of the other, there and back."""
    model = Twin(nnx.Rngs(0))
    variables = bsjax.linen.from_nnx(model)
    shapes = jax.eval_shape(Linen().init, jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda a: a.shape, shapes)
    got = Linen().apply(variables, X)
    np.testing.assert_array_equal(got, model(X))
    other = Twin(nnx.Rngs(7))
    bsjax.linen.to_nnx(variables, other)
    np.testing.assert_array_equal(other(X), model(X))


def test_initialises_and_is_saved():
    variables = Linen().init(jax.random.key(3), X)
    values = variables["params"]["first"]["values"]
    assert values.shape == (4, 3, 2, 4, 4)
    fan = np.array([8, 4, 4])[np.array([0, 0, 1, 2])] * 6
    got = np.asarray(values).std((1, 2, 3, 4)) * np.sqrt(fan)
    assert np.all(abs(got - 1) < 0.35)
    restored = serialization.from_bytes(variables, serialization.to_bytes(variables))
    np.testing.assert_array_equal(Linen().apply(restored, X), Linen().apply(variables, X))
    grads = jax.grad(lambda v: Linen().apply({**variables, "params": v}, X).sum())(
        variables["params"]
    )
    assert grads["first"]["values"].shape == values.shape


def trained(features, **options):
    """A normalisation and variables of it that are none of 0 and 1."""
    norm = nn.BatchNorm(use_running_average=True, **options)
    variables = norm.init(jax.random.key(0), jnp.ones((1, features)))
    rng = np.random.default_rng(2)
    return norm, jax.tree.map(lambda a: jnp.exp(normal(rng, a.shape)), variables)


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (bsjax.linen.BlockConv(12, (3, 2), 2, **OPTIONS, use_bias=False), {}),
        slow(
            bsjax.linen.BlockConv(
                10, (3, 3), **OPTIONS, bias_init=jax.nn.initializers.normal(), name="conv"
            ),
            {"use_scale": False, "epsilon": 0.1},
        ),
        slow(
            bsjax.linen.BlockLinear(12, pattern=MASK, block=4),
            {"use_scale": False, "use_bias": False},
        ),
    ],
)
def test_batch_norm_is_folded(layer, options):
    variables = layer.init(jax.random.key(1), X)
    norm, statistics = trained(layer.out_features, **options)
    want = norm.apply(statistics, layer.apply(variables, X))
    saved = serialization.from_bytes(variables, serialization.to_bytes(variables))
    folded, new = bsjax.linen.fold_batch_norm(layer, saved, norm, statistics)
    assert_close(folded.apply(new, X), np.asarray(want), 8 * 6 * 4)
    assert folded.use_bias
    assert set(variables["params"]) == {"values", *(["bias"] if layer.use_bias else [])}


def test_what_cannot_be_folded():
    layer = bsjax.linen.BlockConv(12, (3, 2), 2, **OPTIONS)
    norm, statistics = trained(12)
    whole = {"params": {"layer": {}}, "patterns": {"layer": {}}}
    fold = bsjax.linen.fold_batch_norm
    for call, error, message in (
        (
            lambda: fold(norm, statistics, layer, whole),
            TypeError,
            "fold_batch_norm: `layer` is a BatchNorm: only a convolution followed by its "
            "normalisation can be folded, fold_batch_norm(conv, norm) for norm(conv(x)).",
        ),
        (
            lambda: fold(layer, whole, norm, statistics),
            ValueError,
            "fold_batch_norm: `variables` lack params/values: give the variables of this layer "
            "alone, a mapping of collections.",
        ),
        (
            lambda: fold(layer, layer.init(jax.random.key(0), X), *trained(8)),
            ValueError,
            "fold_batch_norm: `norm` has 8 features, but `layer` has 12 out: give the "
            "normalisation that follows the layer.",
        ),
    ):
        assert_raises(call, error, message)
