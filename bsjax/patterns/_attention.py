"""Patterns of attention that are made of whole blocks. Those with a mask inside their blocks are
`bsjax.masks`."""

import numpy as np

from bsjax.patterns import _check as check
from bsjax.patterns._check import Count, Grid, Mask


def bigbird(
    grid: Grid, *, window: Count = 3, ends: Count = 1, random: Count = 3, seed: Count = 0
) -> Mask:
    """A window, the first and last `ends` block-rows and -columns, and random blocks.

    Every query block (block-row) sees `window` key blocks around it, an odd number, the first and
    the last `ends` key blocks, and `random` blocks of those that are left (or all of them, if there
    are fewer). The first and the last `ends` query blocks see everything. The diagonal of a
    rectangular grid runs from corner to corner.

    After Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences".
    """
    r, c = check.pair("bigbird", "grid", grid)
    width = check.count("bigbird", "window", window, 1)
    if width % 2 == 0:
        raise ValueError(
            f"bigbird: `window` must be odd, got {width}: as many blocks before as after."
        )
    ends = check.count("bigbird", "ends", ends, 0)
    random = check.count("bigbird", "random", random, 0)
    rng = check.generator("bigbird", seed)
    row, column = np.arange(r)[:, None], np.arange(c)
    mask = np.abs(row * c // r - column) <= width // 2
    mask |= (row < ends) | (row >= r - ends) | (column < ends) | (column >= c - ends)
    order = np.argsort(np.where(mask, 2.0, rng.random((r, c))), axis=1)
    chosen = np.zeros_like(mask)
    np.put_along_axis(chosen, order[:, : min(random, c)], True, axis=1)
    return mask | chosen
