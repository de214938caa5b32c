"""`BlockMLP` in both dialects of Flax: what it computes, and that they agree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bsjax
import bsjax.linen
import bsjax.nnx
from tests.helpers import assert_close, normal, random_mask

MASK = random_mask(3, 8, 0.5)  # 20 features in, 60 hidden
X = normal(np.random.default_rng(0), (5, 20))


def mlp(**options):
    return bsjax.nnx.BlockMLP(20, 60, pattern=MASK, block=8, rngs=nnx.Rngs(0), **options)


def weight(layer):
    dense = bsjax.todense(layer.values[...], layer.pattern.get_value())
    return dense[: layer.in_features, : layer.out_features]


@pytest.mark.parametrize("gated", [False, True])
def test_is_the_dense_one(gated):
    layer = mlp(gated=gated, activation="silu", bias_init=jax.nn.initializers.normal())
    hidden = X @ weight(layer.up)
    if gated:
        assert layer.up.bias is None
        hidden = jax.nn.silu(X @ weight(layer.gate)) * hidden
    else:
        hidden = jax.nn.silu(hidden + layer.up.bias[...][None])
    want = hidden @ weight(layer.down) + layer.down.bias[...][None]
    assert_close(layer(X), want, 80)
    assert_close(layer(X, residual=X), want + X, 80)


def test_the_second_pattern_is_the_transpose_unless_given():
    layer = mlp()
    np.testing.assert_array_equal(layer.down.pattern.get_value().mask(), MASK.T)
    other = bsjax.nnx.BlockMLP(
        20, 60, 10, pattern=MASK, down_pattern=random_mask(8, 2), block=8, rngs=nnx.Rngs(0)
    )
    assert other(X).shape == (5, 10)


def test_gate_and_up_move_together_unless_they_are_parted():
    layer, other = mlp(gated=True, activation="silu"), bsjax.BlockPattern.from_mask(MASK[::-1], 8)
    layer.up.pattern.set_value(other)
    assert layer.gate.pattern.get_value().equals(other)
    layer.gate.pattern = bsjax.nnx.Pattern(bsjax.BlockPattern.from_mask(MASK, 8))
    want = (jax.nn.silu(X @ weight(layer.gate)) * (X @ weight(layer.up))) @ weight(layer.down)
    assert_close(layer(X), want, 80)


@pytest.mark.parametrize("gated", [False, True])
def test_both_dialects_agree(gated):
    ours = mlp(gated=gated, bias_init=jax.nn.initializers.normal())
    twin = bsjax.linen.BlockMLP(60, pattern=MASK, block=8, gated=gated)
    variables = bsjax.linen.from_nnx(ours)
    np.testing.assert_array_equal(twin.apply(variables, X, residual=X), ours(X, residual=X))
    shapes = jax.eval_shape(twin.init, jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda a: a.shape, shapes)


@pytest.mark.parametrize("gated", [False, True])
def test_trains(gated):
    model = mlp(gated=gated)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    target = jnp.sin(3 * X)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(X) - target) ** 2)

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
        losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]


def test_errors():
    with pytest.raises(ValueError, match="BlockMLP: `pattern` is a mask"):
        bsjax.nnx.BlockMLP(20, 60, pattern=MASK, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"`residual` of shape \(5, 4\) must have shape \(5, 20\)"):
        mlp()(X, residual=X[:, :4])
    with pytest.raises(ValueError, match="needs 2 blocks of 8"):
        bsjax.nnx.BlockMLP(20, 60, 16, pattern=MASK, block=8, rngs=nnx.Rngs(0))
