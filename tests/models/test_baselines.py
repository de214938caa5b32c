"""Every baseline against its formula, written as NumPy loops or by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import baselines
from tests.helpers import normal, tolerance
from tests.models.tiny import optax_promotes

N, K, M = 5, 7, 6


@pytest.fixture(scope="module")
def layer():
    """x, w, b, dy."""
    rng = np.random.default_rng(0)
    return tuple(normal(rng, shape) for shape in ((N, K), (K, M), (M,), (N, M)))


def chosen(dy, keep, unified):
    """dy with zeros in place of what meProp leaves out, one number at a time."""
    kept = np.zeros_like(dy)
    columns = sorted(range(M), key=lambda m: -sum(abs(dy[n, m]) for n in range(N)))[:keep]
    for n in range(N):
        own = sorted(range(M), key=lambda m: -abs(dy[n, m]))[:keep]
        for m in columns if unified else own:
            kept[n, m] = dy[n, m]
    return kept


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("keep", [1, 2, M])
def test_meprop_sees_the_largest_part_of_the_cotangent(layer, keep, unified):
    x, w, b, dy = layer

    def run(x, w, b):
        return baselines.meprop(x, w, keep=keep, unified=unified) + b[None]

    y, back = jax.vjp(run, x, w, b)
    dx, dw, db = back(dy)
    x, w, b, dy = (np.asarray(a, np.float64) for a in layer)
    kept = chosen(dy, keep, unified)
    close(y, x @ w + b, K)
    close(dx, kept @ w.T, M)
    close(dw, x.T @ kept, N)
    close(db, dy.sum(0), N)  # exact in both forms
    zero_columns = np.asarray(dw == 0).all(0).sum()
    assert zero_columns == (M - keep if unified else (kept == 0).all(0).sum())


def close(found, wanted, terms):
    np.testing.assert_allclose(np.asarray(found), wanted, **tolerance(jnp.float32, terms))


@pytest.mark.parametrize("keep", [0, M + 1])
def test_meprop_names_what_cannot_be_kept(layer, keep):
    message = f"meprop: `keep` must be at least 1 and at most the 6 columns of `w`, got {keep}"
    with pytest.raises(ValueError, match=message):
        baselines.meprop(*layer[:2], keep=keep)


def test_meprop_names_shapes_that_do_not_fit(layer):
    x, w, *_ = layer
    message = r"meprop: `x` of shape \(5, 7\) cannot multiply `w` of shape \(6, 7\): expected"
    with pytest.raises(ValueError, match=message):
        baselines.meprop(x, w.T, keep=2)


@pytest.mark.parametrize("step", [0, 1, 9])
def test_gradient_noise_has_the_annealed_variance(step):
    eta, size = 0.3, 20_000
    tx = baselines.gradient_noise(jax.random.key(0), eta=eta)
    gradient = {"w": jnp.full((size,), 2.0)}
    with optax_promotes():
        state = tx.init(gradient)
        updates = gradient
        for _ in range(step + 1):
            updates, state = tx.update(gradient, state)
    noise = np.asarray(updates["w"]) - 2
    variance = eta / (1 + step) ** 0.55
    # five deviations of a mean, and of the mean of squares, of so many normal numbers
    assert abs(noise.mean()) < 5 * (variance / size) ** 0.5
    assert abs(noise.var() / variance - 1) < 5 * (2 / size) ** 0.5


def test_gradient_noise_chains_with_an_optimizer():
    tx = optax.chain(baselines.gradient_noise(jax.random.key(0), eta=0.0), optax.sgd(0.5))
    gradient = jnp.array([1.0, -2.0])
    with optax_promotes():
        updates, _ = tx.update(gradient, tx.init(gradient))
    np.testing.assert_array_equal(updates, -0.5 * gradient)


def test_input_noise_has_its_deviation_and_its_key():
    x = jnp.full((200, 100), 3.0)
    noisy = baselines.input_noise(jax.random.key(1), x, deviation=0.2)
    noise = np.asarray(noisy - x)
    assert abs(noise.mean()) < 5 * 0.2 / noise.size**0.5
    assert abs(noise.var() / 0.04 - 1) < 5 * (2 / noise.size) ** 0.5
    again, other = (baselines.input_noise(jax.random.key(k), x, deviation=0.2) for k in (1, 2))
    assert jnp.array_equal(noisy, again)
    assert not jnp.array_equal(noisy, other)


def test_weight_noise_is_another_one_for_each_array_and_constant_to_derivatives():
    parameters = {"a": jnp.zeros((40, 50)), "b": jnp.zeros((40, 50))}
    noisy = baselines.weight_noise(jax.random.key(0), parameters, deviation=0.1)
    assert not jnp.array_equal(noisy["a"], noisy["b"])
    assert abs(float(noisy["a"].std()) / 0.1 - 1) < 5 * (0.5 / 2000) ** 0.5

    def loss(parameters):
        noisy = baselines.weight_noise(jax.random.key(0), parameters, deviation=0.1)
        return sum((leaf**3).sum() for leaf in noisy.values())

    gradient = jax.grad(loss)(parameters)  # that of the clean loss would be zero here
    for name, leaf in noisy.items():
        np.testing.assert_allclose(gradient[name], 3 * leaf**2, rtol=1e-6)


# ---------------------------------------------------------------------- direct feedback alignment


def test_direct_feedback_alignment_by_hand():
    """A net of three layers with tanh and cross-entropy, by the formula of the paper."""
    rng = np.random.default_rng(1)
    sizes = [(7, 5), (5, 4), (4, 3)]
    x, labels = normal(rng, (6, 7)), jnp.asarray(rng.integers(0, 3, 6))
    parameters = [(normal(rng, size), normal(rng, size[1:])) for size in sizes]
    feedback = [normal(rng, (3, 5)), normal(rng, (3, 4))]
    layers = [lambda p, h: jnp.tanh(h @ p[0] + p[1][None])] * 2 + [
        lambda p, h: h @ p[0] + p[1][None]
    ]

    def loss(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, found = baselines.direct_feedback_alignment(layers, parameters, x, loss, feedback)

    (w1, b1), (w2, b2), (w3, b3) = jax.tree.map(lambda a: np.asarray(a, np.float64), parameters)
    c1, c2 = (np.asarray(b, np.float64) for b in feedback)
    h0 = np.asarray(x, np.float64)
    h1 = np.tanh(h0 @ w1 + b1)
    h2 = np.tanh(h1 @ w2 + b2)
    logits = h2 @ w3 + b3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    rows = np.arange(6)
    wanted = -np.log(p[rows, labels]).mean()
    e = p.copy()
    e[rows, labels] -= 1
    e /= 6
    d1, d2 = (e @ c1) * (1 - h1**2), (e @ c2) * (1 - h2**2)
    by_hand = [(h0.T @ d1, d1.sum(0)), (h1.T @ d2, d2.sum(0)), (h2.T @ e, e.sum(0))]
    # a chain of products of up to seven terms, each with a function of a few ulps after it
    bounds = tolerance(jnp.float32, 3 * 7 * 4)
    np.testing.assert_allclose(value, wanted, **bounds)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, **bounds)


def test_feedback_alignment_with_the_true_weights_above_is_backpropagation():
    """Where the layer above is the last one and linear, its transpose is the right feedback."""
    rng = np.random.default_rng(2)
    x, target = normal(rng, (6, 7)), normal(rng, (6, 3))
    parameters = [normal(rng, (7, 5)), normal(rng, (5, 3))]
    layers = [lambda w, h: jax.nn.relu(h @ w), lambda w, h: h @ w]

    def loss(y):
        return ((y - target) ** 2).mean()

    feedback = [parameters[1].T]
    _, found = baselines.direct_feedback_alignment(layers, parameters, x, loss, feedback)
    wanted = jax.grad(lambda p: loss(layers[1](p[1], layers[0](p[0], x))))(parameters)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, **tolerance(jnp.float32, 7 * 5))


def test_feedback_matrices_are_bounded_and_differ():
    one, two = baselines.feedback_matrices(jax.random.key(0), 10, [400, 100])
    assert (one.shape, two.shape) == ((10, 400), (10, 100))
    for matrix, bound in ((one, 1 / 20), (two, 1 / 10)):
        assert float(jnp.abs(matrix).max()) <= bound
        assert abs(float(matrix.std()) / (bound / 3**0.5) - 1) < 0.1
    assert not jnp.array_equal(one[:, :100] / 1, two)


def test_feedback_must_be_one_less_than_the_layers():
    message = "2 layers need as many `parameters` and one `feedback` less, got 2 and 2"
    with pytest.raises(ValueError, match=message):
        baselines.direct_feedback_alignment([jnp.dot] * 2, [1, 2], jnp.ones(2), jnp.sum, [1, 2])
