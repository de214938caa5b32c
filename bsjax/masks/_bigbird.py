"""BigBird: a window, global blocks, and random blocks, as arithmetic on indices."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bsjax.masks._mask import Mask, Spans
from bsjax.masks._named import causal as past
from bsjax.pattern._validate import pair, size

NAME = "bigbird"
# the largest prime whose square is an int32, and two more than a multiple of three: cubes of
# distinct numbers are distinct
PRIME = 46_337


def bigbird(
    lengths: Any = None,
    *,
    block: int = 64,
    window: int = 3,
    ends: int = 1,
    random: int = 3,
    seed: int = 0,
    causal: bool = False,
) -> Mask:
    """Whole blocks of `block` positions: a window, the first and the last ones, and random ones.

    Every block of queries sees `window` blocks of keys around it, an odd number, the first and the
    last `ends` blocks of keys, and `random` of the others (or all of them, if there are fewer), one
    from each of as many equal parts. The first and the last `ends` blocks of queries see
    everything. `lengths` are the numbers of queries and of keys, or one number for both; the
    diagonal of a rectangular grid runs from corner to corner. After Zaheer et al. 2020, "Big Bird:
    Transformers for Longer Sequences".

    With `causal=True` a query sees nothing behind itself, and the blocks are drawn from those that
    are left before it, so that a later query has as many as it may: its own block, the
    `window // 2` before it, the first `ends`, and `random` others. It needs no `lengths`.

    The draws are arithmetic too, so that kernels can make them: a few rounds of x -> (x + key)**3
    modulo a prime (as in MiMC, Albrecht et al. 2016), with keys drawn from `seed`. For other draws
    in each head take `per_head([bigbird(..., seed=h) for h in range(heads)])`. Where attention has
    blocks of the same size, all of them are full but those on the diagonal of a causal mask.
    """
    block = size(NAME, "block", block, least=1)
    window = size(NAME, "window", window, least=1)
    if window % 2 == 0:
        raise ValueError(
            f"{NAME}: `window` must be odd, got {window}: as many blocks before as after."
        )
    ends, random = size(NAME, "ends", ends), size(NAME, "random", random)
    rng = np.random.default_rng(size(NAME, "seed", seed))
    if causal == (lengths is not None):
        raise ValueError(
            f"{NAME}: give the numbers of queries and keys, `lengths`, or `causal=True`, which "
            f"needs none, got {lengths} and causal={causal}: a mask for given lengths without what "
            "is behind a query is `bigbird(lengths) & causal()`."
        )
    grid = None
    if lengths is not None:
        lengths = pair(NAME, "lengths", lengths, least=1)
        grid = tuple(-(-length // block) for length in lengths)
        random = min(random, grid[1])
    keys = rng.integers(PRIME, size=(random, 4)).tolist()

    def stored(i: Any, j: Any) -> Any:
        return _stored(i, j, grid, window // 2, ends, keys)

    numbers = f"block={block}, window={window}, ends={ends}, random={random}, seed={seed}"
    numbers = f"{'causal' if lengths is None else lengths}, {numbers}"
    found = Mask(
        lambda h, q, k: stored(q // block, k // block),
        lambda at: _blocks(at, block, lengths, stored),
        f"{NAME}({numbers})",
    )
    return found & past() if causal else found


def _stored(i: Any, j: Any, grid: Any, half: int, ends: int, keys: list[list[int]]) -> Any:
    """Whether block-row i stores block j, on arrays; causal without a grid."""
    i = np.asarray(i) if isinstance(i, int) else i
    if grid is None:
        middle, stop = i, (i + 1).clip(ends)
        seen = (j < ends) & (i >= j)
    else:
        (r, c) = grid
        middle, stop = i * c // r, max(c - ends, ends)
        seen = (i < ends) | (i >= r - ends) | (j < ends) | (j >= c - ends)
    near = (j >= middle - half) & (j <= middle + half)
    if grid is None:
        near = near & (j <= i)
    # the others: blocks from `ends` to `stop` but for those in the window
    first, last = ((middle + at).clip(ends, stop) for at in (-half, half + 1))
    others = stop - ends - (last - first)
    seen = seen | near
    for part, own in enumerate(keys):
        begin, end = (others * at // len(keys) for at in (part, part + 1))
        drawn = ends + begin + _mixed(i, own) * (end - begin) // PRIME
        drawn = drawn + (drawn >= first).astype(i.dtype) * (last - first)
        seen = seen | ((end > begin) & (j == drawn))
    return seen


def _mixed(i: Any, keys: list[int]) -> Any:
    """A number below PRIME for each i, other ones for other i; no step leaves int32."""
    for key in keys:
        i = (i + key) % PRIME
        i = i * i % PRIME * i % PRIME
    return i


def _blocks(
    at: Spans, block: int, lengths: Any, stored: Callable[[Any, Any], Any]
) -> tuple[Any, Any]:
    """From how many of the mask's own blocks lie in each block of attention."""
    found = tuple(int(last.max(initial=-1)) + 1 for last in (at.q1, at.k1))
    if lengths not in (None, found):
        raise ValueError(
            f"{NAME}: the mask is for {lengths[0]} queries and {lengths[1]} keys, but the pattern "
            f"has {found[0]} and {found[1]}: make it with `lengths` of these."
        )
    r, c = (-(-length // block) for length in found)
    if max(r, c) >= PRIME:
        raise ValueError(
            f"{NAME}: {found} positions are {max(r, c)} blocks of {block}, and at most "
            f"{PRIME - 1} are supported: take larger blocks."
        )
    have = np.zeros((r + 1, c + 1), np.int32)
    have[1:, 1:] = stored(*np.ogrid[:r, :c])
    have = have.cumsum(0, np.int32).cumsum(1, np.int32)
    q0, q1, k0, k1 = at.q0 // block, at.q1 // block + 1, at.k0 // block, at.k1 // block + 1
    inside = have[q1, k1] - have[q0, k1] - have[q1, k0] + have[q0, k0]
    return inside > 0, inside == (q1 - q0) * (k1 - k0)
