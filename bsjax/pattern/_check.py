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
        raise TypeError(f"check: expected a BlockPattern, got {type(p).__name__}.")
    for name, leaf in (("row", p.row), ("col", p.col)):
        if leaf.dtype != jnp.int32:
            raise TypeError(f"check: `{name}` must be int32, got {leaf.dtype}.")
    if is_concrete(p.row, p.col):
        e = p.capacity
        rows, cols = np.asarray(p.row).reshape(-1, e), np.asarray(p.col).reshape(-1, e)
        for row, col in zip(rows, cols, strict=True):
            validate.sorted_coords("check", row, col, p.grid)
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
