"""`check`: what can be wrong inside a pattern, found on the host or on the device."""

import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from bsjax.pattern import _validate as validate
from bsjax.pattern._core import BlockPattern
from bsjax.pattern._index import is_concrete


def check(p: BlockPattern) -> None:
    """Raise where `p` is not a pattern: a coordinate out of range, a block twice, a wrong order.

    Where the coordinates can be seen this is a `ValueError`. Under `jit` it is a
    `checkify.check`, so wrap the function: `err, y = jax.jit(checkify.checkify(f))(p)` and
    `err.throw()`. A pattern made from a traced mask that did not fit its capacity is found here.
    """
    if not isinstance(p, BlockPattern):
        raise TypeError(
            f"check: `p` must be a BlockPattern, got {type(p).__name__}: build one with "
            "BlockPattern.from_mask(mask, block=...)."
        )
    for name, leaf in (("row", p.row), ("col", p.col)):
        found = getattr(leaf, "dtype", type(leaf).__name__)
        if found != jnp.int32:
            raise TypeError(
                f"check: `p.{name}` must be int32, got {found}: coordinates are indices, which "
                "casting or averaging a model must leave out."
            )
    if p.row.shape != p.col.shape:
        raise ValueError(
            f"check: `p.row` and `p.col` must have one shape, got {p.row.shape} and "
            f"{p.col.shape}: each slot has one of both."
        )
    if is_concrete(p.row, p.col):
        rows, cols = np.asarray(p.row), np.asarray(p.col)
        for i in np.ndindex(rows.shape[:-1]):
            validate.sorted_coords("check", rows[i], cols[i], p.grid)
        return
    r, c = p.grid
    row, col = p.row, p.col
    inside = (row >= 0) & (row < r) & (col >= 0) & (col < c)
    spare = (row == r) & (col == c)
    bad = ~(inside | spare)
    checkify.check(
        ~bad.any(),
        "check: {n} slots lie outside the grid " + f"({r}, {c}): a coordinate out of range, or a "
        "mask with more blocks than the capacity",
        n=bad.sum(dtype=jnp.int32),
    )
    ahead = (col[..., 1:] > col[..., :-1]) | (
        (col[..., 1:] == col[..., :-1]) & (row[..., 1:] > row[..., :-1])
    )
    bad = ~(ahead | spare[..., 1:])
    checkify.check(
        ~bad.any(),
        "check: {n} slots repeat the slot before them or are out of order (block-column, then "
        "block-row)",
        n=bad.sum(dtype=jnp.int32),
    )
