"""`partition`: a pattern cut into equal parts, for weights sharded over a mesh."""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from bsjax.pattern import _validate as validate
from bsjax.pattern._core import BlockPattern, Size
from bsjax.pattern._index import as_leaf, is_concrete, stable_argsort


def partition(
    p: BlockPattern,
    parts: Size,
    *,
    axis: Literal["columns", "rows"] = "columns",
    capacity: Size | None = None,
) -> tuple[BlockPattern, Int32[Array, "parts e"]]:
    """Cut `p` into `parts` neighbouring runs of block-columns (or block-rows) of equal width.

    Returns `(local, order)`. `local` has leaves `[parts, e']` and the grid of one part; part `i`
    of the values is `values[order[i]]` (`order == -1` in spare slots, which are never read), so
    `values[order]` has shape `[parts, e', br, bc]` and is sharded along its first axis.

    Cut by columns, `y` comes out in parts: `concatenate(matmul(x, values_i, local_i))`. Cut by
    rows, `x` goes in in parts and the results are summed (`psum`).

    `e'` is the largest number of blocks in a part, or `capacity`, which a traced pattern needs.
    """
    if not isinstance(p, BlockPattern):
        raise TypeError(
            f"partition: `p` must be a BlockPattern, got {type(p).__name__}: build one with "
            "BlockPattern.from_mask(mask, block=...)."
        )
    if axis not in ("columns", "rows"):
        raise ValueError(f'partition: `axis` must be "columns" or "rows", got {axis!r}.')
    parts = validate.size("partition", "parts", parts, least=1)
    along = 1 if axis == "columns" else 0
    if p.grid[along] % parts:
        raise ValueError(
            f"partition: {p.grid[along]} block-{axis} cannot be cut into {parts} equal parts: "
            f"choose a divisor, or a grid whose block-{axis} {parts} divides."
        )
    if p.row.ndim != 1:
        raise ValueError(
            f"partition: expected one pattern, got leading axes {p.row.shape[:-1]}: use jax.vmap."
        )
    width = p.grid[along] // parts
    concrete = is_concrete(p.row, p.col)
    xp: Any = np if concrete else jnp
    row, col = xp.asarray(p.row), xp.asarray(p.col)
    index = (row, col)[along]
    part = index // width if width else index * 0 + parts  # spare slots land in part `parts`
    order = stable_argsort(part)
    start = xp.searchsorted(part[order], xp.arange(parts + 1, dtype=xp.int32))
    if capacity is None:
        if not concrete:
            raise ValueError(
                "partition: the pattern is traced, so the largest part is not known: give "
                "`capacity=`, the most blocks that one part may hold."
            )
        capacity = int(np.diff(start).max())
    capacity = validate.size("partition", "capacity", capacity)
    if concrete and np.diff(start).max() > capacity:
        raise ValueError(
            f"partition: a part holds {np.diff(start).max()} blocks, more than "
            f"`capacity={capacity}`: give at least that many."
        )
    slot = start[:-1, None] + xp.arange(capacity, dtype=xp.int32)[None, :]
    stored = slot < start[1:, None]
    # of a part, or of the whole pattern already
    overflow = (start[1:] - start[:-1] > capacity) | (index > p.grid[along]).any()
    order = xp.where(stored, order[xp.minimum(slot, p.capacity - 1)] if p.capacity else -1, -1)
    shift = xp.arange(parts, dtype=xp.int32)[:, None] * width
    grid = (p.grid[0], width) if along else (width, p.grid[1])

    def local(coords: Any, base: Any, end: int) -> Any:
        if not p.capacity:
            return xp.full((parts, capacity), end)
        # a part that does not fit has no valid slot, which `check` reports
        return xp.where(overflow[:, None], end + 1, xp.where(stored, coords[order] - base, end))

    zero = xp.zeros_like(shift)
    rows = local(row, zero if along else shift, grid[0])
    cols = local(col, shift if along else zero, grid[1])
    return BlockPattern(as_leaf(rows), as_leaf(cols), grid, p.block), as_leaf(order)
