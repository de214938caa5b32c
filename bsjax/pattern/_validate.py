"""What can be wrong with a pattern, and what to do about it."""

import operator
from typing import Any

import jax.numpy as jnp
import numpy as np

from bsjax.pattern._index import is_concrete


def size(where: str, name: str, value: Any, least: int = 0) -> int:
    """A whole number of at least `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{where}: `{name}` must be a whole number, got {value!r} of type "
            f"{type(value).__name__}."
        ) from None
    if number < least:
        raise ValueError(f"{where}: `{name}` must be at least {least}, got {number}.")
    return number


def pair(where: str, name: str, value: Any, least: int = 1) -> tuple[int, int]:
    """`b` or `(a, b)` as a pair of whole numbers."""
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise ValueError(f"{where}: `{name}` must be one number or a pair, got {value}.")
        a, b = value
    else:
        a = b = value
    return size(where, name, a, least), size(where, name, b, least)


def mask(value: Any) -> tuple[int, int]:
    """The grid of a bool mask (r, c)."""
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(
            f"from_mask: `mask` must be a bool array of shape (r, c), got {type(value).__name__}: "
            "wrap it in np.asarray(..., bool)."
        )
    if value.dtype != np.bool_:
        raise TypeError(
            f"from_mask: `mask` must be bool, got {value.dtype}: say which entries are stored, "
            "for example `mask != 0`."
        )
    if value.ndim != 2:
        raise ValueError(
            f"from_mask: `mask` must have two axes (block-rows, block-columns), got shape "
            f"{value.shape}: use jax.vmap for several masks."
        )
    return value.shape


def fill(
    where: str, row: np.ndarray, col: np.ndarray, grid: tuple[int, int], capacity: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Concrete coordinates with spare slots behind them, up to `capacity`."""
    if capacity is None:
        return row, col
    extra = size(where, "capacity", capacity) - len(row)
    if extra < 0:
        raise ValueError(
            f"{where}: {len(row)} stored blocks do not fit `capacity={capacity}`: "
            f"give at least {len(row)}, or leave it out."
        )
    return np.pad(row, (0, extra), constant_values=grid[0]), np.pad(
        col, (0, extra), constant_values=grid[1]
    )


def coords(row: Any, col: Any, grid: tuple[int, int]) -> tuple[Any, Any]:
    """Two integer vectors of one length, as int32."""
    xp = np if is_concrete(row, col) else jnp
    checked = []
    for name, value in (("row", row), ("col", col)):
        array = xp.asarray(value)
        if array.size == 0 and not hasattr(value, "dtype"):
            array = array.astype(xp.int32)  # an empty list has no integer dtype of its own
        if not xp.issubdtype(array.dtype, xp.integer):
            raise TypeError(
                f"from_coords: `{name}` must hold whole numbers, got {array.dtype}: "
                "coordinates are block indices (int32)."
            )
        if array.ndim != 1:
            raise ValueError(
                f"from_coords: `{name}` must have one axis, got shape {array.shape}: "
                "use jax.vmap for several patterns."
            )
        checked.append(array)
    if checked[0].shape != checked[1].shape:
        raise ValueError(
            f"from_coords: `row` and `col` must have one length, got {checked[0].shape[0]} and "
            f"{checked[1].shape[0]}."
        )
    if xp is np:
        in_range("from_coords", checked[0], checked[1], grid)
    return checked[0].astype(xp.int32), checked[1].astype(xp.int32)


def in_range(where: str, row: np.ndarray, col: np.ndarray, grid: tuple[int, int]) -> None:
    """Every slot lies inside the grid or is spare."""
    r, c = grid
    inside = (row >= 0) & (row < r) & (col >= 0) & (col < c)
    bad = np.flatnonzero(~inside & ~((row == r) & (col == c)))
    if bad.size:
        i = bad[0]
        raise ValueError(
            f"{where}: slot {i} holds block ({row[i]}, {col[i]}), outside the grid ({r}, {c}): "
            f"block indices run from 0; a spare slot is ({r}, {c})."
        )


def sorted_coords(where: str, row: np.ndarray, col: np.ndarray, grid: tuple[int, int]) -> None:
    """In range, no block twice, ordered by block-column and then by block-row."""
    in_range(where, row, col, grid)
    key = col.astype(np.int64) * (grid[0] + 1) + row
    step = np.diff(key)
    twice = np.flatnonzero((step == 0) & (col[1:] < grid[1]))
    if twice.size:
        i = twice[0]
        raise ValueError(
            f"{where}: block ({row[i]}, {col[i]}) is stored twice: give each block once."
        )
    back = np.flatnonzero(step < 0)
    if back.size:
        i = back[0]
        raise ValueError(
            f"{where}: slots must be ordered by block-column, then by block-row, but "
            f"({row[i]}, {col[i]}) comes before ({row[i + 1]}, {col[i + 1]}): build the pattern "
            "with BlockPattern.from_coords, which sorts and returns the order for the values."
        )
