"""What can be wrong with an argument of a generator or a diagnostic, and what to do about it."""

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

type Mask = Bool[np.ndarray, "r c"]

# What callers may pass. At run time these are `object`, so that a wrong type reaches the checks
# below, whose messages say what to do, also where a run-time type checker is switched on.
if TYPE_CHECKING:
    type Grid = tuple[int, int] | Sequence[int]
    type Count = int
    type Share = float
    type MaskLike = np.ndarray | Any  # or anything with `.mask()`, such as a BlockPattern
else:
    Grid = Count = Share = MaskLike = object


def count(
    where: str, name: str, value: object, least: int, most: int | None = None, why: str = ""
) -> int:
    """A whole number from `least` to `most`; `why` explains the limits."""
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"
    expected = f"`{name}` must be a whole number {limits}"
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{where}: {expected}, got the bool {value}: give a count.{why}")
    try:
        number = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(
            f"{where}: {expected}, got {value!r} of type {type(value).__name__}: "
            f"convert it with int(...) or round(...).{why}"
        ) from None
    if number < least or (most is not None and number > most):
        remedy = "raise" if number < least else "lower"
        raise ValueError(f"{where}: {expected}, got {number}: {remedy} it.{why}")
    return number


def pair(where: str, name: str, value: object) -> tuple[int, int]:
    """Two sizes of at least one."""
    numbers = list(value) if isinstance(value, tuple | list | np.ndarray) else None
    if numbers is None or len(numbers) != 2:
        raise TypeError(
            f"{where}: `{name}` must be a pair of sizes, got {value!r}: write "
            f"`{name}=(rows, columns)`, both counted in blocks."
        )
    a, b = (count(where, f"{name}[{i}]", number, 1) for i, number in enumerate(numbers))
    return a, b


def share(where: str, name: str, value: object) -> float:
    """A number from 0 to 1."""
    try:
        if isinstance(value, str | bool | np.bool_):  # float("0.1") would pass
            raise TypeError
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise TypeError(
            f"{where}: `{name}` must be a number from 0 to 1, got {value!r} of type "
            f"{type(value).__name__}: give a float such as 0.1."
        ) from None
    if not 0 <= number <= 1:  # NaN is outside, too
        raise ValueError(
            f"{where}: `{name}` must be a number from 0 to 1, got {number}: it is a share, "
            "so write 10% as 0.1."
        )
    return number


def stored(where: str, grid: tuple[int, int], density: object, per_column: object) -> int:
    """How many blocks of the grid the one of the two that is given asks for."""
    r, c = grid
    if (density is None) == (per_column is None):
        raise ValueError(
            f"{where}: give one of `density` and `per_column`, got "
            f"{'neither' if density is None else 'both'}: `density` is a share of the grid, "
            "`per_column` the number of blocks in each block-column."
        )
    if density is None:
        return count(where, "per_column", per_column, 0, r) * c
    return round(share(where, "density", density) * r * c)


def generator(where: str, seed: object) -> np.random.Generator:
    """The source of all randomness of one mask."""
    return np.random.default_rng(count(where, "seed", seed, 0))


def mask(where: str, name: str, value: Any, *, square: bool = False) -> Mask:
    """A bool array with two axes, taken from a pattern if `value` is one."""
    array = value.mask() if callable(getattr(value, "mask", None)) else value
    if not (hasattr(array, "dtype") and hasattr(array, "shape")):
        raise TypeError(
            f"{where}: `{name}` must be a bool mask or have a `.mask()`, got "
            f"{type(value).__name__}: wrap it in np.asarray(..., bool)."
        )
    array = np.asarray(array)
    if array.dtype != np.bool_:
        raise TypeError(
            f"{where}: `{name}` must be bool, got {array.dtype}: say which blocks are stored, "
            f"for example `{name} != 0`."
        )
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{where}: `{name}` must have shape (rows, columns) with at least one of each, got "
            f"{array.shape}: pass one mask at a time."
        )
    if square and array.shape[0] != array.shape[1]:
        raise ValueError(
            f"{where}: `{name}` must be square, since its block-rows and block-columns are the "
            f"nodes of one graph, got shape {array.shape}: pass the square mask that it came from."
        )
    return array
