"""`matmul` with a key: the gradient of the values from a sample of the tokens, all else exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from tests.helpers import Case, assert_close, assert_raises, normal, random_mask, slow
from tests.ops.test_sampled import weights_of

KEY = jax.random.key(3)
CASE = Case(mask=random_mask(5, 4, 0.6), n=45, capacity=14)  # in groups of four, the last has one
STATIC = ("transpose", "activation", "implementation", "fraction", "sampler", "sample_block")


@functools.partial(jax.jit, static_argnames=STATIC)
def run(x, values, p, dy, others, key, fraction=0.5, **options):
    """y, dx, dvalues and the gradients of `others`: gate, bias, residual."""

    def f(x, values, others):
        return bsjax.matmul(x, values, p, key=key, fraction=fraction, **others, **options)

    y, pull = jax.vjp(f, x, values, others)
    return y, *pull(dy)


def inputs(dtype=jnp.float32, *, transpose=False, lead=(45,)):
    """Tokens of very different norms, values without NaN."""
    p, x, values, dy = CASE.inputs(dtype, transpose=transpose)
    sizes = np.random.default_rng(5).lognormal(size=(CASE.n, 1))
    x = (x * jnp.asarray(sizes, dtype)).reshape(*lead, x.shape[1])
    return x, jnp.nan_to_num(values), p, dy.reshape(*lead, dy.shape[1])


def drawn(x, sampler="systematic", block=1, scores=None):
    """The weight of every token, by norms that NumPy computes."""
    squares = np.square(np.asarray(x, np.float64)).sum(-1) if scores is None else np.square(scores)
    groups = -(-squares.size // block)
    padded = np.pad(squares.reshape(-1), (0, groups * block - squares.size))
    norms = jnp.asarray(np.sqrt(padded.reshape(groups, block).sum(1)), jnp.float32)
    weights = np.asarray(weights_of(sampler, KEY, norms, round(groups / 2)), np.float64)
    return np.repeat(weights, block)[: squares.size]


def by_hand(x, p, dsums, weights, *, transpose=False):
    """The gradient of the stored blocks, in float64 but for scaled tokens in the dtype of x, and
    the largest of these."""
    flat = np.asarray(x, np.float32).reshape(-1, x.shape[-1])
    # as in the library scales are of float32
    tokens = jnp.asarray(flat * np.float32(weights)[:, None]).astype(x.dtype)
    tokens, dsums = np.asarray(tokens, np.float64), np.asarray(dsums, np.float64)
    dsums = dsums.reshape(-1, dsums.shape[-1])
    left, right = (dsums, tokens) if transpose else (tokens, dsums)
    (r, c), (br, bc) = p.grid, p.block
    dense = (left.T @ right).reshape(r, br, c, bc)
    blocks = np.zeros((p.capacity, br, bc))
    for i, (row, col) in enumerate(zip(np.asarray(p.row), np.asarray(p.col), strict=True)):
        if row < r:
            blocks[i] = dense[row, :, col]
    return blocks, abs(tokens).max()


@pytest.mark.parametrize(
    ("sampler", "block", "name"),
    [
        slow("systematic", 1, "auto"),
        ("priority", 4, "xla"),
        ("bernoulli", 4, "dense"),
        slow("wta", 1, "reference"),
    ],
)
def test_is_a_sum_over_the_sampled_tokens(sampler, block, name):
    """And y and dx are what they are without, bit by bit."""
    x, values, p, dy = inputs()
    sampled = {"sampler": sampler, "sample_block": block}
    y, dx, exact, _ = run(x, values, p, dy, {}, None, implementation=name)
    got = run(x, values, p, dy, {}, KEY, implementation=name, **sampled)
    np.testing.assert_array_equal(got[0], y)
    np.testing.assert_array_equal(got[1], dx)
    want, size = by_hand(x, p, dy, drawn(x, sampler, block))
    assert_close(got[2], want, CASE.n * size)
    assert np.any(abs(got[2] - exact) > 0.1 * size)


@pytest.mark.parametrize("transpose", [slow(False), True])
def test_beside_everything_else(transpose):
    """Gate, bias, activation, residual and leading axes; scores of the caller."""
    x, values, p, dy = inputs(transpose=transpose, lead=(3, 5, 3))
    rng = np.random.default_rng(2)
    gate = normal(rng, (p.capacity,)).at[::3].set(0.0)
    others = {"gate": gate, "bias": normal(rng, dy.shape[-1:]), "residual": normal(rng, dy.shape)}
    scores = jnp.abs(normal(rng, (3, 5, 3)))
    options = {"transpose": transpose, "activation": "tanh", "implementation": "dense"}
    exact = run(x, values, p, dy, others, None, **options)
    sampled = {"scores": scores, "sample_block": 4, "sampler": "priority"}
    got = run(x, values, p, dy, others, KEY, **options, **sampled)
    rest = exact[:2], {name: exact[3][name] for name in ("bias", "residual")}
    got_rest = got[:2], {name: got[3][name] for name in ("bias", "residual")}
    jax.tree.map(np.testing.assert_array_equal, got_rest, rest)
    slope = 1 - np.square(np.asarray(exact[0], np.float64) - np.asarray(others["residual"]))
    weights = drawn(x, "priority", 4, scores)
    want, size = by_hand(x, p, dy * slope, weights, transpose=transpose)
    gates = np.asarray(gate, np.float64)
    # the slope errs as y does, which for tanh is a few roundings
    assert_close(got[2], want * gates[:, None, None], 4 * CASE.n * size)
    dgate = (want * np.asarray(values)).sum((1, 2))
    assert_close(got[3]["gate"], dgate, 4 * CASE.n * size * 64)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        slow(jnp.bfloat16, "xla"),
        slow(jnp.bfloat16, "dense"),
        slow(jnp.float16, "xla"),
        (jnp.float16, "dense"),
    ],
)
def test_of_scaled_tokens_in_the_dtype_of_x(dtype, name):
    """That is one rounding more, of the tokens; the sum is rounded once."""
    x, values, p, dy = inputs(dtype)
    got = run(x, values, p, dy, {}, KEY, sampler="priority", implementation=name)[2]
    weights = drawn(x, "priority")
    want, size = by_hand(x, p, dy, weights)
    assert got.dtype == dtype
    # where a scale of the library differs in its last bit, a token may round the other way
    near = jnp.finfo(dtype).eps * size * 4
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=float(jnp.finfo(dtype).eps) / 2, atol=float(near)
    )


def test_nothing_sampled_is_todays_program():
    x, values, p, dy = inputs()

    def program(**options):
        def f(x, values):
            return jax.vjp(lambda *a: bsjax.matmul(*a, p, **options), x, values)[1](dy)

        return jax.jit(f).lower(x, values).as_text()

    want = program()
    assert want == program(key=None, fraction=0.5)
    assert want == program(key=KEY, fraction=1)
    assert want == program(key=KEY, fraction=0.99)  # of 45 tokens
    assert want != program(key=KEY, fraction=0.5)


def test_tokens_that_are_not_sampled_are_not_read_for_it():
    x, values, p, dy = inputs()
    bad = np.arange(CASE.n) % 3 == 1
    scores = jnp.asarray(~bad, jnp.float32)
    poisoned = jnp.where(bad[:, None], jnp.nan, x)
    got = run(poisoned, values, p, dy, {}, KEY, scores=scores, implementation="dense")
    assert jnp.isfinite(got[2]).all()
    assert jnp.isnan(got[0][bad]).all()


@pytest.mark.slow
def test_second_order():
    """The derivative of both gradients with the sample held constant, as written by hand."""
    x, values, p, dy = inputs()
    weights = jnp.asarray(drawn(x, "priority"), jnp.float32)[:, None]

    def gradients(x, values, dy):
        options = {"key": KEY, "fraction": 0.5, "sampler": "priority", "implementation": "xla"}
        y, pull = jax.vjp(lambda *a: bsjax.matmul(*a, p, **options), x, values)
        return pull(jnp.cos(y) * dy)

    def hand(x, values, dy):
        dense = bsjax.todense(values, p)
        c = jnp.cos(x @ dense) * dy
        return c @ dense.T, bsjax.fromdense((x * weights).T @ c, p)

    @functools.partial(jax.jit, static_argnums=0)
    def twice(f, *args):
        first, pull = jax.vjp(f, *args)
        return pull(jax.tree.map(jnp.cos, first))

    args = x, values, dy
    for ours, theirs in zip(twice(gradients, *args), twice(hand, *args), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(abs(theirs).max()))


X, VALUES, PATTERN, _ = inputs()
call = functools.partial(bsjax.matmul, X, VALUES, PATTERN, key=KEY, fraction=0.5)
WRONG = {
    "seed": (
        lambda: call(key=0),
        TypeError,
        "matmul: `key` must be one PRNG key, got 0: make one with jax.random.key(seed) and split "
        "it for every call.",
    ),
    "percent": (
        lambda: call(fraction=50, key=None),
        ValueError,
        "matmul: `fraction` must be over 0 and at most 1, got 50.",
    ),
    "sampler": (
        lambda: call(sampler="all"),
        ValueError,
        'matmul: `sampler` must be one of "uniform", "with_replacement", "bernoulli", '
        '"systematic", "priority", "top_k", "wta", got \'all\'.',
    ),
    "block": (
        lambda: call(sample_block=0),
        ValueError,
        "matmul: `sample_block` must be at least 1, got 0.",
    ),
    "scores": (
        lambda: call(scores=jnp.ones(40)),
        ValueError,
        "matmul: `scores` of shape (40,) must have shape (45,), one number for each token of `x`.",
    ),
    "NaN": (
        lambda: bsjax.matmul(X.at[0, 0].set(jnp.nan), *call.args[1:], **call.keywords),
        ValueError,
        "matmul: 1 of 45 scores are NaN or infinite, expected finite norms: look for NaN, or "
        "numbers over 1e19, in `x` and `scores`.",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_message(call, error, message):
    assert_raises(call, error, message)
