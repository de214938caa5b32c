"""The reference against loops in float64 that share no line with the library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from tests.helpers import CASES, FEW, Case, assert_close, islands_mask, random_mask

# the sizes of the shared cases are large for Python loops; what is special about them is kept
SMALL = {name: case for name, case in CASES.items() if case.n <= FEW and case.mask.size <= 15} | {
    "islands": Case(mask=islands_mask(4, 5), block=(2, 3)),
    "spare": Case(mask=random_mask(4, 3), block=(3, 2), capacity=9),
    "only spare": Case(mask=np.zeros((2, 3), bool), block=2, capacity=3),
}
everywhere = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)


def stored(p):
    """`(slot, block-row, block-column)` of each stored block, in Python numbers."""
    coords = zip(np.asarray(p.row).tolist(), np.asarray(p.col).tolist(), strict=True)
    return [(i, row, col) for i, (row, col) in enumerate(coords) if col < p.grid[1]]


def loop_dense(values, p):
    """S, entry by entry."""
    (r, c), (br, bc) = p.grid, p.block
    dense = np.zeros((r * br, c * bc))
    for slot, row, col in stored(p):
        for i in range(br):
            for j in range(bc):
                dense[row * br + i, col * bc + j] = values[slot, i, j]
    return dense


def loop_matmul(x, dense):
    """`x @ dense`, one output at a time."""
    y = np.zeros((x.shape[0], dense.shape[1]))
    for t in range(x.shape[0]):
        for j in range(dense.shape[1]):
            y[t, j] = sum(x[t, i] * dense[i, j] for i in range(dense.shape[0]) if dense[i, j])
    return y


def loop_sddmm(x, y, p):
    """The stored blocks of `x^T y`, one block at a time."""
    (br, bc), out = p.block, np.zeros((p.capacity, *p.block))
    for slot, row, col in stored(p):
        for t in range(x.shape[0]):
            left = x[t, row * br : (row + 1) * br]
            right = y[t, col * bc : (col + 1) * bc]
            out[slot] += np.outer(left, right)
    return out


def wide(a):
    return np.asarray(a, np.float64)


@everywhere
@pytest.mark.parametrize("transpose", [False, True])
def test_matmul(case, transpose):
    p, x, values, _ = case.inputs(transpose=transpose)
    dense = loop_dense(wide(values), p)
    got = bsjax.matmul(x, values, p, transpose=transpose, implementation="reference")
    assert_close(got, loop_matmul(wide(x), dense.T if transpose else dense), case.terms)


@everywhere
def test_sddmm(case):
    p, x, _, dy = case.inputs()
    got = bsjax.sddmm(x, dy, p, implementation="reference")
    assert_close(got, loop_sddmm(wide(x), wide(dy), p), case.terms)


@everywhere
def test_todense_and_fromdense(case):
    p, _, values, _ = case.inputs()
    dense = bsjax.todense(values, p)
    np.testing.assert_array_equal(dense, loop_dense(wide(values), p))
    # the stored blocks come back, and spare slots are zeros
    back = np.where(np.arange(p.capacity)[:, None, None] < p.nnz, values, 0)
    np.testing.assert_array_equal(bsjax.fromdense(dense, p), back)


@everywhere
def test_gradients_are_the_other_products(case):
    """What plain autodiff finds is what the loops say the derivatives are."""
    p, x, values, dy = case.inputs()

    def f(x, values):
        return bsjax.matmul(x, values, p, implementation="reference")

    dx, dvalues = jax.vjp(f, x, values)[1](dy)
    assert_close(dx, loop_matmul(wide(dy), loop_dense(wide(values), p).T), case.terms)
    assert_close(dvalues, loop_sddmm(wide(x), wide(dy), p), case.terms)


def test_todense_and_fromdense_are_each_others_derivative():
    case = SMALL["spare"]
    p, _, values, _ = case.inputs()
    array = jnp.asarray(np.random.default_rng(1).normal(size=p.shape), jnp.float32)
    (dvalues,) = jax.vjp(lambda v: bsjax.todense(v, p), values)[1](array)
    np.testing.assert_array_equal(dvalues, bsjax.fromdense(array, p))
    cotangent = jnp.where(p.col[:, None, None] < p.grid[1], values, 7.0)
    (darray,) = jax.vjp(lambda a: bsjax.fromdense(a, p), array)[1](cotangent)
    np.testing.assert_array_equal(darray, bsjax.todense(cotangent, p))
