"""Every mistake in building a pattern is answered by a sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax import BlockPattern
from tests.helpers import assert_raises

MASK = np.ones((3, 4), bool)


def coords(row, col, grid=(3, 4), block=8, **options):
    return lambda: BlockPattern.from_coords(row, col, grid=grid, block=block, **options)


def mask(value, block=8, **options):
    return lambda: BlockPattern.from_mask(value, block, **options)


WRONG = {
    # masks
    "list": (
        mask([[True]]),
        TypeError,
        "from_mask: `mask` must be a bool array of shape (r, c), got list: wrap it in "
        "np.asarray(..., bool).",
    ),
    "float mask": (
        mask(np.ones((3, 4))),
        TypeError,
        "from_mask: `mask` must be bool, got float64: say which entries are stored, for example "
        "`mask != 0`.",
    ),
    "traced float mask": (
        lambda: jax.jit(lambda m: BlockPattern.from_mask(m, 8, capacity=3))(jnp.ones((3, 4))),
        TypeError,
        "from_mask: `mask` must be bool, got float32: say which entries are stored, for example "
        "`mask != 0`.",
    ),
    "three axes": (
        mask(np.ones((2, 3, 4), bool)),
        ValueError,
        "from_mask: `mask` must have two axes (block-rows, block-columns), got shape (2, 3, 4): "
        "use jax.vmap for several masks.",
    ),
    "traced without capacity": (
        lambda: jax.jit(lambda m: BlockPattern.from_mask(m, 8))(MASK),
        ValueError,
        "from_mask: `mask` is traced, so the number of stored blocks is not known: give "
        "`capacity=`, the most blocks that the pattern may ever hold.",
    ),
    "mask over capacity": (
        mask(MASK, capacity=11),
        ValueError,
        "from_mask: 12 stored blocks do not fit `capacity=11`: give at least 12, or leave it out.",
    ),
    "negative capacity": (
        mask(MASK, capacity=-1),
        ValueError,
        "from_mask: `capacity` must be at least 0, got -1.",
    ),
    "traced negative capacity": (
        lambda: jax.jit(lambda m: BlockPattern.from_mask(m, 8, capacity=-1))(MASK),
        ValueError,
        "from_mask: `capacity` must be at least 0, got -1.",
    ),
    "half a slot": (
        mask(MASK, capacity=11.5),
        TypeError,
        "from_mask: `capacity` must be a whole number, got 11.5 of type float.",
    ),
    # blocks
    "half a block": (
        mask(MASK, 0.5),
        TypeError,
        "from_mask: `block` must be a whole number, got 0.5 of type float.",
    ),
    "no block": (mask(MASK, 0), ValueError, "from_mask: `block` must be at least 1, got 0."),
    "flat block": (mask(MASK, (8, 0)), ValueError, "from_mask: `block` must be at least 1, got 0."),
    "cube": (
        mask(MASK, (8, 8, 8)),
        ValueError,
        "from_mask: `block` must be one number or a pair, got (8, 8, 8).",
    ),
    "block of coords": (
        coords([0], [0], block="8"),
        TypeError,
        "from_coords: `block` must be a whole number, got '8' of type str.",
    ),
    # coordinates
    "float row": (
        coords([0.0], [0]),
        TypeError,
        "from_coords: `row` must hold whole numbers, got float64: coordinates are block indices "
        "(int32).",
    ),
    "empty float col": (
        coords(np.zeros(0, int), np.zeros(0)),
        TypeError,
        "from_coords: `col` must hold whole numbers, got float64: coordinates are block indices "
        "(int32).",
    ),
    "bool": (
        coords([True], [0]),
        TypeError,
        "from_coords: `row` must hold whole numbers, got bool: coordinates are block indices "
        "(int32).",
    ),
    "one number": (
        coords(0, 0),
        ValueError,
        "from_coords: `row` must have one axis, got shape (): use jax.vmap for several patterns.",
    ),
    "grid of coordinates": (
        coords([0], [[0]]),
        ValueError,
        "from_coords: `col` must have one axis, got shape (1, 1): use jax.vmap for several "
        "patterns.",
    ),
    "lengths": (
        coords([0, 1], [0]),
        ValueError,
        "from_coords: `row` and `col` must have one length, got 2 and 1.",
    ),
    "out of range": (
        coords([0, 3], [0, 1]),
        ValueError,
        "from_coords: slot 1 holds block (3, 1), outside the grid (3, 4): block indices run from "
        "0; a spare slot is (3, 4).",
    ),
    "half spare": (
        coords([3], [0]),
        ValueError,
        "from_coords: slot 0 holds block (3, 0), outside the grid (3, 4): block indices run from "
        "0; a spare slot is (3, 4).",
    ),
    "beyond 32 bits": (
        coords([2**32], [0]),
        ValueError,
        "from_coords: slot 0 holds block (4294967296, 0), outside the grid (3, 4): block indices "
        "run from 0; a spare slot is (3, 4).",
    ),
    "twice": (
        coords([1, 0, 1], [2, 0, 2]),
        ValueError,
        "from_coords: block (1, 2) is stored twice: give each block once.",
    ),
    "over capacity": (
        coords([0, 1], [0, 1], capacity=1),
        ValueError,
        "from_coords: 2 coordinates do not fit `capacity=1`: give at least 2, or leave it out.",
    ),
    "traced over capacity": (
        lambda: jax.jit(lambda i: coords(i, i, capacity=1)())(jnp.arange(2)),
        ValueError,
        "from_coords: 2 coordinates do not fit `capacity=1`: give at least 2, or leave it out.",
    ),
    "capacity of coords": (
        coords([0], [0], capacity="2"),
        TypeError,
        "from_coords: `capacity` must be a whole number, got '2' of type str.",
    ),
    "grid": (
        coords([], [], grid=(3,)),
        ValueError,
        "from_coords: `grid` must be one number or a pair, got (3,).",
    ),
    "negative grid": (
        coords([], [], grid=(3, -1)),
        ValueError,
        "from_coords: `grid` must be at least 0, got -1.",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_message(call, error, message):
    assert_raises(call, error, message)


@pytest.mark.parametrize("whole", [8, np.int64(8), np.int32(8), jnp.int32(8)], ids=repr)
def test_any_whole_number_is_a_size(whole):
    """And comes out as a plain int, hashable and equal to any other."""
    p = BlockPattern.from_mask(MASK, whole, capacity=whole + 5)
    assert p.block == (8, 8)
    assert {type(side) for side in (*p.block, *p.grid)} == {int}
    assert p.capacity == 13
