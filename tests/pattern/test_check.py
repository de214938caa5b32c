"""`check`: sentences where the coordinates can be seen, checkify where they cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import bsjax
from bsjax import BlockPattern
from tests.helpers import SHARED, assert_raises, products

GRID, BLOCK = (3, 4), (8, 8)


def pattern(row, col, dtype=jnp.int32):
    return BlockPattern(jnp.asarray(row, dtype), jnp.asarray(col, dtype), GRID, BLOCK)


SOUND = {
    "stored": pattern([0, 2, 1], [0, 0, 3]),
    "spare behind": pattern([0, 2, 3, 3], [0, 0, 4, 4]),
    "only spare": pattern([3, 3, 3], [4, 4, 4]),
    "nothing": pattern([], []),
    "several": pattern([[0, 2], [1, 3]], [[0, 0], [2, 4]]),
}

OUTSIDE = "{} slots lie outside the grid (3, 4): a coordinate out of range, or a mask with more "
ORDER = "{} slots repeat the slot before them or are out of order (block-column, then block-row)"

# eagerly a sentence about the first, under jit how many there are
BAD = {
    "row too large": (
        pattern([0, 3], [0, 0]),
        "check: slot 1 holds block (3, 0), outside the grid (3, 4): block indices run from 0; a "
        "spare slot is (3, 4).",
        OUTSIDE.format(1),
    ),
    "both negative": (
        pattern([-1, -1, 0], [-1, -1, 0]),
        "check: slot 0 holds block (-1, -1), outside the grid (3, 4): block indices run from 0; a "
        "spare slot is (3, 4).",
        OUTSIDE.format(2),
    ),
    "column too large": (
        pattern([0, 1], [0, 4]),
        "check: slot 1 holds block (1, 4), outside the grid (3, 4): block indices run from 0; a "
        "spare slot is (3, 4).",
        OUTSIDE.format(1),
    ),
    "twice": (
        pattern([0, 2, 2], [0, 1, 1]),
        "check: block (2, 1) is stored twice: give each block once.",
        ORDER.format(1),
    ),
    "rows out of order": (
        pattern([2, 1], [1, 1]),
        "check: slots must be ordered by block-column, then by block-row, but (2, 1) comes before "
        "(1, 1): build the pattern with BlockPattern.from_coords, which sorts and returns the "
        "order for the values.",
        ORDER.format(1),
    ),
    "columns out of order": (
        pattern([0, 1], [2, 1]),
        "check: slots must be ordered by block-column, then by block-row, but (0, 2) comes before "
        "(1, 1): build the pattern with BlockPattern.from_coords, which sorts and returns the "
        "order for the values.",
        ORDER.format(1),
    ),
    "stored behind spare": (
        pattern([3, 0], [4, 0]),
        "check: slots must be ordered by block-column, then by block-row, but (3, 4) comes before "
        "(0, 0): build the pattern with BlockPattern.from_coords, which sorts and returns the "
        "order for the values.",
        ORDER.format(1),
    ),
    "the second of several": (
        pattern([[0, 2], [2, 2]], [[0, 0], [1, 1]]),
        "check: block (2, 1) is stored twice: give each block once.",
        ORDER.format(1),
    ),
}


@jax.jit
def staged(p):
    return checkify.checkify(bsjax.check)(p)[0]


@pytest.mark.parametrize("p", SOUND.values(), ids=SOUND)
def test_sound_patterns_pass(p):
    assert bsjax.check(p) is None
    staged(p).throw()


@pytest.mark.parametrize(("p", "message", "staged_message"), BAD.values(), ids=BAD)
def test_bad_patterns_do_not(p, message, staged_message):
    assert_raises(lambda: bsjax.check(p), ValueError, message)
    with pytest.raises(checkify.JaxRuntimeError) as caught:
        staged(p).throw()
    assert f"check: {staged_message}" in str(caught.value)


def test_a_traced_mask_that_does_not_fit():
    """Every slot is invalid, past the spare ones, and `check` says so wherever it looks."""

    @jax.jit
    def build(mask):
        return BlockPattern.from_mask(mask, BLOCK, capacity=5)

    fits, not_quite = np.zeros((2, 3, 4), bool)
    fits.flat[:5] = not_quite.flat[:6] = True
    bsjax.check(build(fits))
    p = build(not_quite)
    assert_raises(
        lambda: bsjax.matmul(jnp.ones((2, 24)), jnp.ones((5, 8, 8)), p),
        ValueError,
        "matmul: slot 0 holds block (4, 5), outside the grid (3, 4): block indices run from 0; a "
        "spare slot is (3, 4).",
    )
    halves = jax.jit(lambda p: bsjax.partition(p, 2, capacity=5)[0])(p)
    for bad, count in ((p, 5), (p.transpose()[0], 5), (halves, 10)):
        with pytest.raises(ValueError, match="check: slot 0 holds block"):
            bsjax.check(bad)
        with pytest.raises(checkify.JaxRuntimeError, match=f"{count} slots lie outside the grid"):
            staged(bad).throw()
    assert p.nnz == 0
    assert not p.mask().any()


@pytest.mark.parametrize("implementation", ["xla", "dense", "reference"])
@pytest.mark.parametrize("name", ["random, 7 tokens", "random, 137 tokens"])
def test_nothing_is_computed_from_a_part_of_a_mask(implementation, name):
    """Where nobody checks, zeros: not the products of those blocks that did fit."""
    case = SHARED[name]

    @jax.jit
    def build(mask):
        return BlockPattern.from_mask(mask, case.block, capacity=case.capacity)

    inputs = case.inputs()._replace(p=build(np.ones_like(case.mask)))
    for result in products(inputs, implementation=implementation):
        assert not np.any(result)


TYPES = {
    "mask": (
        lambda: bsjax.check(np.ones((3, 4), bool)),
        TypeError,
        "check: `p` must be a BlockPattern, got ndarray: build one with "
        "BlockPattern.from_mask(mask, block=...).",
    ),
    "cast": (
        lambda: bsjax.check(pattern([0], [0], jnp.float32)),
        TypeError,
        "check: `p.row` must be int32, got float32: coordinates are indices, which casting or "
        "averaging a model must leave out.",
    ),
    "list": (
        lambda: bsjax.check(BlockPattern(jnp.zeros(1, jnp.int32), [0], GRID, BLOCK)),
        TypeError,
        "check: `p.col` must be int32, got list: coordinates are indices, which casting or "
        "averaging a model must leave out.",
    ),
    "two shapes": (
        lambda: bsjax.check(BlockPattern(jnp.arange(2), jnp.arange(1), GRID, BLOCK)),
        ValueError,
        "check: `p.row` and `p.col` must have one shape, got (2,) and (1,): each slot has one of "
        "both.",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), TYPES.values(), ids=TYPES)
def test_message(call, error, message):
    assert_raises(call, error, message)
