"""The tables that lead the kernels, against loops over the mask."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import config, lists

SHAPES = [(1, 1), (3, 2), (2, 5), (4, 7)]  # shapes compile, so they are few


def walked(mask, columns, keep=None):
    """What a kernel walks: for each group and part, (input block, slots of the members)."""
    col, row = np.nonzero(mask.T)
    r, c = mask.shape
    slot = {(int(i), int(j)): k for k, (i, j) in enumerate(zip(row, col, strict=True))}
    if keep is not None:
        slot = {place: k for place, k in slot.items() if keep[k]}
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


def tables(mask, columns, capacity, keep=None):
    col, row = np.nonzero(mask.T)
    spare = capacity - len(row)
    r, c = mask.shape
    row, col = (
        np.concatenate([a, np.full(spare, n)]).astype(np.int32) for a, n in ((row, r), (col, c))
    )
    return lists.grouped(jnp.asarray(col), jnp.asarray(row), mask.shape, columns, keep)


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


@hypothesis.given(
    st.sampled_from(SHAPES), st.sampled_from([1, 2, 4]), st.integers(0, 2**31), st.booleans()
)
def test_every_stored_block_once(shape, columns, seed, some):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < rng.choice([0.0, 0.3, 0.8, 1.0])
    capacity = mask.size + 1
    keep = np.arange(capacity) % 2 == 0 if some else None
    steps = tables(mask, columns, capacity, None if keep is None else jnp.asarray(keep))
    check(steps, walked(mask, columns, keep), columns)


def test_many_inputs_are_counted_as_well():
    """Beyond what a triangular product counts."""
    mask = np.random.default_rng(0).random((lists.PRODUCT + 3, 2)) < 0.5
    check(tables(mask, 2, int(mask.sum()) + 2), walked(mask, 2), 2)


def test_plain_is_one_column_each():
    mask = np.random.default_rng(1).random((4, 7)) < 0.4
    col, row = (jnp.asarray(a, jnp.int32) for a in np.nonzero(mask.T))
    check(lists.plain(col, row, 7), walked(mask, 1), 1)


@pytest.mark.parametrize("columns", [1, 2, 4])
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_reads_of_a_random_pattern(columns, density):
    """The heuristic's expectation is what the tables hold."""
    mask = np.random.default_rng(0).random((512, 512)) < density
    steps = tables(mask, columns, int(mask.sum()))
    assert int(steps.ptr[-1]) / mask.sum() == pytest.approx(
        config.reads(density, columns), rel=0.02
    )
