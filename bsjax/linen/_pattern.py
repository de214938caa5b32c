"""A pattern inside a Linen module: as a field, and as variables of the collection `patterns`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bsjax import _layers
from bsjax.pattern import BlockPattern, is_concrete


@jax.tree_util.register_pytree_with_keys_class
class FieldPattern(BlockPattern):
    """A pattern that is hashed and compared by its coordinates.

    Linen hashes and compares modules by their fields (`nn.jit` compiles once for equal modules),
    and an array can do neither.
    """

    __slots__ = ()

    @classmethod
    def of(cls, layer: str, pattern: Any, block: int | tuple[int, int] | None) -> "FieldPattern":
        """From a `BlockPattern`, or from a bool mask together with `block`."""
        p = _layers.as_pattern(layer, pattern, block)
        return p if isinstance(p, cls) else cls(p.row, p.col, p.grid, p.block)

    def _identity(self) -> tuple[Any, ...]:
        leaves = (self.row, self.col)
        seen = is_concrete(*leaves)
        return (
            self.grid,
            self.block,
            *(np.asarray(a).tobytes() if seen else id(a) for a in leaves),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FieldPattern) and self._identity() == other._identity()

    def __reduce__(self) -> Any:
        return FieldPattern, (self.row, self.col, self.grid, self.block)

    def __hash__(self) -> int:
        return hash(self._identity())


def stored(module: nn.Module, p: BlockPattern) -> BlockPattern:
    """`p` with the coordinates in the collection `patterns`, where `init` puts those of `p`.

    Beside them lie the sizes, so that variables say what they belong to. Where sizes can be seen,
    others than those of `p` are an error; variables without sizes are taken at their word.
    """
    row = module.variable("patterns", "row", lambda: p.row).value
    col = module.variable("patterns", "col", lambda: p.col).value
    for name in ("grid", "block"):
        ours = getattr(p, name)
        if module.is_mutable_collection("patterns") or module.has_variable("patterns", name):
            size = module.variable("patterns", name, lambda v=ours: jnp.asarray(v, jnp.int32)).value
            if is_concrete(size) and tuple(np.asarray(size)) != ours:
                raise ValueError(
                    f"{type(module).__name__}: the collection `patterns` holds a pattern of "
                    f"{name} {tuple(np.asarray(size).tolist())}, but the field `pattern` has "
                    f"{ours}: use the module that these variables were made with."
                )
    return BlockPattern(row, col, p.grid, p.block)
