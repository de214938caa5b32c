"""`bsjax.linen.BlockLinear` under the transformations of Linen, and in training."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import bsjax
from bsjax.linen import BlockLinear
from tests.helpers import assert_close, normal, random_mask

KEY = jax.random.key(0)
MASK = random_mask(3, 3, 0.5, seed=4)
WIDTH, DEPTH = 23, 3  # of 24
X = normal(np.random.default_rng(0), (5, WIDTH))


class Layer(nn.Module):
    """One layer of a scan."""

    pattern: Any
    kernel_init: Any = bsjax.inits.stored_fan_in()

    @nn.compact
    def __call__(self, x):
        options = {"pattern": self.pattern, "block": 8, "kernel_init": self.kernel_init}
        return jnp.tanh(BlockLinear(WIDTH, name="linear", **options)(x)), None


Scanned = nn.scan(
    Layer, variable_axes={"params": 0, "patterns": 0}, split_rngs={"params": True}, length=DEPTH
)


def unrolled(variables, x):
    for i in range(DEPTH):
        x, _ = Layer(MASK).apply(jax.tree.map(lambda leaf, i=i: leaf[i], variables), x)
    return x


@pytest.mark.parametrize("init", [bsjax.inits.stored_fan_in(), nn.initializers.he_uniform()])
def test_scan_over_layers(init):
    stack = Scanned(MASK, kernel_init=init)
    variables = jax.jit(stack.init)(KEY, X)
    values = variables["params"]["linear"]["values"]
    assert values.shape == (DEPTH, MASK.sum(), 8, 8)
    assert len(np.unique(values[:, 0, 0, 0])) == DEPTH
    y, _ = stack.apply(variables, X)
    np.testing.assert_array_equal(y, unrolled(variables, X))


def test_scan_over_layers_with_a_pattern_each():
    """Put the patterns into the collection, and let `apply` draw the parameters that fit them."""
    patterns = [
        bsjax.BlockPattern.from_mask(random_mask(3, 3, 0.5, seed=seed), 8) for seed in range(DEPTH)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *patterns)
    given = {"patterns": {"linear": {"row": stacked.row, "col": stacked.col}}}
    _, drawn = Scanned(MASK).apply(given, X, rngs={"params": KEY}, mutable=["params"])
    variables = given | drawn
    y, _ = Scanned(MASK).apply(variables, X)

    want = X
    for i, p in enumerate(patterns):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], drawn["params"]["linear"])
        want = jnp.tanh(want @ bsjax.todense(one["values"], p)[:WIDTH, :WIDTH] + one["bias"][None])
    assert_close(y, np.asarray(want), DEPTH * WIDTH)


def test_jit_compiles_once_for_equal_layers():
    traces = 0

    class Counted(BlockLinear):
        def __call__(self, x):
            nonlocal traces
            traces += 1
            return super().__call__(x)

    jitted = nn.jit(Counted)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for mask in (MASK, MASK.copy(), MASK.T):
                x = jitted(WIDTH, pattern=mask, block=8)(x)
            return x

    variables = Model().init(KEY, X)
    traces = 0
    y = Model().apply(variables, X)
    assert traces == 2  # MASK twice, MASK.T once
    assert y.shape == X.shape


def test_a_pattern_as_the_field_of_ones_own_module():
    """`nn.jit` hashes the fields of every module that it meets."""
    traces = 0

    class Own(nn.Module):
        pattern: Any

        @nn.compact
        def __call__(self, x):
            nonlocal traces
            traces += 1
            return BlockLinear(WIDTH, pattern=self.pattern, name="linear")(x)

    jitted = nn.jit(Own)
    variables = jitted(bsjax.BlockPattern.from_mask(MASK, 8)).init(KEY, X)
    traces = 0
    for _ in range(2):
        y = jitted(bsjax.BlockPattern.from_mask(MASK, 8)).apply(variables, X)
    assert traces == 1
    want = Own(bsjax.BlockPattern.from_mask(MASK, 8)).apply(variables, X)
    np.testing.assert_array_equal(y, want)


def test_remat():
    class Model(nn.Module):
        layer: Any

        @nn.compact
        def __call__(self, x):
            return self.layer(WIDTH, pattern=MASK, block=8, name="linear")(x)

    plain, again = Model(BlockLinear), Model(nn.remat(BlockLinear))
    variables = plain.init(KEY, X)

    def grads(model):
        def loss(params):
            return (model.apply(variables | {"params": params}, X) ** 2).sum()

        return jax.grad(loss)(variables["params"])

    jax.tree.map(np.testing.assert_array_equal, grads(again), grads(plain))


def test_vmap_over_an_ensemble():
    ensemble = nn.vmap(
        BlockLinear,
        variable_axes={"params": 0, "patterns": None},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=2,
    )(WIDTH, pattern=MASK, block=8)
    variables = ensemble.init(KEY, X)
    assert variables["params"]["values"].shape == (2, MASK.sum(), 8, 8)
    assert variables["patterns"]["row"].shape == (MASK.sum(),)
    y = ensemble.apply(variables, X)
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], variables["params"])
        want = BlockLinear(WIDTH, pattern=MASK, block=8).apply(variables | {"params": one}, X)
        assert_close(y[i], np.asarray(want), WIDTH)


def test_learns():
    """A `TrainState` of the collection `params`; `patterns` goes beside it."""
    model = nn.Sequential(
        [Model := BlockLinear(WIDTH, pattern=MASK, block=8), nn.relu, nn.Dense(2)]
    )
    assert Model.pattern.nnz == MASK.sum()
    variables = model.init(KEY, X)
    goal = normal(np.random.default_rng(1), (5, 2))
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=optax.adam(1e-2))
    patterns = variables["patterns"]

    @jax.jit
    def step(state):
        def loss(params):
            return (
                (state.apply_fn({"params": params, "patterns": patterns}, X) - goal) ** 2
            ).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for _ in range(40):
            state, value = step(state)
            losses.append(float(value))
    assert losses[-1] < 0.1 * losses[0]


def test_a_pattern_stays_known_inside_jit():
    """Linen rebuilds fields from what they serialise to, which must not stage them as constants."""

    class Own(nn.Module):
        pattern: Any

        def setup(self):
            self.held = self.pattern
            self.linear = BlockLinear(
                WIDTH, pattern=self.held, kernel_init=nn.initializers.he_normal()
            )

        def __call__(self, x):
            return self.linear(x)

    model = Own(bsjax.BlockPattern.from_mask(MASK, 8))
    variables = jax.jit(model.init)(KEY, X)
    assert variables["params"]["linear"]["values"].shape == (MASK.sum(), 8, 8)
