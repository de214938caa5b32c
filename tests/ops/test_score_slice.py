"""Scores estimated from a slice: what is read, unbiased where it is zero, and the messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bsjax
from bsjax.ops._scores import Reader
from tests.helpers import assert_raises, normal

KEY = jax.random.key(0)
POLICIES = ["forward", "backward", "weight"]
N, K, M = 30, 24, 16


def inputs():
    """Tokens of which most features are zero, so that a slice of two often misses a feature."""
    rng = np.random.default_rng(0)
    x = jnp.where(np.arange(N)[:, None] % 12 == np.arange(K) % 12, normal(rng, (N, K)), 0.0)
    return x, normal(rng, (K, M)), normal(rng, (N, M))


@functools.partial(jax.jit, static_argnames=("policy", "score_slice", "sampler", "fraction"))
def run(x, w, dy, key, *, policy="forward", score_slice=None, sampler="priority", fraction=0.5):
    """y, dx and dw."""

    def f(x, w):
        options = {"policy": policy, "sampler": sampler, "score_slice": score_slice}
        return bsjax.sampled_matmul(x, w, key=key, fraction=fraction, **options)

    y, pull = jax.vjp(f, x, w)
    return y, *pull(dy)


@pytest.mark.parametrize(
    "policy", ["forward", *(pytest.param(a, marks=pytest.mark.slow) for a in POLICIES[1:])]
)
def test_unbiased_where_slices_are_zero(policy):
    """The squared error of the mean of many estimates is their variance over their number, by the
    spread that they have. More groups than are taken are not zero in a slice."""
    keys, args = 2000, inputs()
    each = jax.vmap(lambda key: run(*args, key, policy=policy, score_slice=2, fraction=0.125))
    drawn = [np.asarray(a, np.float64) for a in each(jax.random.split(KEY, keys))]
    sampled = {"forward": (0, 1, 2), "backward": (1, 2), "weight": (2,)}[policy]
    for i, exact in enumerate(run(*args, None)):
        off = np.square(drawn[i].mean(0) - np.asarray(exact)).sum()
        spread = drawn[i].var(0).sum() / keys
        if i in sampled:
            assert 0.5 * spread < off < 2 * spread
            assert spread * keys > 0.05 * np.square(exact).sum()
        else:
            assert off < 1e-8 * np.square(exact).sum()


def test_no_weight_is_large():
    """At most `groups / (0.1 t)`, also of a group whose slice is tiny; it scales rows of dw."""
    x, w, dy = jnp.full((N, K), 1e-3).at[:, 4:].set(1e3), jnp.ones((K, M)), jnp.ones((N, M))
    each = jax.vmap(lambda key: run(x, w, dy, key, score_slice=2, sampler="systematic")[2])
    weights = jax.jit(each)(jax.random.split(KEY, 200))[:, :, 0] / (N * x[:1])
    assert weights.max() <= 1.0001 * 10 / 0.5
    assert weights.max() > 0.9 * 10 / 0.5  # and it is 1e6, very rarely, where nothing is mixed in
    assert jnp.all(jnp.any(weights != 0, axis=0))


def test_as_long_as_the_axis_is_exact():
    def program(**options):
        return run.lower(*inputs(), KEY, **options).as_text()

    for policy, longest in zip(POLICIES, (max(N, M), max(N, K, M), K), strict=True):
        want = program(policy=policy)
        for length in (longest, longest + 5):
            assert program(policy=policy, score_slice=length) == want
        assert program(policy=policy, score_slice=longest - 1) != want


def test_only_the_slice_is_read():
    """By the compiler's count of a program that scores and samples 1/64 of the features."""
    n, k, m = 2048, 256, 1024

    def cost(**options):
        def f(x, w):
            return bsjax.sampled_matmul(x, w, key=KEY, fraction=1 / 64, **options)

        shapes = (
            jax.ShapeDtypeStruct((n, k), jnp.float32),
            jax.ShapeDtypeStruct((k, m), jnp.float32),
        )
        return jax.jit(f).lower(*shapes).compile().cost_analysis()

    exact, some, none = cost(), cost(score_slice=10), cost(sampler="uniform")
    entries = n * k + k * m
    assert exact["flops"] - none["flops"] > 2 * entries
    assert some["flops"] - none["flops"] < 0.1 * entries
    assert exact["bytes accessed"] - none["bytes accessed"] > 4 * entries
    assert some["bytes accessed"] - none["bytes accessed"] < 0.5 * entries


def test_starts_anywhere_and_the_same_key_reads_the_same():
    x = jnp.arange(20.0)[:, None] + jnp.zeros((1, 3))
    starts = set()
    for key in jax.random.split(KEY, 20):
        part = Reader(18, key).tokens(x, 0)
        np.testing.assert_array_equal(part, x[int(part[0, 0]) :][:18])
        np.testing.assert_array_equal(part, Reader(18, key).tokens(x.reshape(4, 5, 3), 0))
        columns = Reader(18, key).features(x.T, 0)
        np.testing.assert_array_equal(columns, part.T)
        starts.add(int(part[0, 0]))
    assert starts == {0, 1, 2}
    mixed = Reader(2, KEY).mixed(jnp.asarray([0.0, 0.0, 1e37, 1e37]))
    np.testing.assert_allclose(mixed, [0.025, 0.025, 0.475, 0.475], rtol=1e-6)
    np.testing.assert_allclose(Reader(2, KEY).mixed(jnp.zeros(4)), np.full(4, 0.025), rtol=1e-6)


@pytest.mark.slow
def test_over_explicit_axes():
    x, w, dy = (jnp.tile(a, (4, 1)) if a.shape[0] == N else a for a in inputs())
    want = run(x, w, dy, KEY, score_slice=10)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, dy = jax.device_put((x, dy), NamedSharding(mesh, P("data")))
        w, key = jax.device_put((w, KEY), NamedSharding(mesh, P()))
        got = run(x, w, dy, key, score_slice=10)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(abs(theirs).max()))


call = functools.partial(bsjax.sampled_matmul, *inputs()[:2], key=KEY, fraction=0.5)
WRONG = {
    "both": (
        lambda: call(score_slice=10, scores=jnp.ones(K)),
        ValueError,
        "sampled_matmul: `score_slice` estimates norms, and `scores` replace them, got both: leave "
        "one of them out.",
    ),
    "nothing": (
        lambda: call(score_slice=0),
        ValueError,
        "sampled_matmul: `score_slice` must be at least 1, got 0.",
    ),
    "a share": (
        lambda: call(score_slice=0.1),
        TypeError,
        "sampled_matmul: `score_slice` must be a whole number, got 0.1 of type float.",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_message(call, error, message):
    assert_raises(call, error, message)
