"""`sample` is what `sampled_matmul` draws, at the edges of scores too; and its messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax.ops._samplers import SAMPLERS
from tests.helpers import assert_close, assert_raises, normal, slow

KEY = jax.random.key(3)
K, M = 24, 16
FIXED = [name for name in SAMPLERS if name != "bernoulli"]
EDGES = {
    "heavy-tailed": np.random.default_rng(1).lognormal(sigma=2, size=K),
    "equal": np.full(K, 3e-3),
    "zero": np.zeros(K),
    "one dominant": np.r_[np.ones(10), 1e9, np.ones(13)],
    "few not zero": np.r_[np.zeros(10), 1.0, 2.0, np.zeros(12)],
}


@functools.partial(jax.jit, static_argnames=("sampler", "fraction", "block"))
def both(x, w, scores, **options):
    """The estimate, and what it is a sum of."""
    y = bsjax.sampled_matmul(x, w, key=KEY, scores=scores, implementation="xla", **options)
    return y, bsjax.sample(scores, key=KEY, **options)


@pytest.mark.parametrize(("fraction", "block"), [(0.5, 2), slow(0.01, 8)])  # less than a block
@pytest.mark.parametrize("sampler", FIXED)
def test_is_what_sampled_matmul_draws(sampler, fraction, block):
    rng = np.random.default_rng(0)
    x, w = normal(rng, (5, K)), normal(rng, (K, M))
    for scores in EDGES.values():
        scores = jnp.asarray(scores, jnp.float32)
        y, (index, scale) = both(x, w, scores, sampler=sampler, fraction=fraction, block=block)
        t = max(1, round(fraction * K / block))
        assert index.dtype == jnp.int32
        assert scale.dtype == jnp.float32
        assert index.shape == scale.shape == (t,)
        assert len(set(np.asarray(index))) == t
        parts = np.einsum(
            "ngb,gbm->gnm",
            *(
                np.asarray(a, np.float64).reshape(s)
                for a, s in ((x, (5, -1, block)), (w, (-1, block, M)))
            ),
        )
        want = np.einsum("g,gnm->nm", np.asarray(scale, np.float64), parts[np.asarray(index)])
        assert_close(y, want, K * max(1, float(scale.max())) * 4)


def test_a_last_group_that_is_smaller():
    """As of tokens: 21 in groups of four."""
    scores = jnp.arange(1.0, 22.0)
    index, scale = bsjax.sample(scores, key=KEY, fraction=0.5, block=4, sampler="priority")
    x, dy = jnp.eye(21), jnp.eye(21)

    def f(w):
        options = {"key": KEY, "fraction": 0.5, "block": 4, "sampler": "priority"}
        return bsjax.sampled_matmul(x, w, policy="weight", scores=scores, **options)

    dw = np.asarray(jax.vjp(f, dy)[1](dy)[0])  # the weight of every token
    want = np.zeros(24)
    for group, one in zip(np.asarray(index), np.asarray(scale), strict=True):
        want[4 * group : 4 * group + 4] = one
    np.testing.assert_allclose(np.diag(dw), want[:21], rtol=1e-6)


@pytest.mark.parametrize("exactly", [{"key": None}, {"fraction": 1}, {"fraction": 0.99}], ids=str)
def test_exact(exactly):
    index, scale = bsjax.sample(
        jnp.zeros(12), **{"key": KEY, "fraction": 0.5, "block": 4} | exactly
    )
    np.testing.assert_array_equal(index, [0, 1, 2])
    np.testing.assert_array_equal(scale, [1, 1, 1])


call = functools.partial(bsjax.sample, key=KEY, fraction=0.5)
WRONG = {
    "axes": (
        lambda: call(jnp.ones((2, 3))),
        ValueError,
        "sample: `scores` must have 1 axes, got shape (2, 3).",
    ),
    "random size": (
        lambda: call(jnp.ones(3), sampler="bernoulli"),
        ValueError,
        'sample: the size of a sample of "bernoulli" is random, and shapes are not: take '
        'sampler="systematic", which has the same probabilities.',
    ),
    "NaN": (
        lambda: call(jnp.ones(4).at[1].set(jnp.nan)),
        ValueError,
        "sample: 1 of 4 scores are NaN or infinite, expected finite norms: look for NaN, or "
        "numbers over 1e19, in `scores`.",
    ),
    "seed": (
        lambda: call(jnp.ones(4), key=1),
        TypeError,
        "sample: `key` must be one PRNG key, got 1: make one with jax.random.key(seed) and split "
        "it for every call.",
    ),
    "fraction": (
        lambda: call(jnp.ones(4), fraction=2),
        ValueError,
        "sample: `fraction` must be over 0 and at most 1, got 2.",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_message(call, error, message):
    assert_raises(call, error, message)
