"""The discretised mixture of logistics: NumPy's word for it, sums over all levels, and samples."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, softmax

from models import _logistic as logistic

log_probability = jax.jit(logistic.log_probability, static_argnums=2)
SHARPEST = np.exp(-logistic.LEAST_LOG_SCALE)


def every_pixel(channels, levels):
    return np.array(list(itertools.product(range(levels), repeat=channels)), np.int32)


def parameters(channels, k, count, *, seed=0, wild=False):
    """raw[count, numbers]; wild ones are far outside of the image, or nearly flat, or clipped."""
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(count, logistic.numbers(channels, k) // k, k))
    raw[:, 1 + channels : 1 + 2 * channels] -= 1  # log scales
    if wild:
        raw *= rng.choice([0.1, 1, 4], size=(count, 1, 1))
    return raw.reshape(count, -1)


def by_hand(raw, pixel, levels):
    """P(pixel) of one `raw[numbers]`, as the docstring of the module has it."""
    c, L = len(pixel), levels
    parts = raw.reshape(-1, raw.size // logistic.numbers(c, 1))
    v = [2 * x / (L - 1) - 1 for x in pixel]
    total = 0.0
    for k, share in enumerate(softmax(parts[0])):
        pair, p = 1 + 2 * c, share
        for i in range(c):
            mean = parts[1 + i, k]
            for d in range(i):
                mean += np.tanh(parts[pair, k]) * v[d]
                pair += 1
            scale = np.exp(max(parts[1 + c + i, k], -7))
            top = 1 if pixel[i] == L - 1 else expit((v[i] + 1 / (L - 1) - mean) / scale)
            bottom = 0 if pixel[i] == 0 else expit((v[i] - 1 / (L - 1) - mean) / scale)
            p *= top - bottom
        total += p
    return total


@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (1, 17), (1, 256), (3, 3)])
def test_probabilities_of_all_levels_sum_to_one(channels, levels):
    raw = parameters(channels, 3, 40, wild=True)
    with jax.enable_x64(True):
        x = every_pixel(channels, levels)
        arguments = jnp.asarray(raw)[:, None], jnp.asarray(x)[None], levels
        p = np.exp(log_probability(*arguments))
    assert (p >= 0).all()
    # the upper end of a level and the lower end of the next are rounded apart, by some eps, then
    # divided by the scale; nowhere is F steeper than 1 / 4
    apart = 4 * np.finfo(np.float64).eps * SHARPEST
    np.testing.assert_allclose(p.sum(1), 1, rtol=0, atol=apart * channels * levels)


@pytest.mark.parametrize(("channels", "levels"), [(1, 17), (3, 4)])
def test_costs_are_those_of_numpy(channels, levels):
    shape = (2, 2, 3)
    raw = parameters(channels, 2, 12).reshape(*shape, -1)
    x = np.random.default_rng(1).integers(0, levels, (*shape, channels), np.int32)
    p = np.array([by_hand(raw[at], x[at], levels) for at in np.ndindex(*shape)]).reshape(shape)
    with jax.enable_x64(True):
        arguments = jnp.asarray(raw), jnp.asarray(x), levels
        nats, bits = log_probability(*arguments), logistic.bits_per_dimension(*arguments)
    # the oracle takes the difference of numbers near one
    off = 8 * np.finfo(np.float64).eps / p.min()
    np.testing.assert_allclose(nats, np.log(p), rtol=0, atol=off)
    np.testing.assert_allclose(bits, -np.log2(p).mean((1, 2)) / channels, rtol=0, atol=off)


def test_nothing_vanishes_far_from_a_mean():
    """In float32 F(a) - F(b) would be zero here, and its logarithm no number."""
    raw = np.array([[0.3, 60.0, -2.0], [0.3, -60.0, -2.0], [0.0, 0.1, 30.0]], np.float32)
    x = np.full((3, 1), 100, np.int32)
    value, slope = jax.jit(
        jax.value_and_grad(lambda raw: logistic.log_probability(raw, jnp.asarray(x), 256).sum())
    )(jnp.asarray(raw))
    with jax.enable_x64(True):
        each = log_probability(jnp.asarray(raw, jnp.float64), jnp.asarray(x), 256)
    assert np.asarray(each).max() < -20
    eps = np.finfo(np.float32).eps  # of three numbers of one sign, and their sum
    np.testing.assert_allclose(value, np.asarray(each).sum(), rtol=8 * eps)
    assert np.isfinite(slope).all()
    assert np.abs(slope[:, 1]).max() > 1


def test_a_channel_looks_at_the_ones_before_it_only():
    of = logistic.mixture(jnp.asarray(parameters(3, 2, 5), jnp.float32), 3)
    rng = np.random.default_rng(2)
    v = jnp.asarray(rng.uniform(-1, 1, (5, 3)), jnp.float32)
    for channel in range(3):
        mean = logistic.mean_of(channel, of, v)
        for other in range(3):
            moved = logistic.mean_of(channel, of, v.at[:, other].add(0.5))
            if other < channel:
                assert (mean != moved).all()
            else:
                np.testing.assert_array_equal(mean, moved)


def test_samples_come_as_often_as_the_likelihood_says():
    channels, levels, count = 3, 3, 20_000
    raw = jnp.asarray(parameters(channels, 2, 1, seed=3)[0], jnp.float32)
    x = every_pixel(channels, levels)
    p = np.exp(log_probability(raw[None], jnp.asarray(x), levels)).astype(np.float64)
    many = jnp.broadcast_to(raw, (count, raw.size))
    sample = jax.jit(logistic.sample, static_argnums=(2, 3))
    drawn = np.asarray(sample(jax.random.key(0), many, channels, levels))
    assert drawn.min() == 0
    assert drawn.max() == levels - 1
    seen = np.bincount(drawn @ [9, 3, 1], minlength=27)
    deviation = np.sqrt(count * p * (1 - p))
    assert (np.abs(seen - count * p) < 5 * deviation).all()
    # and the numbers deviate as much as they should: chi-squared with 26 degrees of freedom
    assert 8 < (((seen - count * p) ** 2) / (count * p)).sum() < 60
