"""The seven samplers: means, variances by their formulas, sizes, and scores at the edges."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.ops._samplers import SAMPLERS, chosen, inclusion, weigh
from tests.helpers import slow

KEY = jax.random.key(0)
T, KEYS = 32, 20_000
UNBIASED = [name for name in SAMPLERS if name != "top_k"]
FIXED = ["uniform", "systematic", "priority", "top_k"]  # exactly t groups


SCORES = {  # at the edges, of few groups
    "heavy-tailed": np.random.default_rng(1).lognormal(sigma=3, size=40),
    "equal": np.full(40, 3e-20),
    "zero": np.zeros(40),
    "one dominant": np.r_[np.ones(20), 1e12, np.ones(19)],
    "few not zero": np.r_[np.zeros(20), 1.0, 2.0, 3.0, np.zeros(17)],
    "half zero": np.r_[np.zeros(20), np.ones(20)],
}


@functools.cache
def problem(block, *, signed=True):
    """Scores of groups, and `<X_g, X_h>` for all pairs of the outer products that they sum: a
    product 32 x (128 block) x 24 of heavy-tailed columns, cut into 128 groups."""
    rng, k = np.random.default_rng(0), 128 * block
    a = rng.normal(size=(32, k)) * rng.lognormal(sigma=1, size=k)
    b = rng.normal(size=(k, 24))
    if not signed:
        a, b = abs(a), abs(b)
    a, b = a.reshape(32, -1, block), b.reshape(-1, block, 24)
    terms = np.einsum("ngi,gim->gnm", a, b).reshape(128, -1)
    scores = np.sqrt(np.square(a).sum((0, 2)) * np.square(b).sum((1, 2)))
    return scores, terms @ terms.T


one = jax.jit(weigh, static_argnums=(0, 3))


@functools.partial(jax.jit, static_argnums=(0, 3))
def several(sampler, keys, scores, t):
    return jax.vmap(lambda key: weigh(sampler, key, scores, t))(keys)


def samples(sampler, scores, t, keys):
    """Weights `[keys, groups]`."""
    drawn = several(sampler, jax.random.split(KEY, keys), jnp.asarray(scores, jnp.float32), t)
    return np.asarray(drawn, np.float64)


@functools.cache
def draw(sampler, block, *, signed=True):
    """Those of the problem, drawn once for all tests."""
    return samples(sampler, problem(block, signed=signed)[0], T, KEYS)


@functools.cache
def draw_few(sampler, t=7):
    """2000 samples of t of 40 groups."""
    return samples(sampler, SCORES["heavy-tailed"], t, 2000)


def filled(scores, t):
    """`min(1, c z)` that sum to t, by bisection in float64."""
    low, high = 0.0, 1e40
    for _ in range(400):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * scores).sum() < t else (low, middle)
    return np.minimum(1, high * scores)


def largest(scores, t):
    """How many groups "wta" takes for sure: the number that has the smallest variance bound."""
    tails = np.cumsum(np.sort(scores))[::-1][:t]
    return int(np.argmin(np.square(tails) / (t - np.arange(t))))


def moments(sampler, scores, t):
    """By the closed formulas: the variance of each weight, and the covariance of any two, where
    that is one number (with replacement draws exclude each other)."""
    g = len(scores)
    if sampler == "uniform":
        return np.full(g, g / t - 1), -(g / t - 1) / (g - 1)
    if sampler == "with_replacement":
        return (scores.sum() / scores - 1) / t, -1 / t
    pi = filled(scores, t)
    return (1 - pi) / pi, 0.0


def squared_error(sampler, scores, products, t):
    """`E ||estimate - sum||_F^2`."""
    if sampler == "wta":
        tail = np.argsort(-scores)[largest(scores, t) :]
        c = len(scores) - len(tail)
        return squared_error("with_replacement", scores[tail], products[np.ix_(tail, tail)], t - c)
    variance, covariance = moments(sampler, scores, t)
    return (variance - covariance) @ np.diag(products) + covariance * products.sum()


def measured(sampler, block, **options):
    """The same, from samples."""
    products = problem(block, signed=options.get("signed", True))[1]
    off = draw(sampler, block, **options) - 1
    return np.einsum("ng,gh,nh->n", off, products, off, optimize=True).mean()


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("sampler", ["uniform", "with_replacement", "bernoulli", "wta"])
def test_the_variance_is_that_of_the_formula(sampler, block):
    """With `||X_g||_F` for blocks, of which the scores are only a bound."""
    want = squared_error(sampler, *problem(block), T)
    np.testing.assert_allclose(measured(sampler, block), want, rtol=0.03)


def test_fixed_sizes_cost_no_variance():
    """Systematic and priority samples beside "bernoulli", whose size is random."""
    bernoulli = squared_error("bernoulli", *problem(1), T)
    np.testing.assert_allclose(measured("systematic", 1), bernoulli, rtol=0.05)
    assert bernoulli < measured("priority", 1) < 1.2 * bernoulli
    positive = squared_error("bernoulli", *problem(1, signed=False), T)
    assert measured("systematic", 1, signed=False) < 0.9 * positive
    others = {name: squared_error(name, *problem(1), T) for name in ("wta", "with_replacement")}
    assert bernoulli < others["wta"] < others["with_replacement"]


@pytest.mark.parametrize("sampler", UNBIASED)
def test_every_weight_has_mean_one(sampler):
    """Within five standard errors, for each of 128 groups."""
    weights, scores = draw(sampler, 1), problem(1)[0]
    if sampler == "wta":
        c, order = largest(scores, T), np.argsort(-scores)
        np.testing.assert_array_equal(weights[:, order[:c]], 1)
        weights, scores = weights[:, order[c:]], scores[order[c:]]
        variance = moments("with_replacement", scores, T - c)[0]
    elif sampler == "priority":  # its pairs have no formula; each alone varies as it was seen to
        variance = weights.var(0)
    else:
        variance = moments(sampler, scores, T)[0]
    off = abs(weights.mean(0) - 1)
    assert np.all(off <= 5 * np.sqrt(variance / KEYS) + 1e-6)
    assert variance.max() > 1  # so that a weight of 1 for all would be another estimate


def test_top_k_takes_the_largest_as_they_are():
    weights, scores = draw_few("top_k"), SCORES["heavy-tailed"]
    np.testing.assert_array_equal(np.flatnonzero(weights[0]), np.sort(np.argsort(-scores)[:7]))
    assert set(weights.ravel()) == {0, 1}


EXTREME = [("systematic", 1), ("wta", 1), ("systematic", 39), ("priority", 39), ("wta", 39)]
MORE = [case for case in itertools.product(SAMPLERS, (1, 39)) if case not in EXTREME]


@pytest.mark.parametrize(
    ("sampler", "t"),
    [*((sampler, 7) for sampler in SAMPLERS), *EXTREME, *(slow(*case) for case in MORE)],
)
def test_sizes(sampler, t):
    sizes = (draw_few(sampler, t) > 0).sum(1)
    if sampler in FIXED:
        assert set(sizes) == {t}
    elif sampler == "bernoulli":
        pi = filled(SCORES["heavy-tailed"], t)
        assert abs(sizes.mean() - t) <= 5 * np.sqrt((pi * (1 - pi)).sum() / 2000) + 1e-6
    else:
        assert 1 <= sizes.min() <= sizes.max() <= t


def test_systematic_samples_of_many_groups():
    """A float32 running sum cannot tell one of 100,000 points from the next."""
    groups, t = 150_000, 100_000
    scores = jnp.asarray(np.random.default_rng(0).lognormal(size=groups), jnp.float32)
    weights = np.asarray(one("systematic", KEY, scores, t))
    assert (weights > 0).sum() == t
    # the sum of what the scores are proportional to has no variance
    walk = groups**0.5 * float(jnp.finfo(jnp.float32).eps)  # of the roundings of a running sum
    np.testing.assert_allclose(weights @ np.asarray(scores), scores.sum(), rtol=walk)


@pytest.mark.parametrize("t", [1, 7, 39])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_water_filling(scores, t):
    z = np.maximum(scores / scores.max(), 1e-30) if scores.any() else np.ones(40)
    pi = np.asarray(inclusion(jnp.asarray(z, jnp.float32), t), np.float64)
    np.testing.assert_allclose(pi.sum(), t, rtol=1e-5)
    np.testing.assert_allclose(pi, filled(z, t), rtol=1e-4)
    assert pi.max() <= 1


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_scores_at_the_edges(sampler, scores):
    """Means stay 1 where anything counts, nothing is infinite, zeros come last."""
    t, keys = 7, 2000
    weights = samples(sampler, scores, t, keys)
    assert np.isfinite(weights).all()
    assert weights.any(1).all() or sampler == "bernoulli"
    positive = scores > 0
    if sampler not in ("uniform", "with_replacement") and 0 < positive.sum() <= t:
        np.testing.assert_array_equal(weights[:, positive], 1)
    if sampler != "uniform" and positive.sum() > t:
        assert not weights[:, ~positive].any()
    if sampler in UNBIASED:  # of all that count together, within five standard errors
        total = weights @ np.where(positive, scores, 0 if positive.any() else 1)
        want = scores.sum() or len(scores)
        assert abs(total.mean() - want) <= 5 * total.std() / np.sqrt(keys) + 1e-5 * want


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_not_finite_spoils_all(sampler, bad):
    weights = one(sampler, KEY, jnp.ones(9).at[3].set(bad), 4)
    assert jnp.isnan(weights).all() if sampler != "uniform" else jnp.isfinite(weights).all()
    assert len(set(np.asarray(chosen(weights, 4)[0]))) == 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_key_the_same_sample(sampler):
    first = draw_few(sampler)
    np.testing.assert_array_equal(first, samples(sampler, SCORES["heavy-tailed"], 7, 2000))
    assert sampler == "top_k" or np.any(first[0] != first[1:])


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "bernoulli"])
def test_what_is_chosen(sampler):
    """Distinct groups, all that count among them, with their weights: the rest fills up."""
    weights = jnp.asarray(draw_few(sampler)[3], jnp.float32)
    index, scale = (np.asarray(a) for a in chosen(weights, 7))
    assert len(set(index)) == 7
    back = np.zeros(40)
    back[index] = scale
    np.testing.assert_array_equal(back, weights)
