"""Every implementation means what the reference means: one body, a list of implementations.

Gradients are compared under random cotangents with the reference's own autodiff. What is compared
with is computed in float32 (float64 for float64) from the same rounded inputs, so that a result may
differ by its own rounding and nothing else.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax.ops import _xla
from tests.helpers import (
    CASES,
    FEW,
    MANY,
    SHARED,
    Case,
    Inputs,
    assert_close,
    kept,
    normal,
    products,
    random_mask,
)

IMPLEMENTATIONS = ["auto", "xla", "dense"]
# one case for each formulation of the XLA implementation, for one more dimension: a dtype, say
FORMS = {name: SHARED[name] for name in ("hub, 7 tokens", "random, 137 tokens")}
# for what depends on the formulation less: the few tokens only in the long run
FORM_NAMES = [pytest.param("hub, 7 tokens", marks=pytest.mark.slow), "random, 137 tokens"]
SIDES = {
    "side 64, spare": Case(mask=random_mask(3, 2, 0.5), block=64, n=MANY, capacity=6),
    "side 256": Case(mask=random_mask(2, 3, 0.5), block=256, n=MANY),
}
MORE_SIDES = {
    f"side {b}, {n} tokens": Case(mask=random_mask(4, 3, 0.5), block=b, n=n)
    for b in (8, 16, 32, 64, 128, 256, (16, 128), (256, 64))
    for n in (FEW, MANY)
}


@functools.partial(jax.jit, static_argnames="implementation")
def sampled(p, x, y, dv, *, implementation):
    """v, dx and dy of `sddmm`."""
    v, pull = jax.vjp(lambda x, y: bsjax.sddmm(x, y, p, implementation=implementation), x, y)
    return v, *pull(dv)


def conforms(case, implementation, *, dtype=jnp.float32, transpose=False):
    inputs = case.inputs(dtype, transpose=transpose)
    got = products(inputs, transpose=transpose, implementation=implementation)
    want = products(kept(inputs), transpose=transpose, implementation="reference")
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert_close(g, w, case.terms)
    assert not np.any(got[2][inputs.p.nnz :])  # spare slots receive zeros


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_xla(case):
    conforms(case, "xla")


def test_both_formulations_are_hit():
    assert FEW <= _xla.FEW_TOKENS < MANY
    narrow, wide = (CASES["random, 137 tokens"], SIDES["side 64, spare"])
    assert narrow.block < _xla.WIDE <= wide.block
    assert wide.capacity * 2 * wide.block <= _xla.FEW_READS * wide.block * sum(wide.mask.shape)


@pytest.mark.parametrize("name", FORM_NAMES)
@pytest.mark.parametrize("implementation", ["xla", "dense"])
def test_transposed(name, implementation):
    conforms(SHARED[name], implementation, transpose=True)


@pytest.mark.parametrize("name", [*FORMS, "full", "nothing stored, many tokens"])
@pytest.mark.parametrize("implementation", ["auto", "dense"])
def test_other_implementations(name, implementation):
    conforms(CASES[name], implementation)


@pytest.mark.slow
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_whole_table(case, implementation, transpose):
    conforms(case, implementation, transpose=transpose)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("hub, 7 tokens", jnp.float16),
        ("random, 137 tokens", jnp.bfloat16),
        pytest.param("hub, 7 tokens", jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("random, 137 tokens", jnp.float16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("implementation", ["xla", "dense"])
def test_low_precision_is_rounded_once(name, implementation, dtype):
    conforms(CASES[name], implementation, dtype=dtype)


@pytest.mark.parametrize("name", FORM_NAMES)
@pytest.mark.parametrize("implementation", ["xla", "dense"])
def test_float64(name, implementation):
    with jax.enable_x64(True):
        conforms(SHARED[name], implementation, dtype=jnp.float64)


@pytest.mark.parametrize("case", SIDES.values(), ids=SIDES)
def test_block_sides(case):
    conforms(case, "xla")


@pytest.mark.slow
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("case", MORE_SIDES.values(), ids=MORE_SIDES)
def test_more_block_sides(case, transpose):
    conforms(case, "xla", transpose=transpose)


@pytest.mark.parametrize("name", FORM_NAMES)
@pytest.mark.parametrize("implementation", ["xla", "dense"])
def test_sddmm(name, implementation):
    case = SHARED[name]
    p, x, values, y = case.inputs()
    arguments = p, x, y, values  # a cotangent has NaN in spare slots: they must not be read
    got = sampled(*arguments, implementation=implementation)
    want = sampled(*arguments, implementation="reference")
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, case.terms)


@pytest.mark.parametrize("lead", [(), (3, 5), (0, 4), (2, 1, 2)], ids=str)
def test_leading_axes(lead):
    """They are tokens, whatever their number: none, several, empty."""
    p, _, values, _ = CASES["wide blocks"].inputs()
    rng = np.random.default_rng(1)
    x, y = normal(rng, (*lead, p.shape[0])), normal(rng, (*lead, p.shape[1]))
    n = int(np.prod(lead))
    got = bsjax.matmul(x, values, p)
    assert got.shape == y.shape
    flat = bsjax.matmul(x.reshape(n, -1) if n else x.reshape(0, p.shape[0]), values, p)
    assert_close(got.reshape(n, p.shape[1]), flat, CASES["wide blocks"].terms)
    got = bsjax.sddmm(x, y, p)
    want = bsjax.sddmm(x.reshape(n, p.shape[0]), y.reshape(n, p.shape[1]), p)
    assert got.shape == values.shape
    assert_close(got, want, max(1, n))


def run(inputs):
    """`products` without its `jit`."""
    return inspect.unwrap(products)(inputs, implementation="xla")


def agree(got, want, case):
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, case.terms)


def test_a_pattern_known_while_tracing():
    """Its index arrays are worked out by NumPy, and are the same."""
    case = SHARED["random, 137 tokens"]
    p, *arrays = inputs = case.inputs()
    known = jax.jit(lambda arrays: run(Inputs(p, *arrays)))(arrays)
    agree(known, products(inputs, implementation="xla"), case)


def test_eager_on_host_arrays():
    """Loops on the device take their bounds from a pattern that Python can see."""
    case = SHARED["random, 137 tokens"]
    inputs = case.inputs()
    eager = run(jax.device_get(inputs))
    agree(eager, products(inputs, implementation="xla"), case)


@pytest.mark.parametrize("case", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bitwise_the_same_from_run_to_run(case, implementation):
    inputs = case.inputs()
    runs = [products(inputs, implementation=implementation) for _ in range(3)]
    for first, *others in zip(*runs, strict=True):
        for other in others:
            np.testing.assert_array_equal(first, other)
