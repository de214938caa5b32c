"""Patterns that know only the grid: by chance, by place, by whole rows and columns.

Each function returns a numpy bool mask (r, c): block-rows are inputs, block-columns outputs of
`y = x @ S`. "The diagonal" of a rectangular grid runs from corner to corner: block-row i covers
the part [i / r, (i + 1) / r] of it, block-column j the part [j / c, (j + 1) / c].
"""

import numpy as np

from bsjax.patterns import _check as check
from bsjax.patterns._check import Count, Grid, Mask, MaskLike, Share


def random(grid: Grid, density: Share, *, seed: Count = 0) -> Mask:
    """Exactly `round(density * r * c)` blocks, every set of that many equally likely."""
    r, c = check.pair("random", "grid", grid)
    stored = round(check.share("random", "density", density) * r * c)
    mask = np.zeros(r * c, bool)
    mask[check.generator("random", seed).choice(r * c, stored, replace=False)] = True
    return mask.reshape(r, c)


def balanced(
    grid: Grid,
    density: Share | None = None,
    *,
    per_column: Count | None = None,
    seed: Count = 0,
) -> Mask:
    """A random mask whose block-columns all store equally many blocks, and its block-rows too.

    `density` stores `round(density * r * c)` blocks, the same number as `random`; `per_column=k`
    stores `k * c`, k in every block-column. Counts that cannot be equal differ by one: they are
    equal over the columns where c divides the number of stored blocks, over the rows where r does.

    Sampled by global curveball trades (Carstens, Hamann, Meyer, Penschuck, Tran & Wagner 2018,
    "Parallel and I/O-efficient randomisation of massive networks using global curveball trades"),
    whose limit is uniform over the masks with these counts. The number of trades is fixed, so it
    always ends.
    """
    r, c = check.pair("balanced", "grid", grid)
    stored = check.stored("balanced", (r, c), density, per_column)
    return deal((r, c), stored, check.generator("balanced", seed))


def deal(grid: tuple[int, int], stored: int, rng: np.random.Generator) -> Mask:
    """A mask of `stored` blocks, as `balanced` draws it."""
    r, c = grid
    # Dealt out like cards, the blocks of a column go to neighbouring rows and no row gets two more
    # than another.
    column = np.repeat(np.arange(c), [stored // c + (j < stored % c) for j in range(c)])
    mask = np.zeros((r, c), bool)
    mask[np.arange(stored) % r, column] = True
    mask = mask[rng.permutation(r)][:, rng.permutation(c)]
    _trade(mask, 8 + r.bit_length(), rng)
    return mask


def _trade(mask: Mask, rounds: int, rng: np.random.Generator) -> None:
    """Pairs all rows at random; each pair deals anew, in place, what only one of the two has."""
    half = len(mask) // 2
    for _ in range(rounds):
        one, other = rng.permutation(len(mask))[: 2 * half].reshape(2, half)
        a, b = mask[one], mask[other]
        either = a != b
        keys = np.where(either, rng.random(either.shape), 1.0)
        rank = np.empty(either.shape, int)
        np.put_along_axis(rank, keys.argsort(axis=1), np.arange(mask.shape[1])[None], axis=1)
        to_one = rank < (a & either).sum(axis=1, keepdims=True)
        mask[one] = np.where(either, to_one, a)
        mask[other] = np.where(either, ~to_one, b)


def banded(grid: Grid, width: Count) -> Mask:
    """The blocks at most `width` blocks away from the diagonal: `|i - j| <= width` if r == c.

    In a rectangular grid the width counts blocks of the shorter axis, so that a (4, 16) band is
    the (4, 4) band with every column drawn four times. `width=0` is the diagonal.
    """
    r, c = check.pair("banded", "grid", grid)
    reach = check.count("banded", "width", width, 0) * max(r, c)
    # The diagonal is r * c long in these units: a block-row covers c of it, a block-column r.
    row, column = np.arange(r)[:, None] * c, np.arange(c) * r
    return (row < column + r + reach) & (column < row + c + reach)


def block_diagonal(grid: Grid, parts: Count) -> Mask:
    """`parts` full rectangles along the diagonal, as equal in size as the grid allows."""
    r, c = check.pair("block_diagonal", "grid", grid)
    why = f" A part needs a block-row and a block-column of the grid {(r, c)}."
    parts = check.count("block_diagonal", "parts", parts, 1, min(r, c), why)
    return np.arange(r)[:, None] * parts // r == np.arange(c) * parts // c


def lower_triangular(grid: Grid) -> Mask:
    """The blocks on or below the diagonal: `j <= i` if r == c.

    With query blocks as rows and key blocks as columns over one sequence, these are the blocks
    that causal attention needs. `lower_triangular((c, r)).T` is the upper one.
    """
    r, c = check.pair("lower_triangular", "grid", grid)
    return np.arange(c) * r < (np.arange(r)[:, None] + 1) * c


def global_blocks(grid: Grid, *, rows: Count = 1, columns: Count = 1) -> Mask:
    """The first `rows` block-rows and the first `columns` block-columns, full."""
    r, c = check.pair("global_blocks", "grid", grid)
    rows = check.count("global_blocks", "rows", rows, 0, r)
    columns = check.count("global_blocks", "columns", columns, 0, c)
    return (np.arange(r)[:, None] < rows) | (np.arange(c) < columns)


def stretch(mask: MaskLike, grid: Grid) -> Mask:
    """`mask` drawn larger: block (i, j) is stored where `mask[i * r // R, j * c // C]` is.

    It carries a graph, which is square, over to a rectangular (R, C), such as the two
    layers of an MLP: `stretch(barabasi_albert(12, 2), (12, 48))` has the density of the graph.
    """
    mask = check.mask("stretch", "mask", mask)
    new = check.pair("stretch", "grid", grid)
    if new[0] < mask.shape[0] or new[1] < mask.shape[1]:
        raise ValueError(
            f"stretch: `grid` {new} must be at least as large as the mask {mask.shape} along both "
            "axes, or blocks would be lost: generate a smaller mask and stretch that."
        )
    row, column = (np.arange(n) * old // n for n, old in zip(new, mask.shape, strict=True))
    return mask[row][:, column]
