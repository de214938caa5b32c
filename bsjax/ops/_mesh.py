"""Mesh axes in types: what varies over which, and where tokens live."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jaxtyping import Array

from bsjax.pattern import BlockPattern


def varying(*arrays: Any) -> frozenset[str]:
    """The union of the manual mesh axes that arrays vary over (none outside shard_map)."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def vary(array: Array, axes: frozenset[str]) -> Array:
    """`array` cast to vary over `axes` too. The transpose is a sum over the devices of the cast."""
    missing = tuple(axes - varying(array))
    return lax.pcast(array, missing, to="varying") if missing else array


def matmul(run: Callable, x: Array, values: Array, p: BlockPattern) -> Array:
    return run(x, values, p)


def sddmm(run: Callable, x: Array, y: Array, p: BlockPattern) -> Array:
    return run(x, y, p)
