"""`flax.serialization` of patterns: static sizes are saved beside the leaves and compared."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import serialization

from bsjax.pattern import BlockPattern, check, is_concrete
from bsjax.pattern._index import as_leaf

SIZES = ("grid", "block")


def to_state(p: BlockPattern) -> dict[str, Any]:
    """The coordinates and, beside them, the sizes: `row`, `col`, `grid`, `block`."""
    # NumPy where it can be: Linen hashes a field by what it serialises to, entry by entry
    row, col = (np.asarray(a) if is_concrete(a) else a for a in (p.row, p.col))
    sizes = {name: np.asarray(getattr(p, name), np.int32) for name in SIZES}
    lead = row.shape[:-1]  # several patterns say their sizes as often, as nn.scan stacks them
    return {"row": row, "col": col} | {k: np.tile(v, (*lead, 1)) for k, v in sizes.items()}


def from_state(p: BlockPattern, state: dict[str, Any]) -> BlockPattern:
    """The saved coordinates, if they are those of a pattern with the sizes and capacity of `p`."""
    missing = sorted({"row", "col", *SIZES} - set(state))
    if missing:
        raise ValueError(
            f"BlockPattern: the saved state lacks {missing}: save models with flax.serialization "
            "(bsjax.nnx or bsjax.linen imported), which keeps the sizes beside the coordinates."
        )
    for name in SIZES:
        for saved in np.asarray(state[name]).reshape(-1, 2).tolist():
            if tuple(saved) != getattr(p, name):
                raise ValueError(
                    f"BlockPattern: the saved pattern has {name} {tuple(saved)}, the target has "
                    f"{getattr(p, name)}: restore into a model built with the same sizes."
                )
    for name in ("row", "col"):
        saved, ours = state[name], getattr(p, name)
        if saved.shape != ours.shape:
            raise ValueError(
                f"BlockPattern: the saved `{name}` has shape {saved.shape}, the target's has "
                f"{ours.shape}: restore into a model whose pattern has the same capacity."
            )
        if saved.dtype != jnp.int32:
            raise TypeError(
                f"BlockPattern: the saved `{name}` must be int32, got {saved.dtype}: coordinates "
                "are indices, so leave them out when a model is cast or averaged."
            )
    q = BlockPattern(as_leaf(state["row"]), as_leaf(state["col"]), p.grid, p.block)
    if is_concrete(q.row, q.col):
        check(q)
    return q


serialization.register_serialization_state(BlockPattern, to_state, from_state)
