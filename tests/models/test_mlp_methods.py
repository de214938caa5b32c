"""What the methods of the digits recipe cost, and what they take for a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import _mlp as net
from models import _mlp_methods as methods
from models._mlp_methods import Method

SIZES = [(20, 12), (12, 8), (8, 10)]


def products(n=4):
    """2 n k m of each layer."""
    return [2 * n * k * m for k, m in SIZES]


def norms(*counts):
    return 2 * sum(counts)


def test_what_a_step_costs():
    n, (a, b, c) = 4, products()
    dense = 2 * a + 3 * b + 3 * c  # the images need no gradient
    half = {"fraction": 0.5, "sampler": "systematic"}

    def cost(**method):
        return methods.flops(Method(**method), SIZES, n)

    assert cost() == cost(kind="input noise", strength=0.1) == dense
    scores = norms(n * 20, 20 * 12, n * 12, 12 * 8)
    assert cost(kind="forward", **half) == 2 * a / 2 + 3 * b / 2 + 3 * c + scores
    assert cost(kind="forward", fraction=0.5, sampler="uniform") == a + 1.5 * b + 3 * c
    scores = norms(n * 20, n * 12, n * 12, n * 8, n * 8, 12 * 8)
    assert cost(kind="backward", **half) == 1.5 * a + 2 * b + 3 * c + scores
    assert cost(kind="weight", **half) == 1.5 * a + 2.5 * b + 3 * c + norms(n * 20, n * 12)
    for kind in methods.MEPROP:
        assert cost(kind=kind, fraction=0.5) == 1.5 * a + 2 * b + 3 * c + n * 12 + n * 8
    down = 2 * n * 10 * 12 + 2 * n * 10 * 8
    assert cost(kind="direct feedback") == 2 * (a + b + c) + down


def test_the_cost_counts_what_is_taken_and_not_what_was_asked_for():
    # 20 features are 5 groups of 4, and 12 are 3: a fraction of 0.3 takes 2 and 1 of them
    method = Method(kind="forward", fraction=0.3, sampler="uniform", block=4)
    a, b, c = products()
    assert methods.flops(method, SIZES, 4) == pytest.approx(2 * a * 2 / 5 + 3 * b / 3 + 3 * c)


@pytest.fixture(scope="module")
def network():
    """Parameters, images, labels and feedback of SIZES."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, y = jax.random.normal(keys[0], (6, 20)), jnp.arange(6)
    feedback = net.baselines.feedback_matrices(keys[2], 10, [12, 8])
    return net.initial(keys[1], SIZES), feedback, x, y


EXACT = [
    Method(),
    *(Method(kind=kind, fraction=1.0) for kind in methods.MEPROP),
    *(Method(kind=kind) for kind in ("input noise", "weight noise")),
    *(Method(kind=policy, sampler="systematic") for policy in methods.POLICIES),
]


@pytest.mark.parametrize("method", EXACT, ids=lambda method: method.kind)
def test_without_sampling_or_noise_all_methods_are_one(network, method):
    """Fraction 1 and deviation 0: plain backpropagation, here written as a loop."""
    parameters, feedback, x, y = network

    def loss(parameters):
        h = x
        for i, (w, b) in enumerate(parameters):
            h = h @ w + b[None]
            h = jnp.maximum(h, 0) if i < 2 else h
        return -jax.nn.log_softmax(h)[jnp.arange(6), y].mean()

    wanted = jax.value_and_grad(loss)(parameters)
    found = net.loss_and_gradient(method, parameters, feedback, jax.random.key(0), x, y)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_layers_draw_samples_of_their_own_and_the_classifier_none(network):
    _, feedback, x, y = network
    square = [(jnp.ones((20, 20)), jnp.zeros(20))] * 2 + [(jnp.ones((20, 10)), jnp.zeros(10))]
    method = Method(kind="forward", fraction=0.5, sampler="uniform")
    x = jnp.abs(x)
    _, gradient = net.loss_and_gradient(method, square, feedback, jax.random.key(0), x, y)
    first, second, last = (np.asarray(w != 0).any(1) for w, _ in gradient)
    assert first.sum() == second.sum() == 10
    assert (first != second).any()
    assert last.all()


def test_the_average_of_weights_forgets_as_it_says():
    """The plain mean at first, so that initial weights have no share, then exponentially."""
    training = methods.Training(
        layers=1, batch=2, optimizer="momentum", learning_rate=0.1, weight_decay=0.0, average=0.75
    )
    keys = jax.random.split(jax.random.key(0), 2)
    data = jax.random.normal(keys[0], (12, 5)), jnp.arange(12) % 10
    run = net.compile_programs(Method(), training, 4, keys, data, data).train
    state = net.start(Method(), training, keys, training.sizes(5, 4))
    steps, shares = [], (1, 1 / 2, 1 / 3, 1 / 4, 1 / 4, 1 / 4)
    for step in range(6):
        state, _ = run(state, keys, *data, *map(jnp.int32, (step, step + 1, 6)))
        steps.append([np.array(leaf) for leaf in jax.tree.leaves(state[0])])
    for found, *values in zip(jax.tree.leaves(state[1]), *steps, strict=True):
        wanted = np.zeros(found.shape)
        for value, share in zip(values, shares, strict=True):
            wanted += share * (value - wanted)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
