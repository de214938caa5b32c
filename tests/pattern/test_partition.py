"""`partition`: parts that put together are the whole, seen by Python or not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import checkify

import bsjax
from bsjax import BlockPattern
from tests.helpers import assert_close, assert_raises
from tests.pattern.strategies import assert_same, blocks, dense, fixed_masks, spare, values_of

AXES = {"columns": 1, "rows": 0}
axes = st.sampled_from(sorted(AXES))


def part(stacked, i):
    return jax.tree.map(lambda leaf: leaf[i], stacked)


def reassembled(values, p, local, order, axis):
    """The parts as dense matrices, side by side."""
    parts = [dense(values[np.asarray(order[i])], part(local, i)) for i in range(order.shape[0])]
    return np.concatenate(parts, axis=AXES[axis])


@given(fixed_masks, blocks, spare, axes, st.sampled_from([1, 2]))
def test_parts_are_the_whole(mask, block, extra, axis, parts):
    p = BlockPattern.from_mask(mask, block, capacity=int(mask.sum()) + extra)
    local, order = bsjax.partition(p, parts, axis=axis)
    bsjax.check(local)
    values = values_of(p)
    np.testing.assert_array_equal(reassembled(values, p, local, order, axis), dense(values, p))
    # as much room as the fullest part needs, and every stored block in one place
    counts = [part.sum() for part in np.split(mask, parts, axis=AXES[axis])]
    assert local.row.shape == order.shape == (parts, max(counts))
    np.testing.assert_array_equal(local.nnz, counts)
    taken = np.asarray(order)[np.asarray(local.col) < local.grid[1]]
    assert sorted(taken.tolist()) == list(range(p.nnz))
    assert (np.asarray(order) == -1).sum() == order.size - p.nnz


@functools.partial(jax.jit, static_argnames=("axis", "parts"))
def traced(p, axis, parts):
    return bsjax.partition(p, parts, axis=axis, capacity=12)


@given(fixed_masks, axes, st.sampled_from([2]))
def test_traced_equals_concrete(mask, axis, parts):
    p = BlockPattern.from_mask(mask, 2, capacity=24)
    got, want = traced(p, axis, parts), bsjax.partition(p, parts, axis=axis, capacity=12)
    assert_same(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


def test_traced_with_64_bits():
    p = BlockPattern.from_mask(np.eye(4, dtype=bool), 2)
    with jax.enable_x64(True):
        local, order = jax.jit(lambda p: bsjax.partition(p, 2, capacity=3))(p)
    assert_same(local, bsjax.partition(p, 2, capacity=3)[0])
    assert order.tolist() == [[0, 1, -1], [2, 3, -1]]


@pytest.mark.parametrize("axis", AXES)
def test_gradients_of_parts_are_those_of_the_whole(axis):
    """`values[order]` repeats a value in spare slots, which must give it no gradient."""
    rng = np.random.default_rng(0)
    p = BlockPattern.from_mask(rng.random((4, 6)) < 0.5, 2)
    local, order = bsjax.partition(p, 2, axis=axis)
    assert (order == -1).any()
    values = jnp.asarray(rng.normal(size=(p.capacity, 2, 2)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)
    dy = jnp.asarray(rng.normal(size=(5, 12)), jnp.float32)

    def whole(values):
        return (bsjax.matmul(x, values, p) * dy).sum()

    def parts(values):
        xs = x.reshape(5, 2, 4).swapaxes(0, 1) if axis == "rows" else jnp.stack([x, x])
        ys = jax.vmap(bsjax.matmul)(xs, values[order], local)
        y = ys.sum(0) if axis == "rows" else jnp.concatenate([*ys], axis=1)
        return (y * dy).sum()

    assert_close(parts(values), whole(values), 5 * 12 * 8)
    assert_close(jax.grad(parts)(values), jax.grad(whole)(values), 5)


@pytest.mark.parametrize("axis", AXES)
def test_nothing_to_cut(axis):
    """No slot at all, and no block-row or block-column at all."""
    for grid in ((4, 6), (0, 6), (4, 0)):
        p, _ = BlockPattern.from_coords([], [], grid=grid, block=2)
        local, order = bsjax.partition(p, 2, axis=axis)
        assert order.shape == local.row.shape == (2, 0)
        roomy, order = bsjax.partition(p, 2, axis=axis, capacity=3)
        assert (order == -1).all()
        bsjax.check(roomy)


def test_a_traced_part_that_does_not_fit_has_no_valid_slot():
    """It cannot be refused while tracing, so `check` finds it."""
    p = BlockPattern.from_mask(np.ones((4, 6), bool), 2)

    @jax.jit
    @checkify.checkify
    def cut(p):
        local, _ = bsjax.partition(p, 2, capacity=11)
        bsjax.check(local)
        return local

    error, local = cut(p)
    with pytest.raises(checkify.JaxRuntimeError, match="22 slots lie outside the grid"):
        error.throw()
    assert not local.mask().any()


P = BlockPattern.from_mask(np.ones((4, 6), bool), 2)
STACK = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), P)

WRONG = {
    "axis": (
        lambda: bsjax.partition(P, 2, axis="cols"),
        ValueError,
        'partition: `axis` must be "columns" or "rows", got \'cols\'.',
    ),
    "columns": (
        lambda: bsjax.partition(P, 4),
        ValueError,
        "partition: 6 block-columns cannot be cut into 4 equal parts: choose a divisor, or a grid "
        "whose block-columns 4 divides.",
    ),
    "rows": (
        lambda: bsjax.partition(P, 3, axis="rows"),
        ValueError,
        "partition: 4 block-rows cannot be cut into 3 equal parts: choose a divisor, or a grid "
        "whose block-rows 3 divides.",
    ),
    "no parts": (
        lambda: bsjax.partition(P, 0),
        ValueError,
        "partition: `parts` must be at least 1, got 0.",
    ),
    "half a part": (
        lambda: bsjax.partition(P, 1.5),
        TypeError,
        "partition: `parts` must be a whole number, got 1.5 of type float.",
    ),
    "capacity": (
        lambda: bsjax.partition(P, 2, capacity=11),
        ValueError,
        "partition: a part holds 12 blocks, more than `capacity=11`: give at least that many.",
    ),
    "negative capacity": (
        lambda: bsjax.partition(P, 2, capacity=-1),
        ValueError,
        "partition: `capacity` must be at least 0, got -1.",
    ),
    "traced": (
        lambda: jax.jit(lambda p: bsjax.partition(p, 2))(P),
        ValueError,
        "partition: the pattern is traced, so the largest part is not known: give `capacity=`, "
        "the most blocks that one part may hold.",
    ),
    "several patterns": (
        lambda: bsjax.partition(STACK, 2),
        ValueError,
        "partition: expected one pattern, got leading axes (2,): use jax.vmap.",
    ),
    "mask": (
        lambda: bsjax.partition(np.ones((4, 6), bool), 2),
        TypeError,
        "partition: `p` must be a BlockPattern, got ndarray: build one with "
        "BlockPattern.from_mask(mask, block=...).",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_message(call, error, message):
    assert_raises(call, error, message)


def test_vmap_cuts_several_patterns():
    local, order = jax.vmap(lambda p: bsjax.partition(p, 2, capacity=12))(STACK)
    want, want_order = bsjax.partition(P, 2)
    assert_same(part(local, 1), want)
    np.testing.assert_array_equal(order[1], want_order)
