"""`bsjax.nnx.BlockLinear` under the transformations of NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax.nnx
from bsjax import inits
from tests.helpers import random_mask
from tests.nnx.test_nnx_linear import IN, MASK, inputs, layer, p

SQUARE = random_mask(3, 3, 0.5, seed=4)
WIDTH = 23  # of 24


def square(rngs, pattern=SQUARE, **options):
    block = None if isinstance(pattern, bsjax.BlockPattern) else 8
    return bsjax.nnx.BlockLinear(WIDTH, WIDTH, pattern=pattern, block=block, rngs=rngs, **options)


def stacked_patterns(count):
    patterns = [
        bsjax.BlockPattern.from_mask(random_mask(3, 3, 0.5, seed=seed), 8) for seed in range(count)
    ]
    return patterns, jax.tree.map(lambda *leaves: jnp.stack(leaves), *patterns)


@pytest.mark.parametrize(
    "init", [inits.stored_fan_in(), inits.orthogonal(), nnx.initializers.he_normal()]
)
def test_eval_shape(init):
    abstract = nnx.eval_shape(lambda: layer(kernel_init=init))
    real = layer(kernel_init=init)
    abstract, real = (nnx.to_pure_dict(nnx.state(model)) for model in (abstract, real))
    assert jax.tree.flatten(abstract) == jax.tree.flatten(jax.eval_shape(lambda: real))


def test_created_under_jit():
    ours = nnx.jit(layer)()
    np.testing.assert_allclose(ours(inputs()), layer()(inputs()), rtol=1e-5, atol=1e-5)


def test_split_merge_clone():
    ours, x = layer(), inputs()
    graph, params, rest = nnx.split(ours, nnx.Param, ...)
    assert params.keys() == {"values", "bias"}
    assert rest.keys() == {"pattern"}
    for other in (nnx.merge(graph, params, rest), nnx.clone(ours)):
        np.testing.assert_array_equal(other(x), ours(x))
    other.values[...] = 0 * other.values[...]
    assert bool(ours.values[...].any())


def test_one_compilation_for_all_coordinates():
    """Moving blocks at equal capacity, as training a sparse topology does."""
    ours, x, traces = layer(), inputs(), 0

    @nnx.jit
    def forward(layer, x):
        nonlocal traces
        traces += 1
        return layer(x)

    seen = []
    for shift in range(3):
        moved = bsjax.BlockPattern.from_mask(np.roll(MASK, shift, axis=0), 8)
        ours.pattern.set_value(moved)
        y = forward(ours, x)
        kernel = bsjax.todense(ours.values[...], moved)[:IN, : y.shape[1]]
        np.testing.assert_allclose(y, x @ kernel + ours.bias[...][None], rtol=1e-4, atol=1e-5)
        seen.append(y)
    assert traces == 1
    assert not np.allclose(seen[0], seen[1])
    ours.pattern.set_value(bsjax.BlockPattern.from_mask(MASK, 8, capacity=p().nnz + 1))
    ours.values.set_value(jnp.pad(ours.values[...], ((0, 1), (0, 0), (0, 0))))
    forward(ours, x)
    assert traces == 2  # another capacity is another shape


def test_a_pattern_of_another_capacity_is_refused():
    ours = layer()
    ours.pattern.set_value(bsjax.BlockPattern.from_mask(np.ones((4, 3), bool), 8))
    with pytest.raises(
        ValueError, match=r"does not fit the pattern: expected \(e, br, bc\) = \(12, 8, 8\)"
    ):
        ours(inputs())


def test_updates_inside_jit_are_seen_outside():
    ours = layer()

    @nnx.jit
    def move(layer):
        layer.values[...] = 2 * layer.values[...]
        q = layer.pattern.get_value()
        layer.pattern.set_value(bsjax.BlockPattern(q.row[::-1], q.col, q.grid, q.block))

    before = ours.values[...]
    move(ours)
    np.testing.assert_array_equal(ours.values[...], 2 * before)
    np.testing.assert_array_equal(ours.pattern.get_value().row, np.asarray(p().row)[::-1])


def test_stacked_layers():
    """`nnx.vmap` makes them and `nnx.scan` runs them; one pattern for all."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return square(rngs)

    layers, x = make(nnx.Rngs(0)), inputs((5, WIDTH))
    assert layers.values.shape == (3, SQUARE.sum(), 8, 8)
    assert len(np.unique(layers.values[:, 0, 0, 0])) == 3

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
        return layer(x)

    want = x
    for i in range(3):
        one = square(nnx.Rngs(0))
        one.values.set_value(layers.values[i])
        want = one(want)
    np.testing.assert_allclose(run(x, layers), want, rtol=1e-4, atol=1e-5)


def test_stacked_layers_with_a_pattern_each():
    patterns, stacked = stacked_patterns(3)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs, pattern):
        return square(rngs, pattern)

    layers, x = make(nnx.Rngs(0), stacked), inputs((5, WIDTH))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
        return layer(x)

    want = x
    for i, one in enumerate(patterns):
        want = want @ bsjax.todense(layers.values[i], one)[:WIDTH, :WIDTH]
    np.testing.assert_allclose(run(x, layers), want, rtol=1e-4, atol=1e-5)


def test_remat():
    ours, x = layer(), inputs()

    def loss(layer):
        return (layer(x) ** 2).sum()

    plain, again = nnx.grad(loss)(ours), nnx.grad(nnx.remat(loss))(ours)
    jax.tree.map(np.testing.assert_array_equal, plain, again)


def test_gradients_leave_the_pattern_alone():
    grads = nnx.grad(lambda layer: layer(inputs()).sum())(layer())
    assert grads.keys() == {"values", "bias"}
