"""Patterns from graphs: a node is a block of features, an edge stores a block in both directions.

Each function returns a numpy bool mask (n, n) with a full diagonal, so that no block of features
loses sight of itself. `barabasi_albert` and `watts_strogatz` are the masks of Gray, Radford &
Kingma 2017, "GPU Kernels for Block-Sparse Weights", for their small-world LSTM.
"""

import numpy as np

from bsjax.patterns import _check as check
from bsjax.patterns._check import Count, Grid, Mask, Share


def barabasi_albert(n: Count, m: Count, *, seed: Count = 0) -> Mask:
    """A scale-free graph plus I plus a full m x m corner: `2m(n - m) + m^2 + (n - m)` blocks.

    Node m meets the nodes before it; every later node links to m different earlier ones, drawn by
    their degrees (Barabasi & Albert 1999, "Emergence of scaling in random networks"). Early nodes
    become hubs: full block-rows and block-columns, nearly. `m=0` is I.
    """
    n = check.count("barabasi_albert", "n", n, 1)
    why = f" Every new node links to m of the n = {n} nodes."
    m = check.count("barabasi_albert", "m", m, 0, n - 1, why)
    rng = check.generator("barabasi_albert", seed)
    mask = np.eye(n, dtype=bool)
    mask[:m, :m] = mask[m, :m] = mask[:m, m] = True
    degree = np.zeros(n)
    degree[:m], degree[m] = 1, m  # neither I nor the corner counts
    for new in range(m + 1, n):
        # The m largest of degree / Exp(1) are m draws without replacement, weighted by degree.
        keys = -degree[:new] / rng.exponential(size=new)
        old = np.argpartition(keys, m)[:m]
        mask[new, old] = mask[old, new] = True
        degree[old] += 1
        degree[new] = m
    return mask


def watts_strogatz(n: Count, k_half: Count, p: Share, *, seed: Count = 0) -> Mask:
    """A ring with shortcuts plus I: `n(2 k_half + 1)` blocks.

    Each node links to the `k_half` nodes on either side; then the far end of each link moves with
    probability p to a random node that is not linked yet (Watts & Strogatz 1998, "Collective
    dynamics of small-world networks"). p=0 is a band that closes in a circle, p=1 nearly random.
    """
    n = check.count("watts_strogatz", "n", n, 1)
    why = f" A ring of n = {n} nodes has that many different neighbours on either side."
    k_half = check.count("watts_strogatz", "k_half", k_half, 0, (n - 1) // 2, why)
    return _small_world("watts_strogatz", (1, n), k_half, p, seed)


def watts_strogatz_2d(shape: Grid, k_half: Count, p: Share, *, seed: Count = 0) -> Mask:
    """A torus with shortcuts plus I: `n(2 k_half + 1)` blocks, n = height * width.

    Node `y * width + x` links to its `2 k_half` nearest nodes on the torus, which closes in both
    directions; rewiring as in `watts_strogatz`. Whole rings of neighbours are k_half = 2 (a plus),
    4 (a 3 x 3 square), 6, 10; between them, the direction along x comes first.
    """
    height, width = check.pair("watts_strogatz_2d", "shape", shape)
    # Nodes that are their own opposite (and the node itself) are neighbours of no side.
    alone = (2 - height % 2) * (2 - width % 2)
    why = f" A torus {(height, width)} has that many pairs of opposite neighbours."
    most = (height * width - alone) // 2
    k_half = check.count("watts_strogatz_2d", "k_half", k_half, 0, most, why)
    return _small_world("watts_strogatz_2d", (height, width), k_half, p, seed)


def _small_world(where: str, shape: tuple[int, int], k_half: int, p: object, seed: object) -> Mask:
    p, rng = check.share(where, "p", p), check.generator(where, seed)
    (height, width), n = shape, shape[0] * shape[1]
    y, x = np.divmod(np.arange(n), width)
    # One of each two opposite steps, the shortest first.
    opposite = -y % height * width + -x % width
    ahead = np.flatnonzero(np.arange(n) < opposite)
    length = np.minimum(y, height - y) ** 2 + np.minimum(x, width - x) ** 2
    ahead = ahead[np.argsort(length[ahead], kind="stable")][:k_half, None]
    there = (y + y[ahead]) % height * width + (x + x[ahead]) % width

    mask = np.eye(n, dtype=bool)
    mask[np.arange(n), there] = mask[there, np.arange(n)] = True
    for step, node in np.argwhere(rng.random(there.shape) < p):
        free = np.flatnonzero(~mask[node])
        if free.size:
            old, new = there[step, node], rng.choice(free)
            mask[node, old] = mask[old, node] = False
            mask[node, new] = mask[new, node] = True
    return mask


def butterfly(n: Count, factors: Count | None = None) -> Mask:
    """I and the blocks (i, i xor 2^t) for t < `factors`: `n(factors + 1)` blocks.

    All log2(n) factors (the default) mix in log2(n) steps; fewer never do, as they split the grid
    into 2^factors-blocks. For other sizes `stretch` a smaller one: `stretch(butterfly(16), grid)`.
    After Chen, Dao et al. 2022, "Pixelated Butterfly".
    """
    n = check.count("butterfly", "n", n, 1)
    if n & (n - 1):
        power = 1 << (n.bit_length() - 1)
        raise ValueError(
            f"butterfly: `n` must be a power of two, got {n}: stretch a smaller one, "
            f"`stretch(butterfly({power}), ({n}, {n}))`."
        )
    most = n.bit_length() - 1
    if factors is not None:
        factors = check.count("butterfly", "factors", factors, 0, most, f" {n} is 2^{most}.")
    distance = np.arange(n)[:, None] ^ np.arange(n)
    return np.isin(distance, [0, *(1 << t for t in range(most if factors is None else factors))])


def strides(n: Count, steps: Count) -> list[Mask]:
    """`steps` masks that together connect every block to every block, with the fewest per row.

    Step t stores (i, i + j r^t mod n) for j = 0 .. r - 1, where r is the smallest number with
    `r^steps >= n`: the distance of any two blocks is written with `steps` digits of base r, and
    step t walks digit t. At most r blocks in every row and column, density r / n, and a row of
    fewer than r blocks could not reach n blocks in `steps` steps.
    """
    n, steps = check.count("strides", "n", n, 1), check.count("strides", "steps", steps, 1)
    r = 1
    while r < n and r**steps < n:  # a root would round
        r += 1
    away = np.arange(n) - np.arange(n)[:, None]
    return [np.isin(away % n, [j * pow(r, t, n) % n for j in range(r)]) for t in range(steps)]
