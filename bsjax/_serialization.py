"""`flax.serialization` of patterns: static sizes are saved beside the leaves and compared."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import serialization

from bsjax.pattern import BlockPattern


def _to_state(p: BlockPattern) -> dict[str, Any]:
    return {
        "row": p.row,
        "col": p.col,
        "grid": np.asarray(p.grid, np.int32),
        "block": np.asarray(p.block, np.int32),
    }


def _from_state(p: BlockPattern, state: dict[str, Any]) -> BlockPattern:
    missing = {"row", "col", "grid", "block"} - set(state)
    if missing:
        raise ValueError(
            f"BlockPattern: the saved state lacks {sorted(missing)}: it was not saved by "
            "flax.serialization with bsjax.nnx or bsjax.linen imported."
        )
    for name in ("grid", "block"):
        saved, ours = tuple(int(v) for v in state[name]), getattr(p, name)
        if saved != ours:
            raise ValueError(
                f"BlockPattern: the saved pattern has {name} {saved}, the target has {ours}: "
                "restore into a model built with the same sizes."
            )
    row, col = (jnp.asarray(state[name], jnp.int32) for name in ("row", "col"))
    return BlockPattern(row, col, p.grid, p.block)


serialization.register_serialization_state(BlockPattern, _to_state, _from_state)
