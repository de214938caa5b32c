"""What a product promises beside its value: dtypes, precision, and what it never reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from tests.helpers import FEW, MANY, SHARED, Case, Inputs, assert_close, kept, normal, products

# block-rows 0, 2, ..., 22 and block-columns 0 and 2 are empty
ISLANDS = {n: SHARED[f"islands, {n} tokens"] for n in (FEW, MANY)}
tokens = pytest.mark.parametrize("n", ISLANDS)


def poison(array, blocks):
    """NaN in the features of the even blocks."""
    even = np.repeat(np.arange(blocks) % 2 == 0, array.shape[-1] // blocks)
    return array.at[..., even].set(jnp.nan)


@tokens
@pytest.mark.parametrize("transpose", [False, True])
def test_unstored_features_are_never_read(n, transpose):
    """Not even times zero, and not where spare slots are sent."""
    inputs = ISLANDS[n].inputs(transpose=transpose)
    r, c = inputs.p.grid[::-1] if transpose else inputs.p.grid
    inputs = inputs._replace(x=poison(inputs.x, r), dy=poison(inputs.dy, c))
    for result in products(inputs, transpose=transpose, implementation="xla"):
        assert jnp.isfinite(result).all()


@pytest.mark.parametrize("implementation", ["xla", "dense", "reference"])
def test_spare_values_are_never_read(implementation):
    """By any operation, whatever they hold."""
    p, x, values, _ = ISLANDS[FEW].inputs()
    assert jnp.isnan(values[p.nnz :]).all()
    options = {"implementation": implementation}
    gate = jnp.where(jnp.arange(p.capacity) < p.nnz, 1.0, jnp.nan)
    y = bsjax.matmul(x, values, p, **options)
    assert jnp.isfinite(y).all()
    np.testing.assert_array_equal(bsjax.matmul(x, values, p, gate=gate, **options), y)
    assert jnp.isfinite(bsjax.glu(x, values, values, p, **options)).all()
    assert jnp.isfinite(bsjax.todense(values, p)).all()


BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


@pytest.mark.parametrize(
    ("implementation", "n", "x_dtype", "values_dtype"),
    [
        ("xla", FEW, BF16, F32),
        ("xla", MANY, BF16, F32),
        pytest.param("xla", MANY, F32, BF16, marks=pytest.mark.slow),
        ("dense", FEW, BF16, F32),
        ("dense", FEW, BF16, F16),
    ],
)
def test_every_result_has_its_own_dtype(implementation, n, x_dtype, values_dtype):
    """y and dx are rounded to x's dtype, dvalues to the values': a float32 one is not rounded."""
    p, x, values, dy = ISLANDS[n].inputs()
    inputs = Inputs(p, x.astype(x_dtype), values.astype(values_dtype), dy.astype(x_dtype))
    got = products(inputs, implementation=implementation)
    want = products(kept(inputs), implementation="reference")
    for g, w, dtype in zip(got, want, (x_dtype, x_dtype, values_dtype), strict=True):
        assert g.dtype == dtype
        assert_close(g, w, ISLANDS[n].terms)


def test_sddmm_has_the_common_dtype():
    p, x, _, dy = ISLANDS[FEW].inputs()
    low = x.astype(jnp.bfloat16)
    v, pull = jax.vjp(lambda x, y: bsjax.sddmm(x, y, p), low, dy)
    dx, dy_ = pull(v)
    assert (v.dtype, dx.dtype, dy_.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert_close(v, bsjax.sddmm(low.astype(jnp.float32), dy, p), FEW)


def test_glu_of_two_dtypes():
    p, x, values, _ = ISLANDS[FEW].inputs()
    y = bsjax.glu(x.astype(jnp.bfloat16), values.astype(jnp.bfloat16), values, p)
    assert y.dtype == jnp.bfloat16


def dots(jaxpr):
    """Every dot_general in a jaxpr and in what it calls."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.params
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from dots(inner)


PRECISIONS = {None: "HIGHEST", "highest": "HIGHEST", "default": "DEFAULT", "high": "HIGH"}


@pytest.mark.parametrize("wanted", PRECISIONS)
@pytest.mark.parametrize(
    ("implementation", "n"), [("xla", FEW), ("xla", MANY), ("dense", FEW), ("reference", FEW)]
)
def test_precision_reaches_every_product(implementation, n, wanted):
    """On a GPU anything less than "highest" is not float32; here it can only be read off."""
    p, x, values, dy = ISLANDS[n].inputs(BF16)

    def all_three(x, values):
        def f(x, values):
            return bsjax.matmul(x, values, p, precision=wanted, implementation=implementation)

        y, pull = jax.vjp(f, x, values)
        return y, pull(dy)

    found = list(dots(jax.make_jaxpr(all_three)(x, values).jaxpr))
    assert len(found) >= 3
    for params in found:
        assert params["precision"] == (jax.lax.Precision[PRECISIONS[wanted]],) * 2
        assert params["preferred_element_type"] == F32


@pytest.mark.parametrize("grid", [(0, 3), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("implementation", ["auto", "xla", "dense", "reference"])
def test_no_features(implementation, grid):
    """A layer of width zero is a layer: zeros of the right shape, forward and backward."""
    inputs = Case(mask=np.zeros(grid, bool)).inputs()
    y, dx, dvalues = products(inputs, implementation=implementation)
    assert (y.shape, dx.shape) == (inputs.dy.shape, inputs.x.shape)
    assert dvalues.shape == inputs.values.shape
    assert not any(np.any(result) for result in (y, dx, dvalues))


def test_leading_axes_with_an_epilogue():
    p, _, values, _ = ISLANDS[FEW].inputs()
    rng = np.random.default_rng(1)
    x, residual = normal(rng, (2, 3, p.shape[0])), normal(rng, (2, 3, p.shape[1]))
    bias = normal(rng, (p.shape[1],))
    y = bsjax.matmul(x, values, p, bias=bias, residual=residual, activation="relu")
    flat = bsjax.matmul(
        x.reshape(6, -1), values, p, bias=bias, residual=residual.reshape(6, -1), activation="relu"
    )
    assert_close(y.reshape(6, -1), flat, ISLANDS[FEW].terms)
    gated = bsjax.glu(x, values, values, p)
    assert gated.shape == residual.shape
    flat = bsjax.glu(x.reshape(6, -1), values, values, p)
    assert_close(gated.reshape(6, -1), flat, ISLANDS[FEW].terms)


def test_numpy_arguments_are_arrays():
    p, x, values, _ = ISLANDS[FEW].inputs()
    got = bsjax.matmul(np.asarray(x), np.asarray(values), p)
    np.testing.assert_array_equal(got, bsjax.matmul(x, values, p))
