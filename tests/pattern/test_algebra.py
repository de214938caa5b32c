"""The index algebra as laws, over drawn masks; and traced code obeys the same laws."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bsjax import BlockPattern
from tests.pattern.strategies import (
    assert_same,
    assert_sound,
    blocks,
    dense,
    fixed_masks,
    masks,
    spare,
    values_of,
)

ROOM = 24  # as many as the fixed masks have blocks


@given(masks, blocks, spare)
def test_a_mask_goes_in_and_comes_out(mask, block, extra):
    stored = int(mask.sum())
    p = BlockPattern.from_mask(mask, block, capacity=stored + extra)
    assert_sound(p)
    np.testing.assert_array_equal(p.mask(), mask)
    assert (p.grid, p.block) == (mask.shape, block)
    assert p.shape == (mask.shape[0] * block[0], mask.shape[1] * block[1])
    assert (p.nnz, p.capacity) == (stored, stored + extra)
    assert isinstance(p.nnz, int)
    assert p.density == stored / max(1, mask.size)
    # block-column by block-column, and within one from top to bottom; spare slots behind
    assert [(j, i) for i, j in zip(p.row.tolist(), p.col.tolist(), strict=True)] == sorted(
        [(j, i) for i, j in np.argwhere(mask).tolist()]
    ) + [(mask.shape[1], mask.shape[0])] * extra


@given(masks, spare, st.randoms())
def test_coordinates_in_any_order(mask, extra, random):
    """`values[order]` brings values along, and spare slots of the input are spare."""
    coords = [*map(tuple, np.argwhere(mask).tolist()), *[mask.shape] * extra]
    random.shuffle(coords)
    row, col = (np.array([c[axis] for c in coords], int) for axis in (0, 1))
    capacity = len(coords) + 2
    p, order = BlockPattern.from_coords(row, col, grid=mask.shape, block=2, capacity=capacity)
    assert_sound(p)
    assert_same(p, BlockPattern.from_mask(mask, 2, capacity=capacity))
    order = np.asarray(order)
    assert sorted(order.tolist()) == [-1, -1, *range(len(coords))]
    taken = order >= 0
    np.testing.assert_array_equal(row[order[taken]], np.asarray(p.row)[taken])
    np.testing.assert_array_equal(col[order[taken]], np.asarray(p.col)[taken])
    assert order[-2:].tolist() == [-1, -1]


@given(masks, blocks, spare)
def test_the_transpose_is_the_transpose(mask, block, extra):
    p = BlockPattern.from_mask(mask, block, capacity=int(mask.sum()) + extra)
    flipped, order = p.transpose()
    assert_sound(flipped)
    assert_same(flipped, BlockPattern.from_mask(mask.T, block[::-1], capacity=p.capacity))
    values = values_of(p)
    turned = values[np.asarray(order)].swapaxes(-1, -2)
    np.testing.assert_array_equal(dense(turned, flipped), dense(values, p).T)


@given(masks, blocks, spare)
def test_transposing_twice_is_nothing(mask, block, extra):
    p = BlockPattern.from_mask(mask, block, capacity=int(mask.sum()) + extra)
    flipped, there = p.transpose()
    back, again = flipped.transpose()
    assert_same(back, p)
    np.testing.assert_array_equal(np.asarray(there)[again], np.arange(p.capacity))


@jax.jit
def traced(mask, row, col):
    """Everything a pattern can do, with nothing that Python can see."""
    p = BlockPattern.from_mask(mask, (2, 3), capacity=ROOM)
    q, order = BlockPattern.from_coords(row, col, grid=(4, 6), block=(2, 3), capacity=ROOM + 3)
    return p, p.transpose(), p.mask(), p.nnz, p.density, q, order


def obeys(mask, seed):
    row, col = np.argwhere(np.ones((4, 6), bool)).T
    keep = mask[row, col]
    row, col = np.where(keep, row, 4), np.where(keep, col, 6)  # the others are spare
    shuffled = np.random.default_rng(seed).permutation(ROOM)
    row, col = row[shuffled].astype(np.int32), col[shuffled].astype(np.int32)
    p, (flipped, order), back, nnz, density, q, q_order = traced(mask, row, col)
    want = BlockPattern.from_mask(mask, (2, 3), capacity=ROOM)
    assert_sound(p)
    assert_same(p, want)
    want_flipped, want_order = want.transpose()
    assert_same(flipped, want_flipped)
    np.testing.assert_array_equal(order, want_order)
    np.testing.assert_array_equal(back, mask)
    assert nnz == want.nnz
    np.testing.assert_allclose(density, want.density, rtol=1e-6)
    want_q, want_order = BlockPattern.from_coords(
        row, col, grid=(4, 6), block=(2, 3), capacity=ROOM + 3
    )
    assert_same(q, want_q)
    np.testing.assert_array_equal(q_order, want_order)
    assert {a.dtype for a in (q_order, order, p.row, q.col)} == {np.dtype(np.int32)}


@given(fixed_masks, st.integers(0, 99))
def test_traced_equals_concrete(mask, seed):
    obeys(mask, seed)


def test_traced_equals_concrete_with_64_bits():
    """Where JAX would make every index an int64."""
    with jax.enable_x64(True):
        for density in (0.0, 0.3, 1.0):
            obeys(np.random.default_rng(0).random((4, 6)) < density, 0)


@given(st.lists(fixed_masks, min_size=3, max_size=3))
def test_several_patterns_are_each_of_them(drawn):
    """Leading axes on the leaves: every view is that of each pattern, stacked."""
    each = [BlockPattern.from_mask(mask, (2, 3), capacity=ROOM) for mask in drawn]
    p = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    assert p.capacity == ROOM
    np.testing.assert_array_equal(p.mask(), np.stack(drawn))
    np.testing.assert_array_equal(p.nnz, [q.nnz for q in each])
    np.testing.assert_allclose(p.density, [q.density for q in each])
    flipped, order = p.transpose()
    for i, q in enumerate(each):
        want, want_order = q.transpose()
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], flipped), want)
        np.testing.assert_array_equal(order[i], want_order)


def test_several_traced_patterns():
    """The views of `[h, e]` leaves under jit, and under vmap."""
    drawn = np.random.default_rng(0).random((3, 4, 6)) < 0.4
    build = jax.vmap(lambda mask: BlockPattern.from_mask(mask, (2, 3), capacity=ROOM))
    p = jax.jit(build)(drawn)
    back, nnz = jax.jit(lambda p: (p.mask(), p.nnz))(p)
    np.testing.assert_array_equal(back, drawn)
    np.testing.assert_array_equal(nnz, drawn.sum((1, 2)))
    flipped, order = jax.jit(lambda p: p.transpose())(p)
    each, orders = jax.jit(jax.vmap(lambda p: p.transpose()))(p)
    assert_same(flipped, each)
    np.testing.assert_array_equal(order, orders)
