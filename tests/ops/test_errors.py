"""Every mistake is answered with a sentence: function, argument, found, expected, what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax import BlockPattern
from tests.helpers import assert_raises

P, _ = BlockPattern.from_coords([0, 2, 1], [0, 1, 3], grid=(3, 4), block=(8, 16))
X, Y = jnp.ones((5, 24)), jnp.ones((5, 64))
HALF_X, HALF_Y = X.astype(jnp.float16), Y.astype(jnp.float16)
VALUES = jnp.ones((3, 8, 16))


def pattern(row, col, dtype=jnp.int32):
    """A pattern whose coordinates nobody has checked: the constructor is inert."""
    return BlockPattern(jnp.asarray(row, dtype), jnp.asarray(col, dtype), P.grid, P.block)


STACK = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), P)
LOW = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), P)

KINDS = "floating point (float32, bfloat16, float16 or float64)"
CAST = (
    "Coordinates are indices: leave them out when a model is cast or averaged (with nnx, update "
    "only nnx.Param; else cast only floating-point leaves)."
)
TAKE_AUTO = 'Use implementation="auto", which takes the fastest that can.'
NAMES = '"auto", "xla", "mosaic", "dense", "reference"'
ACTIVATIONS = 'a function or one of "relu", "gelu", "silu", "tanh", "sigmoid"'

WRONG = {
    # what is not an array, or not of numbers that can be multiplied
    "swapped": (
        lambda: bsjax.matmul(P, X, VALUES),
        TypeError,
        "matmul: `p` must be a BlockPattern, got ArrayImpl: build one with "
        "BlockPattern.from_mask(mask, block=...).",
    ),
    "mask for a pattern": (
        lambda: bsjax.matmul(X, VALUES, np.ones((3, 4), bool)),
        TypeError,
        "matmul: `p` must be a BlockPattern, got ndarray: build one with "
        "BlockPattern.from_mask(mask, block=...).",
    ),
    "pattern for an array": (
        lambda: bsjax.matmul(X, P, P),
        TypeError,
        "matmul: `values` is a BlockPattern, expected an array: the pattern comes last.",
    ),
    "list": (
        lambda: bsjax.matmul([[1.0] * 24], VALUES, P),
        TypeError,
        "matmul: `x` must be an array, got list: wrap it in jnp.asarray.",
    ),
    "whole numbers": (
        lambda: bsjax.matmul(jnp.ones((5, 24), jnp.int32), VALUES, P),
        TypeError,
        f"matmul: `x` must be {KINDS}, got int32: cast it first, for example "
        "`x.astype(jnp.float32)`.",
    ),
    "bool values": (
        lambda: bsjax.matmul(X, VALUES > 0, P),
        TypeError,
        f"matmul: `values` must be {KINDS}, got bool: cast it first, for example "
        "`values.astype(jnp.float32)`.",
    ),
    "complex": (
        lambda: bsjax.sddmm(X, Y.astype(jnp.complex64), P),
        TypeError,
        f"sddmm: `y` must be {KINDS}, got complex64: cast it first, for example "
        "`y.astype(jnp.float32)`.",
    ),
    "eight bits": (
        lambda: bsjax.matmul(X.astype(jnp.float8_e4m3fn), VALUES, P),
        TypeError,
        f"matmul: `x` must be {KINDS}, got float8_e4m3fn: cast it first, for example "
        "`x.astype(jnp.float32)`.",
    ),
    # patterns that are none
    "model cast to bfloat16": (
        lambda: bsjax.matmul(X, VALUES, LOW),
        TypeError,
        f"matmul: `p.row` must be int32, got bfloat16. {CAST}",
    ),
    "averaged columns": (
        lambda: bsjax.glu(X, VALUES, VALUES, BlockPattern(P.row, P.col / 2, P.grid, P.block)),
        TypeError,
        f"glu: `p.col` must be int32, got float32. {CAST}",
    ),
    "lists in a pattern": (
        lambda: bsjax.todense(VALUES, BlockPattern([0, 2, 1], [0, 1, 3], P.grid, P.block)),
        TypeError,
        f"todense: `p.row` must be int32, got list. {CAST}",
    ),
    "several patterns": (
        lambda: bsjax.matmul(X, VALUES, STACK),
        ValueError,
        "matmul: expected one pattern with leaves [e], got row (2, 3) and col (2, 3): use "
        "jax.vmap over the leading axes.",
    ),
    "leaves of two lengths": (
        lambda: bsjax.sddmm(X, Y, BlockPattern(P.row, P.col[:2], P.grid, P.block)),
        ValueError,
        "sddmm: expected one pattern with leaves [e], got row (3,) and col (2,): use jax.vmap "
        "over the leading axes.",
    ),
    "room in an empty grid": (
        lambda: bsjax.matmul(
            X[:, :0], VALUES, BlockPattern.from_mask(np.ones((0, 4), bool), (8, 16), capacity=3)
        ),
        ValueError,
        "matmul: the pattern has 3 slots, but no block exists in its grid (0, 4): build it without "
        "spare capacity.",
    ),
    "out of range": (
        lambda: bsjax.matmul(X, VALUES, pattern([0, 3, 1], [0, 1, 3])),
        ValueError,
        "matmul: slot 1 holds block (3, 1), outside the grid (3, 4): block indices run from 0; a "
        "spare slot is (3, 4).",
    ),
    "negative": (
        lambda: bsjax.fromdense(jnp.ones(P.shape), pattern([-1, 2, 1], [0, 1, 3])),
        ValueError,
        "fromdense: slot 0 holds block (-1, 0), outside the grid (3, 4): block indices run from "
        "0; a spare slot is (3, 4).",
    ),
    "twice": (
        lambda: bsjax.matmul(X, VALUES, pattern([0, 2, 2], [0, 1, 1])),
        ValueError,
        "matmul: block (2, 1) is stored twice: give each block once.",
    ),
    "by rows": (
        lambda: bsjax.matmul(X, VALUES, pattern([0, 1, 2], [0, 3, 1])),
        ValueError,
        "matmul: slots must be ordered by block-column, then by block-row, but (1, 3) comes "
        "before (2, 1): build the pattern with BlockPattern.from_coords, which sorts and returns "
        "the order for the values.",
    ),
    # shapes
    "features": (
        lambda: bsjax.matmul(Y, VALUES, P),
        ValueError,
        "matmul: `x` of shape (5, 64) cannot multiply a sparse matrix of shape (24, 64): "
        "expected (..., 24).",
    ),
    "features of the transpose": (
        lambda: bsjax.matmul(X, VALUES, P, transpose=True),
        ValueError,
        "matmul: `x` of shape (5, 24) cannot multiply the transpose of a sparse matrix of shape "
        "(24, 64): expected (..., 64).",
    ),
    "no features": (
        lambda: bsjax.matmul(jnp.float32(1), VALUES, P),
        ValueError,
        "matmul: `x` of shape () cannot multiply a sparse matrix of shape (24, 64): expected "
        "(..., 24).",
    ),
    "features of glu": (
        lambda: bsjax.glu(Y, VALUES, VALUES, P),
        ValueError,
        "glu: `x` of shape (5, 64) cannot multiply a sparse matrix of shape (24, 64): expected "
        "(..., 24).",
    ),
    "left side": (
        lambda: bsjax.sddmm(Y, Y, P),
        ValueError,
        "sddmm: `x` of shape (5, 64) cannot be the left side of a sparse matrix of shape "
        "(24, 64): expected (..., 24).",
    ),
    "right side": (
        lambda: bsjax.sddmm(X, X, P),
        ValueError,
        "sddmm: `y` of shape (5, 24) cannot be the right side of a sparse matrix of shape "
        "(24, 64): expected (..., 64).",
    ),
    "other tokens": (
        lambda: bsjax.sddmm(X, Y[:4], P),
        ValueError,
        "sddmm: `x` and `y` must have the same leading axes, got shapes (5, 24) and (4, 64).",
    ),
    "number of values": (
        lambda: bsjax.matmul(X, VALUES[:2], P),
        ValueError,
        "matmul: `values` of shape (2, 8, 16) does not fit the pattern: expected (e, br, bc) = "
        "(3, 8, 16), one block for each slot.",
    ),
    "values of another block": (
        lambda: bsjax.glu(X, VALUES, VALUES.swapaxes(1, 2), P),
        ValueError,
        "glu: `up_values` of shape (3, 16, 8) does not fit the pattern: expected (e, br, bc) = "
        "(3, 8, 16), one block for each slot.",
    ),
    "gate values": (
        lambda: bsjax.glu(X, VALUES[0], VALUES, P),
        ValueError,
        "glu: `gate_values` of shape (8, 16) does not fit the pattern: expected (e, br, bc) = "
        "(3, 8, 16), one block for each slot.",
    ),
    "gate": (
        lambda: bsjax.matmul(X, VALUES, P, gate=jnp.ones(4)),
        ValueError,
        "matmul: `gate` of shape (4,) must have shape (3,), one number for each slot.",
    ),
    "counting gate": (
        lambda: bsjax.matmul(X, VALUES, P, gate=jnp.ones(3, jnp.int32)),
        TypeError,
        f"matmul: `gate` must be {KINDS}, got int32: cast it first, for example "
        "`gate.astype(jnp.float32)`.",
    ),
    "bias": (
        lambda: bsjax.matmul(X, VALUES, P, bias=jnp.ones(24)),
        ValueError,
        "matmul: `bias` of shape (24,) must have shape (64,), one number for each feature of the "
        "output.",
    ),
    "residual": (
        lambda: bsjax.matmul(X, VALUES, P, residual=X),
        ValueError,
        "matmul: `residual` of shape (5, 24) must have shape (5, 64), that of the output.",
    ),
    "dense array": (
        lambda: bsjax.fromdense(jnp.ones((64, 24)), P),
        ValueError,
        "fromdense: `array` of shape (64, 24) must have shape (24, 64), that of the pattern.",
    ),
    # options
    "axes to transpose": (
        lambda: bsjax.matmul(X, VALUES, P, transpose=(1, 0)),
        TypeError,
        "matmul: `transpose` must be True or False, got (1, 0).",
    ),
    "mosaic": (
        lambda: bsjax.matmul(X, VALUES, P, implementation="mosaic"),
        ValueError,
        'matmul: implementation="mosaic" cannot run here: there is no kernel for float32 (the '
        "tensor cores would round it to 11 bits): cast x and the values to bfloat16 or float16. "
        f"{TAKE_AUTO}",
    ),
    "mosaic, one operand of many bits": (
        lambda: bsjax.sddmm(X.astype(jnp.bfloat16), Y, P, implementation="mosaic"),
        ValueError,
        'sddmm: implementation="mosaic" cannot run here: there is no kernel for float32 (the '
        "tensor cores would round it to 11 bits): cast x and the values to bfloat16 or float16. "
        f"{TAKE_AUTO}",
    ),
    "mosaic, narrow blocks": (
        lambda: bsjax.sddmm(HALF_X, HALF_Y, P, implementation="mosaic"),
        ValueError,
        'sddmm: implementation="mosaic" cannot run here: blocks of 8 x 16: each side must be one '
        f"of 16, 32, 64, 128, 256. {TAKE_AUTO}",
    ),
    "triton": (
        lambda: bsjax.sddmm(X, Y, P, implementation="triton"),
        ValueError,
        f"sddmm: `implementation` must be one of {NAMES}, got 'triton'.",
    ),
    "activation": (
        lambda: bsjax.matmul(X, VALUES, P, activation="swish"),
        ValueError,
        f"matmul: `activation` must be {ACTIVATIONS}, got 'swish'.",
    ),
    "activation of no name": (
        lambda: bsjax.matmul(X, VALUES, P, activation=["relu"]),
        ValueError,
        f"matmul: `activation` must be {ACTIVATIONS}, got ['relu'].",
    ),
    "glu without a gate": (
        lambda: bsjax.glu(X, VALUES, VALUES, P, activation=None),
        ValueError,
        "glu: `activation` must not be None: a product of two linear maps has no gate.",
    ),
    "precision": (
        lambda: bsjax.matmul(X, VALUES, P, precision="double"),
        ValueError,
        "matmul: `precision` must be None, a jax.lax.Precision or one of "
        '"default", "high", "highest", got \'double\'.',
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_message(call, error, message):
    assert_raises(call, error, message)


def test_shapes_are_checked_under_jit_too():
    with pytest.raises(ValueError, match=r"matmul: `x` of shape \(5, 64\) cannot multiply"):
        jax.jit(bsjax.matmul)(Y, VALUES, P)


def test_a_traced_pattern_is_checked_for_its_type():
    with pytest.raises(TypeError, match=r"`p.row` must be int32, got bfloat16"):
        jax.jit(bsjax.matmul)(X, VALUES, LOW)


def test_the_checks_are_cheap_enough_to_be_forgotten():
    """A pattern made by tracing, in a wrong order, costs no check: `bsjax.check` is for that."""
    y = jax.jit(bsjax.matmul)(X, VALUES, pattern([0, 2, 2], [0, 1, 1]))
    assert y.shape == (5, 64)
