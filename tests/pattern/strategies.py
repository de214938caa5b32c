"""What hypothesis draws, and what is compared."""

import jax
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import bsjax

sides = st.integers(0, 6)
masks = arrays.arrays(bool, st.tuples(sides, sides))
# one shape: what is traced compiles once for all examples
fixed_masks = arrays.arrays(bool, (4, 6))
blocks = st.sampled_from([(1, 1), (2, 3), (3, 1)])
spare = st.integers(0, 3)


def values_of(p, seed=0):
    """Values `[e, br, bc]`, no two alike, and NaN in spare slots."""
    values = np.random.default_rng(seed).normal(size=(p.capacity, *p.block)).astype(np.float32)
    values[np.asarray(p.col) >= p.grid[1]] = np.nan
    return values


def dense(values, p):
    """The matrix, block by block."""
    (br, bc), out = p.block, np.zeros(p.shape, np.float32)
    for block, i, j in zip(values, np.asarray(p.row), np.asarray(p.col), strict=True):
        if j < p.grid[1]:
            out[i * br : (i + 1) * br, j * bc : (j + 1) * bc] = block
    return out


def assert_same(p, q):
    """Equal in every leaf and every size; `equals` agrees."""
    np.testing.assert_array_equal(p.row, q.row)
    np.testing.assert_array_equal(p.col, q.col)
    assert (p.grid, p.block) == (q.grid, q.block)
    assert p.equals(q)
    assert q.equals(p)


def assert_sound(p):
    """In order, in range, int32, and what `check` accepts."""
    assert isinstance(p.row, jax.Array)
    assert p.row.dtype == p.col.dtype == np.int32
    bsjax.check(p)
