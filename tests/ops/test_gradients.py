"""Derivatives beyond the bare products: second order, gates, epilogues, gated linear units."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import bsjax
from tests.helpers import FEW, MANY, SHARED, Case, assert_close, normal, random_mask

TINY = {n: Case(mask=random_mask(3, 2, 0.5), block=(2, 4), n=n, capacity=4) for n in (FEW, MANY)}
FORMS = [SHARED["random, 7 tokens"], SHARED["hub, 137 tokens"]]
mixed_forms = pytest.mark.parametrize(
    ("case", "dtype"),
    [(FORMS[0], jnp.float32), (FORMS[1], jnp.bfloat16)],
    ids=["few tokens, float32", "many tokens, bfloat16"],
)
forms = pytest.mark.parametrize("case", FORMS, ids=["few tokens", "many tokens"])


@functools.partial(jax.jit, static_argnames=("f", "options"))
def pulled(f, arguments, p, dy, options=()):
    """`f(*arguments, p)` and the gradient of every argument, `options` given by keyword."""
    y, pull = jax.vjp(lambda *a: f(*a, p, **dict(options)), *arguments)
    return y, *pull(dy)


def compare(f, meaning, arguments, p, dy, terms):
    """`f` by the XLA implementation against what it means, in float32."""
    got = pulled(f, arguments, p, dy, (("implementation", "xla"),))
    *wide, wide_dy = (a.astype(jnp.float32) for a in (*arguments, dy))
    for g, w, like in zip(got, pulled(meaning, wide, p, wide_dy), (dy, *arguments), strict=True):
        assert g.dtype == like.dtype
        assert_close(g, w, terms)


def second_order(f, *arguments):
    """By finite differences of the gradient, in float64."""
    check_grads(jax.jit(f), arguments, order=2, modes=["rev"], atol=1e-6, rtol=1e-6)


def double(n):
    """Tiny inputs; the spare values too are moved by finite differences, so no NaN."""
    p, x, values, dy = TINY[n].inputs(jnp.float64)
    return p, x, jnp.nan_to_num(values), dy


@pytest.mark.slow
@pytest.mark.parametrize("n", [FEW, MANY])
def test_second_order_of_sddmm(n):
    with jax.enable_x64(True):
        p, x, _, dy = double(n)
        second_order(lambda x, y: bsjax.sddmm(x, y, p, implementation="xla"), x, dy)


@pytest.mark.slow
@pytest.mark.parametrize("n", [FEW, MANY])
def test_second_order_of_the_transposed(n):
    with jax.enable_x64(True):
        p, _, values, dy = double(n)
        second_order(
            lambda y, v: bsjax.matmul(y, v, p, transpose=True, implementation="xla"), dy, values
        )


def test_second_order_of_sddmm_is_the_references():
    """Quicker than finite differences: a gradient of a gradient, by both implementations."""
    p, x, _, y = TINY[MANY].inputs()
    x, y = x * MANY**-0.25, y * MANY**-0.25  # results of unit size

    @functools.partial(jax.jit, static_argnums=2)
    def twice(x, y, implementation):
        def loss(x, y):
            return jnp.sin(bsjax.sddmm(x, y, p, implementation=implementation)).sum()

        once = jax.grad(loss, argnums=(0, 1))
        return jax.vjp(once, x, y)[1]((x[::-1], y[::-1]))

    for g, w in zip(twice(x, y, "xla"), twice(x, y, "reference"), strict=True):
        assert_close(g, w, MANY)


@pytest.mark.parametrize("n", [pytest.param(FEW, marks=pytest.mark.slow), MANY])
def test_second_order_of_matmul_and_its_epilogue(n):
    with jax.enable_x64(True):
        p, x, values, residual = double(n)
        rng = np.random.default_rng(1)
        gate, bias = (normal(rng, (size,), jnp.float64) for size in (p.capacity, p.shape[1]))

        def f(x, values, gate, bias, residual):
            options = {"activation": "tanh", "residual": residual, "implementation": "xla"}
            return bsjax.matmul(x, values, p, gate=gate, bias=bias, **options)

        second_order(f, x, values, gate, bias, residual)


@forms
def test_gate(case):
    """The gradient of a gate is `<dS, values>`, also where the gate is zero."""
    p, x, values, dy = case.inputs()
    gate = normal(np.random.default_rng(1), (p.capacity,)).at[:2].set(0.0)

    def f(x, values, gate, p, **options):
        return bsjax.matmul(x, values, p, gate=gate, **options)

    y, dx, dvalues, dgate = pulled(f, (x, values, gate), p, dy, (("implementation", "xla"),))
    stored = jnp.arange(p.capacity) < p.nnz
    scaled = jnp.where(stored[:, None, None], gate[:, None, None] * values, 0)
    bare = functools.partial(bsjax.matmul, implementation="reference")
    want_y, want_dx, ds = pulled(bare, (x, scaled), p, dy)
    assert_close(y, want_y, case.terms)
    assert_close(dx, want_dx, case.terms)
    assert_close(dvalues, gate[:, None, None] * ds, case.terms)
    want = np.where(stored, np.einsum("eij,eij->e", ds, jnp.nan_to_num(values)), 0)
    assert_close(dgate, want, case.n * values[0].size)
    assert np.all(np.asarray(dgate)[:2] != 0)
    assert not np.any(dgate[p.nnz :])


def epilogue(x, values, bias, residual, p, **options):
    options |= {"bias": bias, "activation": "silu", "residual": residual}
    return bsjax.matmul(x, values, p, **options)


def epilogue_means(x, values, bias, residual, p):
    y = bsjax.matmul(x, values, p, implementation="reference") + bias[None]
    return y / (1 + jnp.exp(-y)) + residual


@mixed_forms
def test_epilogue_is_rounded_once(case, dtype):
    """`activation(x @ S + bias) + residual` on unrounded sums, with all five gradients."""
    p, x, values, dy = case.inputs(dtype)
    rng = np.random.default_rng(1)
    bias, residual = normal(rng, (p.shape[1],), dtype), normal(rng, dy.shape, dtype)
    compare(epilogue, epilogue_means, (x, values, bias, residual), p, dy, case.terms)


@pytest.mark.parametrize("option", ["bias", "residual", "activation"])
def test_each_part_of_the_epilogue_alone(option):
    case = TINY[FEW]
    p, x, values, dy = case.inputs()
    part = {
        "bias": normal(np.random.default_rng(1), (p.shape[1],)),
        "residual": dy,
        "activation": jnp.sin,
    }
    bare = bsjax.matmul(x, values, p)
    want = {"bias": bare + part["bias"][None], "residual": bare + dy, "activation": jnp.sin(bare)}
    got = bsjax.matmul(x, values, p, **{option: part[option]})
    assert_close(got, want[option], case.terms)


SHAPES = {
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: 0.5 * z * (1 + np.tanh((2 / np.pi) ** 0.5 * (z + 0.044715 * z**3))),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "tanh": np.tanh,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_named_activations(name):
    case = TINY[FEW]
    p, x, values, _ = case.inputs()
    z = np.asarray(bsjax.matmul(x, values, p), np.float64)
    assert_close(bsjax.matmul(x, values, p, activation=name), SHAPES[name](z), case.terms)
    want = SHAPES[name](z) * z
    assert_close(bsjax.glu(x, values, values, p, activation=name), want, 4 * case.terms)


def glu_means(x, gate_values, up_values, p):
    gate, up = (bsjax.matmul(x, v, p, implementation="reference") for v in (gate_values, up_values))
    return gate / (1 + jnp.exp(-gate)) * up


@mixed_forms
def test_glu(case, dtype):
    """`silu(x @ G) * (x @ U)`: sums of unit size, since they are multiplied with each other."""
    p, x, values, dy = case.inputs(dtype)
    up = normal(np.random.default_rng(1), values.shape, dtype)
    scale = jnp.asarray((p.block[0] * p.nnz / p.grid[1]) ** -0.5, dtype)
    compare(bsjax.glu, glu_means, (x, values * scale, up * scale), p, dy, case.terms)


def test_all_ones_cotangent_is_blind():
    """Why no test here uses one: it cannot see a permuted gradient."""
    case = SHARED["random, 7 tokens"]
    p, x, _, dy = case.inputs()
    ones = bsjax.sddmm(x, jnp.ones_like(dy), p, implementation="reference")
    np.testing.assert_array_equal(ones, ones[:, :, ::-1])  # columns reversed, nothing noticed
    drawn = bsjax.sddmm(x, dy, p, implementation="reference")
    with pytest.raises(AssertionError):
        assert_close(drawn, drawn[:, :, ::-1], case.terms)


def test_forward_mode_is_the_references():
    """What the docstring says: no forward mode for a custom_vjp, but the reference has one."""
    p, x, values, _ = TINY[FEW].inputs()
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: bsjax.matmul(x, values, p, implementation="xla"), (x,), (x,))
    y, dy = jax.jvp(lambda x: bsjax.matmul(x, values, p, implementation="reference"), (x,), (x,))
    assert_close(dy, y, TINY[FEW].terms)
