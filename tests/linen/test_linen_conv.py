"""`bsjax.linen.BlockConv`: the twin of the NNX one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, serialization

import bsjax.linen
import bsjax.nnx
from tests.helpers import normal

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
