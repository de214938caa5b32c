"""A model with block layers in it is trained as any other: optax never meets a pattern."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bsjax.nnx
from tests.helpers import normal, random_mask

MASK = random_mask(4, 4, 0.5, seed=2)


def model(seed=0, mask=MASK, **options):
    """Two block layers that blocks do not divide, and a dense one, as any layers of Flax."""
    rngs = nnx.Rngs(seed)
    options = {"pattern": mask, "block": 8, "rngs": rngs} | options
    return nnx.Sequential(
        bsjax.nnx.BlockLinear(30, 27, **options),
        nnx.relu,
        bsjax.nnx.BlockLinear(27, 32, **options),
        nnx.relu,
        nnx.Linear(32, 3, rngs=rngs),
    )


def data(n=64):
    rng = np.random.default_rng(0)
    x = normal(rng, (n, 30))
    return x, jnp.tanh(x @ normal(rng, (30, 3)) / 4)


def loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def step(model, optimizer, x, y):
    value, grads = nnx.value_and_grad(loss)(model, x, y)
    optimizer.update(model, grads)
    return value


def train(model, tx, steps):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as optax needs
        return [float(step(model, optimizer, *data())) for _ in range(steps)]


def patterns(model):
    return [v.get_value() for _, v in nnx.to_flat_state(nnx.state(model, bsjax.nnx.Pattern))]


DECAY = optax.add_decayed_weights(
    0.1, mask=lambda params: jax.tree.map(lambda a: a.ndim > 1, params)
)
OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2)),
    "masked weight decay": optax.chain(optax.scale_by_adam(), DECAY, optax.scale(-1e-2)),
    "sgd": optax.sgd(0.1, momentum=0.9),
}


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_learns_and_leaves_the_pattern_alone(tx):
    ours = model()
    losses = train(ours, tx, 60)
    assert losses[-1] < 0.3 * losses[0]
    assert len(patterns(ours)) == 2
    for p in patterns(ours):
        assert p.equals(bsjax.BlockPattern.from_mask(MASK, 8))


def test_learns_in_bfloat16_with_float32_parameters():
    ours = model(dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        losses = train(ours, OPTIMIZERS["adam"], 60)
    assert losses[-1] < 0.3 * losses[0]
    assert {v.dtype for v in jax.tree.leaves(nnx.state(ours, nnx.Param))} == {jnp.dtype("float32")}


def test_learns_what_a_dense_model_with_that_pattern_learns():
    """The same steps as with a dense matrix whose gradient is masked."""
    ours, x, y = model(), *data()
    first, p = ours.layers[0], patterns(ours)[0]
    stored = np.kron(np.asarray(p.mask()), np.ones((8, 8)))[:30, :27]
    kernel, bias = bsjax.todense(first.values[...], p)[:30, :27], first.bias[...]
    dense = nnx.clone(ours)
    dense.layers[0] = nnx.Linear(30, 27, rngs=nnx.Rngs(0))
    dense.layers[0].kernel[...], dense.layers[0].bias[...] = kernel, bias
    for each in (ours, dense):
        optimizer = nnx.Optimizer(each, optax.sgd(0.1), wrt=nnx.Param)
        for _ in range(5):
            grads = nnx.grad(loss)(each, x, y)
            if each is dense:
                grads["layers"][0]["kernel"][...] *= jnp.asarray(stored, jnp.float32)
            optimizer.update(each, grads)
    moved = bsjax.todense(first.values[...], p)[:30, :27]
    np.testing.assert_allclose(moved, dense.layers[0].kernel[...], rtol=1e-3, atol=1e-5)
    assert float(jnp.abs(moved - kernel).max()) > 1e-2


def test_padding_stays_zero():
    ours = model()
    train(ours, OPTIMIZERS["masked weight decay"], 3)
    full = bsjax.todense(ours.layers[0].values[...], patterns(ours)[0])
    assert not full[30:].any()
    assert not full[:, 27:].any()


def test_weight_decay_goes_where_its_mask_says():
    ours, zero = model(), optax.chain(optax.scale(0.0), DECAY, optax.scale(-1.0))
    before = jax.tree.map(jnp.copy, nnx.state(ours, nnx.Param))
    with jax.numpy_dtype_promotion("standard"):
        optimizer = nnx.Optimizer(ours, zero, wrt=nnx.Param)
        optimizer.update(ours, jax.tree.map(jnp.ones_like, before))
    first, old = ours.layers[0], before["layers"][0]
    np.testing.assert_allclose(first.values[...], 0.9 * old["values"][...], rtol=1e-6)
    np.testing.assert_array_equal(first.bias[...], old["bias"][...])


def test_clipping_counts_parameters_only():
    """The global norm is that of the gradients of values and biases."""
    ours = model()
    grads = nnx.grad(loss)(ours, *data())
    clipped, _ = optax.clip_by_global_norm(1e-3).update(grads, optax.EmptyState())
    leaves = [np.asarray(a) for a in jax.tree.leaves(clipped)]
    assert {a.dtype for a in leaves} == {np.dtype(np.float32)}
    np.testing.assert_allclose(sum((a**2).sum() for a in leaves) ** 0.5, 1e-3, rtol=1e-5)


def test_average_of_parameters():
    """EMA over `nnx.Param`, put into a copy of the model."""
    ours, average = model(), model()
    start = jax.tree.map(jnp.copy, nnx.state(ours, nnx.Param))
    train(ours, OPTIMIZERS["adam"], 3)
    now = nnx.state(ours, nnx.Param)
    nnx.update(average, optax.incremental_update(now, start, step_size=0.25))
    np.testing.assert_allclose(
        average.layers[0].values[...],
        0.25 * now["layers"][0]["values"][...] + 0.75 * start["layers"][0]["values"][...],
        rtol=1e-6,
    )
    assert patterns(average)[0].equals(patterns(ours)[0])
    assert average(data()[0]).shape == (64, 3)


def test_averaging_everything_is_refused():
    """An average of coordinates is no coordinate: the message says what to leave out."""
    ours = model()
    with jax.numpy_dtype_promotion("standard"):
        both = optax.incremental_update(nnx.state(ours), nnx.state(model(1)), step_size=0.25)
    nnx.update(ours, both)
    with pytest.raises(TypeError, match=r"`p.row` must be int32, got float32.*cast or averaged"):
        ours(data()[0])
