"""Which stored blocks make an output block: what every implementation over stored blocks walks."""

from typing import Any

from jax import lax
from jaxtyping import Array

from bsjax.pattern import BlockPattern, pointers


class Lists:
    """For every output block, the slots that feed it: `slot[ptr[j]:ptr[j + 1]]`.

    `source` is the input block of each slot. Slots are the identity for `x @ S` (the values are
    stored by output column) and sorted by block-row for `x @ S^T`.
    """

    def __init__(self, p: BlockPattern, transpose: bool) -> None:
        self.transpose = transpose
        self.inputs, self.outputs = p.grid[::-1] if transpose else p.grid
        self.width_in, self.width_out = p.block[::-1] if transpose else p.block
        if transpose:
            flipped, self.slot = p.transpose()
            self.source, self.target = flipped.row, flipped.col
        else:
            self.slot, self.source, self.target = None, p.row, p.col
        self.ptr = pointers(self.target, self.outputs)

    def take(self, values: Array, start: Any, count: int) -> Array:
        """Values `[count, br, bc]` of the slots from `start` on."""
        if self.slot is None:
            return lax.dynamic_slice_in_dim(values, start, count)
        return values[lax.dynamic_slice_in_dim(self.slot, start, count)]
