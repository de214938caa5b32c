"""Samplers: which terms of a sum `sum_g X_g` are computed, and how much each of them counts.

A sampler gives a weight to every group g, `t` of them (or fewer) not zero, and the estimate is
`sum_g weight_g X_g`. It is unbiased if every weight has mean 1. `z_g`, the score, is the size of
`X_g` or a bound of it; below, u are uniform random numbers.

    uniform           G / t for t random groups
    with_replacement  draws of g with p = z / sum(z), each counts 1 / (t p)
                      Drineas, Kannan and Mahoney 2006
    bernoulli         1 / pi with probability pi, or 0; pi = min(1, c z), its sum is t
                      Adelman, Levy, Hakimi and Silberstein 2018
    systematic        the same pi, and exactly t groups: those in whose interval of the running sum
                      of pi, in random order, one of the points u, 1 + u, 2 + u ... falls
                      Madow 1949
    priority          max(1, tau / z) for the t largest z / u; tau is the next largest
                      Duffield, Lund and Thorup 2007
    top_k             1 for the t largest z: biased
    wta               1 for the c largest z, t - c draws with replacement from the others
                      Liu et al. 2023

Departures: pi is water-filled, where Adelman et al. clip it (and lose budget); c minimises the
variance of wta, `(share of the others)^2 / (t - c)`, where Liu et al. minimise a bound of it.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

type Sampler = Literal[
    "uniform", "with_replacement", "bernoulli", "systematic", "priority", "top_k", "wta"
]
SAMPLERS = get_args(Sampler.__value__)
# Scores of zero become this share of the largest: such groups are taken last, and evenly.
LEAST = 1e-30


def weigh(sampler: Sampler, key: Any, scores: Float[Array, " g"], t: int) -> Float[Array, " g"]:
    """The weight of every group in float32, for a sample of `0 < t < g` groups.

    Only the ratios of `scores` count. Where all are zero all are equal; where one is not finite,
    every weight is NaN (which "uniform" never does: it does not look).
    """
    if sampler == "uniform":
        return _uniform(key, scores, t)
    z = scores.astype(jnp.float32)
    top = z.max()
    weights = _BY_SCORE[sampler](key, jnp.where(top > 0, jnp.maximum(z / top, LEAST), 1), t)
    return jnp.where(jnp.isfinite(z).all(), weights, jnp.nan)


def chosen(weights: Float[Array, " g"], t: int) -> tuple[Int32[Array, " t"], Float[Array, " t"]]:
    """`t` distinct groups, among them all whose weight is not zero, and their weights."""
    index = jax.lax.top_k((weights != 0).astype(jnp.float32), t)[1]
    return index.astype(jnp.int32), weights[index]


def inclusion(z: Float[Array, " g"], t: int) -> Float[Array, " g"]:
    """`pi = min(1, c z)` with c such that the sum is t: the `head` largest are taken for sure."""
    ordered = -jnp.sort(-z)
    tails = _tails(ordered)[:t]
    left = t - jnp.arange(t, dtype=z.dtype)
    # the last of them always fits: a score is at most the sum of itself and others
    head = jnp.argmax((left * ordered[:t] <= tails).at[-1].set(True))
    return jnp.minimum(1, z * (left[head] / tails[head]))


def _tails(ordered: Array) -> Array:
    """The sum of each number and all after it."""
    return jnp.cumsum(ordered[::-1])[::-1]


def _shuffled(key: Any, groups: int) -> Array:
    """A random order. Ties of 32 bits are too few to matter, so one sort will do."""
    return jnp.argsort(jax.random.bits(key, (groups,), jnp.uint32))


def _uniform(key: Any, scores: Array, t: int) -> Array:
    groups = scores.shape[0]
    return jnp.where(_shuffled(key, groups) < t, jnp.float32(groups / t), 0)


def _with_replacement(key: Any, z: Array, t: int) -> Array:
    draws = jax.random.choice(key, z.shape[0], (t,), p=z / z.sum())
    return jnp.zeros_like(z).at[draws].add(1) * (z.sum() / z / t)


def _bernoulli(key: Any, z: Array, t: int) -> Array:
    pi = inclusion(z, t)
    return jnp.where(jax.random.uniform(key, z.shape, z.dtype) < pi, 1 / pi, 0)


def _systematic(key: Any, z: Array, t: int) -> Array:
    pi = inclusion(z, t)
    to_order, to_start = jax.random.split(key)
    order = _shuffled(to_order, z.shape[0])
    shuffled = pi[order]
    # The running sum modulo 1, in units of 2^-32: a float32 sum of thousands would round what is
    # small, this one is exact. It wraps where it passes a point.
    step = jnp.where(shuffled < 1, shuffled * 2.0**32, 0).astype(jnp.uint32)
    after = jax.random.bits(to_start, (), jnp.uint32) + jnp.cumsum(step, dtype=jnp.uint32)
    taken = (after < step) | (shuffled == 1)
    # pi sums to t but for its own rounding: should one group be missing, it is the likeliest
    kept = jax.lax.top_k(jnp.where(taken, 2, shuffled), t)[1]
    return jnp.zeros_like(z).at[order[kept]].set(1 / shuffled[kept])


def _priority(key: Any, z: Array, t: int) -> Array:
    q = z / (1 - jax.random.uniform(key, z.shape, z.dtype))  # (0, 1]: nothing is divided by zero
    best, index = jax.lax.top_k(q, t + 1)
    return jnp.zeros_like(z).at[index[:t]].set(jnp.maximum(1, best[t] / z[index[:t]]))


def _top_k(key: Any, z: Array, t: int) -> Array:
    return jnp.zeros_like(z).at[jax.lax.top_k(z, t)[1]].set(1)


def _wta(key: Any, z: Array, t: int) -> Array:
    order = jnp.argsort(-z)
    ordered, count = z[order], jnp.arange(t, dtype=z.dtype)
    tails = _tails(ordered)[:t]
    left = t - count
    c = jnp.argmin(jnp.square(tails) / left)
    others = jnp.where(jnp.arange(z.shape[0]) < c, 0, ordered)
    draws = jax.random.choice(key, z.shape[0], (t,), p=others / others.sum())
    counts = jnp.zeros_like(z).at[draws].add((count < left[c]).astype(z.dtype))
    drawn = counts * (others.sum() / ordered / left[c])
    return jnp.zeros_like(z).at[order].set(jnp.where(others > 0, drawn, 1))


_BY_SCORE = {
    "with_replacement": _with_replacement,
    "bernoulli": _bernoulli,
    "systematic": _systematic,
    "priority": _priority,
    "top_k": _top_k,
    "wta": _wta,
}
