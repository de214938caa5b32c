"""The tables that lead the kernels, against loops over the mask."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax import patterns
from pallas_kernels import lists

pytestmark = pytest.mark.usefixtures("quick_compilations")
SHAPES = [(1, 1), (3, 2), (2, 5), (4, 7)]  # shapes compile, so they are few


def walked(mask, columns):
    """What a kernel walks: for each group and part, (input block, slots of the members)."""
    col, row = np.nonzero(mask.T)
    r, c = mask.shape
    slot = {(int(i), int(j)): k for k, (i, j) in enumerate(zip(row, col, strict=True))}
    result = []
    for group in range(-(-c // columns)):
        for first, width in lists.parts(columns):
            steps = []
            for i in range(r):
                mine = [(i, group * columns + first + k) for k in range(width)]
                outer = [
                    [(i, group * columns + start + k) for k in range(wide)]
                    for start, wide in lists.parts(columns)
                    if wide > width and start <= first < start + wide
                ]
                if all(m in slot for m in mine) and not any(
                    all(m in slot for m in one) for one in outer
                ):
                    steps.append((i, [slot[m] for m in mine]))
            result.append(steps)
    return result


def turned(mask, columns):
    """The same of the transpose, whose values lie in the order of the pattern itself."""
    order = np.argsort(np.nonzero(mask.T)[1], kind="stable")
    return [
        [(i, [int(order[s]) for s in slots]) for i, slots in part]
        for part in walked(mask.T, columns)
    ]


def tables(mask, columns, capacity, transpose=False):
    col, row = np.nonzero(mask.T)
    spare = capacity - len(row)
    r, c = mask.shape
    row, col = (
        np.concatenate([a, np.full(spare, n)]).astype(np.int32) for a, n in ((row, r), (col, c))
    )
    row, col = jnp.asarray(row), jnp.asarray(col)
    return lists.of_pattern(row, col, mask.shape, columns=columns, transpose=transpose)


def check(steps, want, columns):
    ptr, source, slots = (np.asarray(a) for a in steps)
    kinds = lists.parts(columns)
    assert ptr[0] == 0
    assert len(ptr) == len(want) + 1
    for i, part in enumerate(want):
        first, width = kinds[i % len(kinds)]
        found = [
            (int(source[s]), [int(slots[first + k, s]) for k in range(width)])
            for s in range(ptr[i], ptr[i + 1])
        ]
        assert found == part


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.sampled_from(SHAPES), st.sampled_from([1, 2, 4]), st.integers(0, 2**31))
def test_every_stored_block_once(shape, columns, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < rng.choice([0.0, 0.3, 0.8, 1.0])
    steps = tables(mask, columns, mask.size + 1)
    check(steps, walked(mask, columns), columns)
    check(tables(mask, columns, mask.size + 1, True), turned(mask, columns), columns)


def test_many_inputs_are_counted_as_well():
    """Beyond what a triangular product counts."""
    mask = np.random.default_rng(0).random((lists.PRODUCT + 3, 2)) < 0.5
    check(tables(mask, 2, int(mask.sum()) + 2), walked(mask, 2), 2)


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_reads_are_those_of_the_diagnostic(columns):
    """What `bsjax.patterns` says of a pattern is what the kernels do with it."""
    mask = np.random.default_rng(0).random((31, 30)) < 0.5
    steps = tables(mask, columns, int(mask.sum()))
    assert int(steps.ptr[-1]) == pytest.approx(patterns.reads_per_block(mask, columns) * mask.sum())
