"""A training step by hand, schedules, label smoothing, averaged and re-estimated statistics."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import _resnet_train as net
from models._augment import Moments
from models._images import Split
from models._resnet_plan import Size
from models._resnet_train import Training, cross_entropy, learning_rate
from models._train import is_matrix
from tests.helpers import of_one_sign
from tests.models.stories import optax_promotes as optax_promotes  # a fixture of the module
from tests.transformer.oracle import assert_close

SIZE = Size("basic", (1,), (16,), densities=(0.5,), block=8)
TRAINING = Training(
    10,
    0.1,
    schedule="step",
    drops=(0.1,),
    factor=0.5,
    weight_decay=0.01,
    smoothing=0.1,
    average=0.5,
)
MOMENTS = Moments(np.array([100.0], np.float32), np.array([50.0], np.float32))
RNG = np.random.default_rng(0)
BATCHES = [
    (RNG.integers(0, 256, (6, 5, 5, 1), dtype=np.uint8), RNG.integers(0, 10, 6, dtype=np.int32))
    for _ in range(3)
]


EPS = float(np.finfo(np.float32).eps)
TERMS = 9 * 16 * 3 * 3  # sums over taps and channels in, in three layers and three steps


def leaves(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


# ------------------------------------------------------------------------------- rates and losses

FEW = 4 * float(np.finfo(np.float32).eps)  # eight roundings in a row: constants, products, a cosine


def test_a_cosine_falls_from_the_highest_rate_to_zero():
    training = Training(100, 0.2)
    for step in (0, 1, 37, 50, 99):
        expected = 0.2 * (1 + math.cos(math.pi * step / 100)) / 2
        assert float(learning_rate(training, step)) == pytest.approx(expected, rel=0, abs=0.2 * FEW)


def test_a_rate_that_rises_first():
    training = Training(100, 0.2, warmup=0.1)
    found = [float(learning_rate(training, step)) for step in (0, 4, 9, 10, 55)]
    half = 0.2 * (1 + math.cos(math.pi * 45 / 90)) / 2
    np.testing.assert_allclose(found, [0.02, 0.1, 0.2, 0.2, half], rtol=FEW)


def test_a_rate_that_falls_in_steps():
    training = Training(200, 0.1, schedule="step", drops=(0.3, 0.6, 0.8), factor=0.2)
    steps = [0, 59, 60, 119, 120, 159, 160, 199]
    found = [float(learning_rate(training, step)) for step in steps]
    np.testing.assert_allclose(found, np.repeat([0.1, 0.02, 0.004, 0.0008], 2), rtol=FEW)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed_labels_are_targets_that_add_up_to_one(smoothing):
    logits, y = RNG.normal(size=(4, 5)), np.array([0, 4, 2, 2])
    targets = np.full((4, 5), smoothing / 5)
    targets[np.arange(4), y] += 1 - smoothing
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -(targets * logs).sum(1)
    found = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(y), smoothing)
    # each logit and its logarithm is rounded, and five terms of one sign are summed twice
    np.testing.assert_allclose(found, expected, rtol=2 * EPS + of_one_sign(5))


# -------------------------------------------------------------------------------- a step, by hand


def nesterov(parameters, gradient, velocity, rate):
    """w - rate * (g + 0.9 v), where v = 0.9 v + g, and g has 0.01 w of kernels in it."""
    gradient = jax.tree_util.tree_map_with_path(
        lambda at, g, w: g + 0.01 * w if is_matrix(at) else g, gradient, parameters
    )
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
    moved = jax.tree.map(lambda w, g, v: w - rate * (g + 0.9 * v), parameters, gradient, velocity)
    return moved, velocity


def mixed(new, old, share):
    return jax.tree.map(lambda a, b: share * a + (1 - share) * b, new, old)


@pytest.fixture(scope="module")
def steps():
    """Three steps by the recipe, and by plain autodiff and the formulas of Nesterov's momentum."""
    graph, state = net.start(SIZE, TRAINING, 1, 10, seed=0)
    compiled = net.train_step._cache_size()

    @jax.jit
    def expected(parameters, statistics, rest, x, y):
        def loss(parameters):
            model = nnx.merge(graph, parameters, statistics, rest, copy=True)
            logs = jax.nn.log_softmax(model((x.astype(jnp.float32) - 100) / 50))
            targets = 0.9 * jax.nn.one_hot(y, 10) + 0.01
            return -(targets * logs).sum(1).mean(), nnx.state(model, nnx.BatchStat)

        return jax.value_and_grad(loss, has_aux=True)(parameters)

    parameters, statistics, rest = jax.tree.map(jnp.array, state[:3])
    velocity = jax.tree.map(jnp.zeros_like, parameters)
    mean = (parameters, statistics)
    losses = []
    for i, (x, y) in enumerate(BATCHES):
        (value, statistics), gradient = expected(parameters, statistics, rest, x, y)
        parameters, velocity = nesterov(parameters, gradient, velocity, 0.05 if i else 0.1)
        mean = mixed((parameters, statistics), mean, max(0.5, 9 / (10 + i)))
        state, loss = net.train_step(graph, TRAINING, state, MOMENTS, x, y)
        losses.append((float(loss), float(value)))
    return types.SimpleNamespace(**locals())


def test_losses_are_those_of_the_formula(steps):
    for own, expected in steps.losses:
        assert own == pytest.approx(expected, rel=of_one_sign(TERMS))


def test_parameters_are_those_of_the_formula(steps):
    for a, b in zip(leaves(steps.state.parameters), leaves(steps.parameters), strict=True):
        assert_close(a, b, TERMS, least=TRAINING.learning_rate)  # sums of unit size times the rate


def test_parameters_and_statistics_are_averaged(steps):
    for a, b in zip(leaves(steps.state.average), leaves(steps.mean), strict=True):
        assert_close(a, b, TERMS, least=TRAINING.learning_rate)
    now = leaves((steps.state.parameters, steps.state.statistics))
    assert all((a != b).any() for a, b in zip(leaves(steps.state.average), now, strict=True))
    model = net.evaluated(steps.graph, steps.state, averaged=True)
    for which, kind in enumerate((nnx.Param, nnx.BatchStat)):
        found = leaves(nnx.state(model, kind))
        for a, b in zip(found, leaves(steps.state.average[which]), strict=True):
            np.testing.assert_array_equal(a, b)


def test_weights_decay_and_gains_and_offsets_do_not():
    _, state = net.start(SIZE, TRAINING, 1, 10, seed=0)
    zeros = jax.tree.map(jnp.zeros_like, state.parameters)
    tx = net.sgd(TRAINING._replace(momentum=0.0))
    updates, _ = tx.update(zeros, tx.init(state.parameters), state.parameters)
    for (path, update), weight in zip(
        jax.tree_util.tree_leaves_with_path(updates), leaves(state.parameters), strict=True
    ):
        name = jax.tree_util.keystr(path)
        plain = "scale" in name or "bias" in name
        # two constants, their products with the weight, here and there: six roundings
        expected = 0 * weight if plain else -0.1 * 0.01 * weight
        np.testing.assert_allclose(update, expected, rtol=3 * EPS)


def test_one_program_trains_every_seed_and_takes_the_memory_over(steps):
    assert net.train_step._cache_size() == steps.compiled + 1
    graph, state = net.start(SIZE, TRAINING, 1, 10, seed=1)  # other patterns and weights
    net.train_step(graph, TRAINING, state, MOMENTS, *BATCHES[0])
    assert net.train_step._cache_size() == steps.compiled + 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


# ------------------------------------------------------------------------------------- measuring


def test_measuring_counts_every_image_once(steps):
    split = Split(*(np.concatenate(arrays) for arrays in zip(*BATCHES, strict=True)))
    split = Split(split.x[:13], split.y[:13])
    model = net.evaluated(steps.graph, steps.state, averaged=False)
    right, loss = net.measure(model, MOMENTS, split, batch=6)
    logits = nnx.jit(lambda m, x: m(x))(model, (split.x.astype(np.float32) - 100) / 50)
    logits = np.asarray(logits, np.float64)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert right == (logits.argmax(1) == split.y).mean()
    bound = of_one_sign(9 * 16 * 3 + 13)  # taps and channels of three layers, and images
    assert loss == pytest.approx(-logs[np.arange(13), split.y].mean(), rel=bound)


@pytest.mark.parametrize("averaged", [True, False])
def test_reestimated_statistics_are_those_of_all_the_batches(steps, averaged):
    """Of the first normalisation: what comes into it does not depend on any other."""
    graph, state = steps.graph, steps.state
    new = net.reestimated(graph, state, MOMENTS, BATCHES, 3, averaged=averaged)
    parameters, statistics = new.average if averaged else new[:2]
    before = state.average if averaged else state[:2]
    x = np.concatenate([x for x, _ in BATCHES]).astype(np.float32)
    kernel = np.asarray(parameters["stem"]["kernel"][...])
    y = jax.lax.conv_general_dilated(
        (x - 100) / 50, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = np.asarray(y, np.float64)
    # a sum of n numbers is off by `4 eps n` of their size (`tests.helpers.tolerance`), so a mean by
    # `4 eps`; squares have one sign
    mean, square = (a.mean((0, 1, 2)) for a in (y, y**2))
    found = statistics["norm"]
    np.testing.assert_allclose(found["mean"][...], mean, rtol=0, atol=4 * EPS * y.std())
    off = of_one_sign(3 * 6 * 25) * square.max()
    np.testing.assert_allclose(found["var"][...], y.var((0, 1, 2)), rtol=0, atol=off)
    for a, b in zip(leaves(parameters), leaves(before[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all((a != b).any() for a, b in zip(leaves(statistics), leaves(before[1]), strict=True))
    untouched = new[:2] if averaged else new.average
    same = leaves(state[:2] if averaged else state.average)
    for a, b in zip(leaves(untouched), same, strict=True):
        np.testing.assert_array_equal(a, b)
