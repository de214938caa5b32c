"""Patterns that are kind to a GPU: neighbouring block-columns that store the same block-rows.

The kernels compute `group` neighbouring block-columns in one program, and what these store alike is
read once. The same with rows for columns holds for the gradient dx, which is the product with the
transpose.
"""

import numpy as np
from jaxtyping import Bool, Float32, Int

from bsjax.patterns import _check as check
from bsjax.patterns._check import Count, Grid, Mask, MaskLike, Share
from bsjax.patterns._grids import deal

type Weights = Float32[np.ndarray, "i i"]  # how much it is worth to pair i and j: symmetric
type Pairs = Int[np.ndarray, "pairs 2"]


def grouped(
    grid: Grid,
    density: Share | None = None,
    *,
    per_column: Count | None = None,
    group: Grid = (1, 4),
    seed: Count = 0,
) -> Mask:
    """`balanced` over groups of (a, b) neighbours: all a x b blocks of a group are stored, or none.

    Groups start at multiples of a and b; the last ones are cut off where the grid ends. `group`
    (1, 4) is kind to the forward product, (4, 1) to its gradient dx, (4, 4) to both.

    On the grid of groups (ceil(r / a), ceil(c / b)), counts are exactly those of `balanced`:
    `density` stores `round(density * groups)` groups, and counts per column and per row of groups
    differ by at most one. `per_column=k`, a multiple of a, stores k / a groups in every
    block-column: exactly k blocks where a divides r (always, if a is 1), fewer in a block-column
    whose last group is cut off.
    """
    r, c = check.pair("grouped", "grid", grid)
    a, b = check.pair("grouped", "group", group)
    if per_column is not None:
        blocks = check.count("grouped", "per_column", per_column, 0, r)
        if blocks % a:
            raise ValueError(
                f"grouped: `per_column` must be a multiple of group[0] = {a}, got {blocks}: "
                f"block-rows are stored {a} at a time; give {blocks - blocks % a}, or another "
                "`group`."
            )
        per_column = blocks // a
    groups = -(-r // a), -(-c // b)
    stored = check.stored("grouped", groups, density, per_column)
    mask = deal(groups, stored, check.generator("grouped", seed))
    return mask[np.arange(r) // a][:, np.arange(c) // b]


def reads_per_block(mask: MaskLike, group: Count = 4) -> float:
    """Tiles of x that `x @ S` reads for each stored block: 1 shares nothing, 1 / group is best.

    One program computes `group` neighbouring block-columns, a power of two. A block-row is read
    once if all of them store it; if not, once for each half that stores all of it, and so on down
    to single blocks. Pass the transpose to see what dx reads. Where nothing is stored, it is 1.
    """
    full = check.mask("reads_per_block", "mask", mask)
    size = _power_of_two("reads_per_block", group)
    stored = reads = int(full.sum())
    while size > 1:
        size //= 2
        full = _joined(full, np.arange(full.shape[1] // 2 * 2).reshape(-1, 2))
        reads -= int(full.sum())  # two reads are one wherever both halves are full
    return reads / stored if stored else 1.0


def similar_columns(mask: MaskLike, group: Count = 2) -> Int[np.ndarray, " c"]:
    """An order of the block-columns, so that `mask[:, order]` stores more of them in groups.

    Pairs the block-columns that share most rows, then the pairs that share most full rows, and so
    on to groups of `group`, a power of two. What does not fill a group comes last. The same mask
    always gives the same order, and `reads_per_block(mask[:, order], group)` is never worse than
    that of the mask as it is, which stays where nothing better is found.

    A pairing of largest weight is what each step wants. It gets one that is nearly as good: greedy,
    then improved as long as two pairs gain by exchanging partners (2-opt).
    """
    mask = full = check.mask("similar_columns", "mask", mask)
    group = _power_of_two("similar_columns", group)
    order, rest = np.arange(mask.shape[1])[:, None], np.arange(0)
    while order.shape[1] < group and len(order):
        each = full.astype(np.float32)  # for BLAS; counts stay exact
        pairs, alone = _paired(each.T @ each)
        rest = np.append(order[alone], rest)
        order = order[pairs].reshape(len(pairs), 2 * order.shape[1])
        full = _joined(full, pairs)
    order, given = np.append(order, rest), np.arange(mask.shape[1])
    better = reads_per_block(mask[:, order], group) < reads_per_block(mask, group)
    return order if better else given


def _power_of_two(where: str, group: Count) -> int:
    size = check.count(where, "group", group, 1)
    if size & (size - 1):
        below = 1 << (size.bit_length() - 1)
        raise ValueError(
            f"{where}: `group` must be a power of two, since groups are halved until all of a half "
            f"is stored, got {size}: give {below} or {2 * below}."
        )
    return size


def _joined(full: Mask, pairs: Pairs) -> Bool[np.ndarray, "r pairs"]:
    """Which rows both of a pair store."""
    return full[:, pairs[:, 0]] & full[:, pairs[:, 1]]


def _paired(shared: Weights) -> tuple[Pairs, Int[np.ndarray, " alone"]]:
    """Pairs that share much, by their first members, and who is left where there is an odd one."""
    n = len(shared)
    shared = np.pad(shared, (0, n % 2))  # the odd one's partner is nobody, who shares nothing
    pairs = np.sort(_exchanged(shared, _greedy(shared)), axis=1)
    pairs = pairs[pairs[:, 0].argsort()]
    odd = pairs[:, 1] == n
    return pairs[~odd], pairs[odd, 0]


def _greedy(shared: Weights) -> Pairs:
    """All in pairs: whoever are each other's best, again and again among those that are left."""
    free, pairs = np.arange(len(shared)), []
    gain = shared + 1  # sharing nothing is better than no partner
    gain[free, free ^ 1] += 0.5  # of equals, take the neighbour
    gain[free, free] = 0
    while len(free):
        found = _mutual(gain)
        pairs.append(free[found])
        left = np.delete(np.arange(len(free)), found)
        free, gain = free[left], gain[np.ix_(left, left)]
    return np.concatenate(pairs)


def _exchanged(shared: Weights, pairs: Pairs) -> Pairs:
    """Exchanges partners between two pairs as long as that gains something."""
    while True:
        a, b = pairs.T
        now, cross = shared[a, b], shared[np.ix_(a, b)]
        alike = shared[np.ix_(a, a)] + shared[np.ix_(b, b)]  # (a, b), (c, d) become (a, c), (b, d)
        cross = cross + cross.T  # or (a, d), (b, c)
        gain = np.maximum(alike, cross) - now - now[:, None]
        np.fill_diagonal(gain, 0)
        found = _mutual(gain)
        if not len(found):
            return pairs
        one, two = found.T
        turn = (cross > alike)[one, two]
        c, d = np.where(turn, pairs[two, ::-1].T, pairs[two].T)
        pairs = pairs.copy()
        pairs[one], pairs[two] = np.stack([a[one], c], 1), np.stack([b[one], d], 1)


def _mutual(gain: Weights) -> Pairs:
    """The pairs (i < j) that are each other's best and gain something: at least one if any do."""
    i, best = np.arange(len(gain)), gain.argmax(axis=1)
    one = i[(best[best] == i) & (i < best) & (gain[i, best] > 0)]
    return np.stack([one, best[one]], axis=1)
