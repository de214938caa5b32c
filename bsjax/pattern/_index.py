"""Index algebra that works on NumPy arrays and on tracers alike.

A pattern that is known when Python runs is worked out once, in NumPy; one that is traced is worked
out on the device. Both go through the same few functions.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Int


def is_concrete(*arrays: Any) -> bool:
    """Whether all values can be seen while Python runs (no tracers, no shape placeholders)."""
    return all(
        isinstance(a, np.ndarray | np.generic | int | list | tuple | bool)
        or (isinstance(a, jax.Array) and not isinstance(a, Tracer))
        for a in arrays
    )


def namespace(*arrays: Any) -> ModuleType:
    """NumPy where values can be seen, jax.numpy where they cannot."""
    return np if is_concrete(*arrays) else jnp


def stable_argsort(keys: Any) -> Any:
    """The order that sorts `keys` along the last axis and keeps ties as they were."""
    xp = namespace(keys)
    return xp.argsort(keys, axis=-1, stable=True).astype(xp.int32)


def pointers(sorted_keys: Any, size: int) -> Int[Any, " g"]:
    """Where each of `size` groups starts in `sorted_keys`; the last entry is where spares begin."""
    xp = namespace(sorted_keys)
    found = xp.searchsorted(xp.asarray(sorted_keys), xp.arange(size + 1, dtype=xp.int32))
    return as_leaf(found)  # loops on the device index it with a tracer, which NumPy cannot


def as_leaf(array: Any) -> Any:
    """An int32 leaf: a device array where values can be seen (also inside jit), or the tracer."""
    if is_concrete(array):
        with jax.ensure_compile_time_eval():
            return jnp.asarray(np.asarray(array), dtype=jnp.int32)
    return array.astype(jnp.int32)
