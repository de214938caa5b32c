"""Which stored blocks make an output block, as the kernels walk them: tables, made on the device.

Output blocks side by side are taken in groups of one, two or four. An input block that all of a
group store is one step: what is read of x serves them all. One that only half of a group stores is
a step of that half, and so on down to single output blocks (`parts`). So no product is ever
computed with a block that is not stored.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

PRODUCT = 2048  # up to so many input blocks, counting by a triangular product is the faster way


class Steps(NamedTuple):
    """Steps are ordered by group, part and input block."""

    ptr: Array  # int32 [groups * parts + 1]: where the steps of each part begin
    source: Array  # int32 [e]: the input block
    slots: Array  # int32 [columns, e]: the stored block of each member of the part


def parts(columns: int) -> list[tuple[int, int]]:
    """(first, width) of the parts of a group: the whole, its halves, and so on."""
    widths = [columns >> i for i in range(columns.bit_length())]
    return [(first, width) for width in widths for first in range(0, columns, width)]


def of_pattern(
    row: Array,
    col: Array,
    grid: tuple[int, int],
    *,
    columns: int = 1,
    transpose: bool = False,
) -> Steps:
    """Of `x @ S` or `x @ S^T`, for a pattern of a `grid` that is sorted by column, then by row."""
    r, c = grid
    if transpose:
        return _grouped(row, col, (c, r), columns)
    if columns > 1:
        return _grouped(col, row, (r, c), columns)
    return Steps(pointers(col, c), row, jnp.arange(row.shape[0], dtype=jnp.int32)[None])


def pointers(blocks: Array, count: int) -> Array:
    """Where each of so many `blocks`, which are sorted, begins; the last is where spares do.

    By comparison: one kernel on a GPU, where a binary search is a loop of many.
    """
    each = jnp.arange(count + 1, dtype=jnp.int32)
    return jnp.sum(blocks[None] < each[:, None], axis=1, dtype=jnp.int32)


def _grouped(target: Array, source: Array, grid: tuple[int, int], columns: int) -> Steps:
    """Of a `grid` (inputs, outputs), with slots in any order."""
    (inputs, outputs), e = grid, source.shape[0]
    groups, kinds = -(-outputs // columns), parts(columns)
    rows = groups * columns
    slot_of = jnp.full((rows, inputs), -1, jnp.int32)
    slot_of = slot_of.at[target, source].set(jnp.arange(e, dtype=jnp.int32), mode="drop")
    stored = slot_of.reshape(groups, columns, inputs) >= 0
    free, steps = [stored[:, i] for i in range(columns)], []
    for first, width in kinds:
        together = functools.reduce(jnp.logical_and, free[first : first + width])
        free[first : first + width] = [one & ~together for one in free[first : first + width]]
        steps.append(together)
    flat = jnp.stack(steps, axis=1).reshape(groups * len(kinds), inputs)
    ptr = jnp.concatenate([jnp.zeros(1, jnp.int32), _counted(jnp.sum(flat, 1, dtype=jnp.int32))])
    place = jnp.where(flat, ptr[:-1, None] + _before(flat), e)
    cells = jnp.arange(flat.size, dtype=jnp.int32)
    cell = jnp.zeros(e, jnp.int32).at[place.ravel()].set(cells, mode="drop")
    source = cell % inputs
    first = columns * (cell // (len(kinds) * inputs))
    slots = jnp.stack([slot_of[first + i, source] for i in range(columns)])
    slots = jnp.maximum(slots, 0)  # no part reads those of other members
    return Steps(ptr, source, slots)


def of_sample(weights: Array, taken: int, each: int) -> tuple[Array, Array]:
    """Of an axis that is sampled by groups of `each` slices: the numbers of its slices, those of
    the `taken` groups first, and what each of these counts.

    Groups of weight zero come before the others, should fewer than `taken` have another weight.
    """
    order = jnp.argsort(weights == 0).astype(jnp.int32)
    order = jnp.concatenate([order[:taken][::-1], order[taken:]])
    slices = order[:, None] * each + jnp.arange(each, dtype=jnp.int32)[None]
    counts = jnp.repeat(weights[order[:taken]].astype(jnp.float32), each)
    return slices.reshape(slices.size), counts


def quotients(counts: Array, *, same: bool) -> Array:
    """What a sum is multiplied by before each slice is added, and what in the end, so that every
    slice counts what it should. If all count the `same` only the last one is right."""
    if same:
        return jnp.broadcast_to(counts[-1:], (counts.size + 1,))
    before = jnp.where(counts[1:] == 0, 0, counts[:-1] / counts[1:])
    return jnp.concatenate([jnp.ones(1, jnp.float32), before, counts[-1:]])


def _counted(counts: Array) -> Array:
    """Sums of all up to each. A scan would be many small kernels on a GPU."""
    each = jnp.arange(counts.shape[0])
    return jnp.sum(jnp.where(each[None] <= each[:, None], counts[None], 0), axis=1, dtype=jnp.int32)


def _before(flags: Array) -> Array:
    """How many of a row are set before each, exactly: sums of so few ones are whole in float32."""
    size = flags.shape[1]
    if size > PRODUCT:
        return jnp.cumsum(flags, axis=1, dtype=jnp.int32) - flags.astype(jnp.int32)
    earlier = jnp.triu(jnp.ones((size, size), jnp.bfloat16), 1)
    counts = jnp.dot(flags.astype(jnp.bfloat16), earlier, preferred_element_type=jnp.float32)
    return counts.astype(jnp.int32)
