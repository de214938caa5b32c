"""`sampled_matmul`: what each policy samples, the same in every implementation, and how often."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax.ops._samplers import SAMPLERS, weigh
from tests.helpers import accumulator, assert_close, normal, slow

KEY = jax.random.key(3)
IMPLEMENTATIONS = ["auto", "xla", "dense", "reference"]
POLICIES = ["forward", "backward", "weight"]
K, M = 24, 16


def inputs(lead=(3, 7), dtype=jnp.float32, k=K, m=M):
    """x, w and a random cotangent; features and tokens are of unequal size."""
    rng = np.random.default_rng(0)
    uneven = jnp.asarray(rng.lognormal(size=k), jnp.float32)
    x = (normal(rng, (*lead, k)) * uneven.reshape((1,) * len(lead) + (k,))).astype(dtype)
    return x, normal(rng, (k, m), dtype), normal(rng, (*lead, m), dtype)


@functools.partial(jax.jit, static_argnames=("fraction", "sampler", "block", "policy", "name"))
def run(x, w, dy, key, *, scores=None, name="xla", fraction=0.5, **options):
    """y, dx and dw."""

    def f(x, w):
        given = {"key": key, "fraction": fraction, "scores": scores, **options}
        return bsjax.sampled_matmul(x, w, implementation=name, **given)

    y, pull = jax.vjp(f, x, w)
    return y, *pull(dy)


weights_of = jax.jit(weigh, static_argnums=(0, 3))


def weights(key, sampler, block, squares, fraction=0.5):
    """The weight of every item, drawn by the norms of groups, as NumPy computes them."""
    groups = -(-len(squares[0]) // block)
    pad = groups * block - len(squares[0])
    norms = [np.sqrt(np.pad(s, (0, pad)).reshape(groups, block).sum(1)) for s in squares]
    scores = jnp.asarray(np.prod(norms, axis=0), jnp.float32)
    drawn = weights_of(sampler, key, scores, max(1, round(fraction * groups)))
    return np.repeat(np.asarray(drawn, np.float64), block)[: len(squares[0])]


def expected(x, w, dy, policy, sampler, block):
    """y, dx and dw in float64, and the largest weight."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    tokens, cotangents = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])

    def squares(a, axis):
        return np.square(a).sum(axis)

    for_k, for_m, for_n = np.ones(K), np.ones(M), np.ones(len(tokens))
    if policy == "forward":
        for_k = weights(KEY, sampler, block, [squares(tokens, 0), squares(w, 1)])
    elif policy == "weight":
        for_n = weights(KEY, sampler, block, [squares(tokens, 1)])
    else:
        for_x, for_w = jax.random.split(KEY)
        for_m = weights(for_x, sampler, block, [squares(cotangents, 0), squares(w, 0)])
        for_n = weights(for_w, sampler, block, [squares(tokens, 1), squares(cotangents, 1)])
    y = tokens * for_k @ w
    dx = cotangents * for_m @ w.T * for_k
    dw = (tokens * for_k).T @ (cotangents * for_n[:, None])
    largest = max(for_k.max(), for_m.max(), for_n.max())
    return (y.reshape(dy.shape), dx.reshape(x.shape), dw), largest * abs(x).max()


CASES = [  # every sampler, and each policy in each implementation
    ("forward", "with_replacement", 1, ["auto"]),
    ("forward", "bernoulli", 1, ["auto"]),
    ("forward", "priority", 2, ["dense"]),
    ("forward", "systematic", 8, ["xla", "reference"]),
    ("backward", "uniform", 2, ["dense"]),
    ("backward", "systematic", 8, ["xla"]),
    ("weight", "wta", 1, ["dense"]),
    ("weight", "top_k", 2, ["auto"]),
    ("weight", "priority", 4, ["xla", "reference"]),  # of 21 tokens: a last group of one
    *(  # samplers are the same for every policy
        slow(policy, sampler, 1, ["auto"])
        for policy in POLICIES
        for sampler in SAMPLERS
        if (policy, sampler) not in [("forward", "with_replacement"), ("forward", "bernoulli")]
    ),
    *(slow(policy, "priority", 2, ["xla", "dense"]) for policy in POLICIES),
]


@pytest.mark.parametrize(("policy", "sampler", "block", "names"), CASES)
def test_is_the_masked_product(policy, sampler, block, names):
    """y and both gradients against products in float64 that are masked and scaled by hand."""
    x, w, dy = inputs()
    want, size = expected(x, w, dy, policy, sampler, block)
    for name in names:
        got = run(x, w, dy, KEY, policy=policy, sampler=sampler, block=block, name=name)
        for ours, theirs in zip(got, want, strict=True):
            assert_close(ours, theirs, K * size)


ROUNDED = [
    ("forward", jnp.bfloat16, ["dense"]),
    ("forward", jnp.float16, ["xla"]),
    ("backward", jnp.bfloat16, ["xla"]),
    ("weight", jnp.float16, ["xla"]),
    *(
        slow(policy, dtype, ["xla", "dense"])
        for policy in POLICIES
        for dtype in (jnp.bfloat16, jnp.float16)
    ),
]


@pytest.mark.parametrize(("policy", "dtype", "names"), ROUNDED)
def test_is_rounded_once(policy, dtype, names):
    args = inputs((40,), dtype)
    wide = [a.astype(accumulator(dtype)) for a in args]
    options = {"policy": policy, "sampler": "priority", "block": 2}
    want = run(*wide, KEY, name="dense", **options)
    for name in names:
        got = run(*args, KEY, name=name, **options)
        for ours, theirs in zip(got, want, strict=True):
            assert ours.dtype == dtype
            assert_close(ours, theirs, 40 * 16)


def test_gradients_have_the_dtypes_of_what_they_belong_to():
    x, w, dy = inputs()
    half = x.astype(jnp.bfloat16), w, dy.astype(jnp.bfloat16)
    for policy in POLICIES:
        y, dx, dw = jax.eval_shape(functools.partial(run, policy=policy), *half, KEY)
        assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("policy", ["forward", slow("backward"), "weight"])
def test_float64(policy):
    with jax.enable_x64(True):
        x, w, dy = inputs(dtype=jnp.float64)
        options = {"policy": policy, "sampler": "priority"}
        # scales have the precision of float32, the same for both
        pair = run(x, w, dy, KEY, **options), run(x, w, dy, KEY, name="reference", **options)
        for ours, theirs in zip(*pair, strict=True):
            assert ours.dtype == jnp.float64
            assert_close(ours, theirs, 64)  # a relative 1e-7 would let float32 pass


def test_float64_of_backward():
    """Scales of "top_k" are 1, so that NumPy's products will do, which nothing compiles."""
    with jax.enable_x64(True):
        x, w, dy = inputs(dtype=jnp.float64)
        got = run(x, w, dy, KEY, policy="backward", sampler="top_k")
        for ours, theirs in zip(got, expected(x, w, dy, "backward", "top_k", 1)[0], strict=True):
            assert ours.dtype == jnp.float64
            assert_close(ours, theirs, 64)


LEADING = [
    *((lead, policy) for lead in [(), (0,)] for policy in POLICIES),
    ((1,), "forward"),
    ((2, 0), "weight"),
    ((2, 3, 5), "backward"),
]
MORE = [(lead, policy) for lead in [(1,), (2, 0), (2, 3, 5)] for policy in POLICIES]


@pytest.mark.parametrize(
    ("lead", "policy"), [*LEADING, *(slow(*case) for case in MORE if case not in LEADING)], ids=str
)
def test_leading_axes(lead, policy):
    x, w, dy = inputs(lead)
    got = run(x, w, dy, KEY, policy=policy, sampler="top_k")
    assert [a.shape for a in got] == [dy.shape, x.shape, w.shape]
    want = expected(x, w, dy, policy, "top_k", 1) if x.size else ([dy, x, 0 * w], 1)
    for ours, theirs in zip(got, want[0], strict=True):
        assert_close(ours, np.asarray(theirs), K * want[1])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("exactly", [{"key": None}, {"fraction": 1}, {"fraction": 0.99}], ids=str)
def test_exact(exactly, policy):
    """Without a key, at fraction 1, and where all groups are taken."""
    x, w, dy = inputs()
    tokens = x.reshape(-1, K)
    want = x @ w, dy @ w.T, tokens.T @ dy.reshape(-1, M)
    for sampler in SAMPLERS:
        options = {"key": KEY, "block": 8, "sampler": sampler, "name": "auto"} | exactly
        for ours, theirs in zip(run(x, w, dy, policy=policy, **options), want, strict=True):
            assert_close(ours, theirs, K * 16)


def test_what_is_exact_beside_samples():
    """ "weight" computes y and dx as if nothing were sampled, bit by bit; "backward" y."""
    x, w, dy = inputs()
    exact = run(x, w, dy, None)
    y, dx, _ = run(x, w, dy, KEY, policy="weight")
    np.testing.assert_array_equal(y, exact[0])
    np.testing.assert_array_equal(dx, exact[1])
    np.testing.assert_array_equal(run(x, w, dy, KEY, policy="backward")[0], exact[0])


def test_what_is_not_sampled_is_not_read():
    """By scores of the caller, who knows what is NaN; gradients off the sample are zeros."""
    x, w, dy = inputs()
    bad = np.arange(K) % 3 == 1
    args = jnp.where(bad, jnp.nan, x.reshape(21, K)), w, dy.reshape(21, M)
    y, dx, dw = run(*args, KEY, scores=jnp.asarray(~bad, jnp.float32))
    assert jnp.isfinite(y).all()
    assert jnp.isfinite(dw).all()
    taken = np.any(dw != 0, axis=1)
    assert taken.sum() == K // 2
    assert not np.any(taken & bad)
    np.testing.assert_array_equal(np.any(dx != 0, axis=0), taken)
    tokens = np.arange(21) % 3 == 1
    args = jnp.where(tokens[:, None], jnp.nan, x.reshape(21, K)), w, dy.reshape(21, M)
    scores = jnp.asarray(~tokens, jnp.float32)
    assert jnp.isfinite(run(*args, KEY, policy="weight", scores=scores)[2]).all()


def test_scores_of_weights_alone():
    """They give every device the same sample, whatever its tokens."""
    x, w, dy = inputs((21,))
    scores = jnp.linalg.norm(w, axis=1)
    rows = [
        np.any(run(tokens, w, dy, KEY, scores=scores)[2] != 0, axis=1) for tokens in (x, 1 - 3 * x)
    ]
    np.testing.assert_array_equal(*rows)


def squared(a):
    return float(np.square(np.asarray(a, np.float64)).sum())


def variance(terms, scores, t):
    """`E ||estimate - sum||_F^2` of t draws with replacement of `terms[g]`."""
    p = scores / scores.sum()
    return (
        sum(squared(one) / q for one, q in zip(terms, p, strict=True)) - squared(terms.sum(0))
    ) / t


@pytest.mark.parametrize("policy", POLICIES)
def test_unbiased(policy):
    """The squared error of the mean of many estimates is their variance over their number."""
    keys, draws = 1000, functools.partial(run, policy=policy, sampler="with_replacement")
    x, w, dy = inputs((40,))
    means = [
        a.mean(0) for a in jax.vmap(lambda key: draws(x, w, dy, key))(jax.random.split(KEY, keys))
    ]
    exact = run(x, w, dy, None)
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    rows, columns = np.linalg.norm(x, axis=1), np.linalg.norm(x, axis=0)
    dy_rows, dy_columns = np.linalg.norm(dy, axis=1), np.linalg.norm(dy, axis=0)
    outer = {
        "y": np.einsum("nk,km->knm", x, w),
        "dx": np.einsum("nm,km->mnk", dy, w),
        "dw": np.einsum("nk,nm->nkm", x, dy),
    }
    if policy == "forward":
        scores = columns * np.linalg.norm(w, axis=1)
        # each gradient is a sum of the groups' own slices, of which one is not zero
        slices = (np.eye(K)[:, :, None] * (x.T @ dy)), np.eye(K)[:, None] * (dy @ w.T)[None]
        want = [variance(a, scores, K // 2) for a in (outer["y"], slices[1], slices[0])]
    elif policy == "backward":
        scores = dy_columns * np.linalg.norm(w, axis=0)
        want = [0, variance(outer["dx"], scores, M // 2), variance(outer["dw"], rows * dy_rows, 20)]
    else:
        want = [0, 0, variance(outer["dw"], rows, 20)]
    for mean, truth, one in zip(means, exact, want, strict=True):
        # a sum over many entries: within a factor of two; or exact, but for the mean's rounding
        assert 0.4 * one / keys <= squared(mean - truth) <= 2 * one / keys + 1e-8 * squared(truth)
    biased = run(x, w, dy, KEY, policy=policy, sampler="top_k")
    assert squared(biased[2] - exact[2]) > 3 * want[2] / keys  # and a bias would be seen


@pytest.mark.parametrize("policy", POLICIES[::2])
def test_second_order(policy):
    """The derivative of both gradients, with the sample held constant, as written by hand."""
    x, w, dy = inputs((9,))
    squares = [np.square(x).sum(1)]
    if policy == "forward":
        squares = [np.square(x).sum(0), np.square(w).sum(1)]
    drawn = jnp.asarray(weights(KEY, "priority", 1, squares), jnp.float32)
    for_k = drawn[None] if policy == "forward" else 1
    for_n = drawn[:, None] if policy == "weight" else 1

    def gradients(x, w, dy):
        options = {"fraction": 0.5, "policy": policy, "sampler": "priority"}
        y, pull = jax.vjp(lambda x, w: bsjax.sampled_matmul(x, w, key=KEY, **options), x, w)
        return pull(jnp.cos(y) * dy)

    def by_hand(x, w, dy):
        c = jnp.cos((x * for_k) @ w) * dy
        return c @ w.T * for_k, (x * for_k).T @ (c * for_n)

    @functools.partial(jax.jit, static_argnums=0)
    def twice(f, x, w, dy):
        first, pull = jax.vjp(f, x, w, dy)
        return pull(jax.tree.map(jnp.cos, first))

    for ours, theirs in zip(twice(gradients, x, w, dy), twice(by_hand, x, w, dy), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(abs(theirs).max()))
