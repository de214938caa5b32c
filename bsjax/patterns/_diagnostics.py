"""What a mask does to the flow of information and to the balance of work.

Every function takes bool masks (r, c), or anything with a `.mask()`. A mask is read as a directed
graph: a stored block (i, j) lets source i reach target j. Definitions: Watts & Strogatz 1998.
"""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import UInt64

from bsjax.patterns import _check as check
from bsjax.patterns._check import Count, Mask, MaskLike

if TYPE_CHECKING:
    type MaskLikes = MaskLike | Sequence[MaskLike]
else:
    MaskLikes = object

# reach[j] is the set of sources that reach target j, one bit each.
type Reach = UInt64[np.ndarray, "_ words"]


class Links(NamedTuple):
    """A mask as lists: `target[i]` reads the sources `source[bound[i]:bound[i + 1]]`."""

    target: np.ndarray
    bound: np.ndarray
    source: np.ndarray
    columns: int


def mixing_profile(masks: MaskLikes, *, steps: Count | None = None) -> list[float]:
    """Share of the (source, target) pairs that are connected after step 1, 2, ...

    Step s asks which entries of the boolean product `M_1 M_2 ... M_s` are true. A list of masks
    is walked through once, or, with `steps`, over and over. One mask is repeated `steps` times;
    without `steps`, until everything is connected or nothing changes any more, at most n times
    (a mask that is not square cannot be repeated and takes one step).
    """
    single = callable(getattr(masks, "mask", None)) or getattr(masks, "ndim", 0) == 2
    if not single and not (isinstance(masks, list | tuple | np.ndarray) and len(masks)):
        raise TypeError(
            "mixing_profile: `masks` must be a bool mask or a list of at least one, got "
            f"{masks!r}: pass the mask of each step."
        )
    listed = [masks] if single else list(masks)  # pyright: ignore[reportArgumentType]
    chain = [check.mask("mixing_profile", f"masks[{i}]", m) for i, m in enumerate(listed)]
    r, c = chain[0].shape
    if steps is not None:
        last = check.count("mixing_profile", "steps", steps, 1)
    else:
        last = r if single and r == c else len(chain)
    _check_follow(chain, last)

    reach, profile = _itself(r), []
    for links in itertools.islice(itertools.cycle([_links(m) for m in chain]), last):
        before, reach = reach, _advance(reach, links)
        profile.append(_connected(reach) / (r * links.columns))
        done = profile[-1] == 1 or np.array_equal(before, reach)
        if single and steps is None and done:
            break
    return profile


def average_path_length(mask: MaskLike) -> float:
    """Mean over i != j of the steps from i to j.

    Infinite where some j cannot be reached from some i; 0 for a single node.
    """
    mask = check.mask("average_path_length", "mask", mask, square=True)
    n = len(mask)
    links, reach = _links(mask | np.eye(n, dtype=bool)), _itself(n)
    # A mean of steps is a sum over t of the share of pairs that need more than t.
    total, missing = 0, n * n - n
    while missing:
        total += missing
        reach = _advance(reach, links)
        missing, before = n * n - _connected(reach), missing
        if missing == before:
            return math.inf
    return total / max(n * n - n, 1)


def clustering(mask: MaskLike) -> float:
    """Mean over the nodes of the share of linked pairs among a node's neighbours.

    Taken on the graph that links i and j where either block is stored, without self-links. A node
    with fewer than two neighbours counts as 0.
    """
    linked = _undirected(check.mask("clustering", "mask", mask, square=True))
    degree = linked.sum(axis=1)
    triangles = ((linked @ linked) * linked).sum(axis=1)  # each one twice
    return float(np.mean(triangles / np.maximum(degree * (degree - 1), 1)))


def small_world(mask: MaskLike) -> float:
    """`sigma = (C / C_rand) / (L / L_rand)`, far above 1 where short ways meet tight groups.

    C is `clustering`, L `average_path_length`, both of the undirected graph; a random graph of n
    nodes with k links each has about `C_rand = k / n` and `L_rand = ln n / ln k`.
    Humphries & Gurney 2008, "Network 'small-world-ness'".
    """
    linked = _undirected(check.mask("small_world", "mask", mask, square=True))
    n, k = len(linked), float(linked.sum(axis=1).mean())
    if k <= 1:
        raise ValueError(
            "small_world: `mask` must link a node to more than one other on average, got "
            f"{k:g}: so sparse a graph has no random one to be compared with; store more blocks."
        )
    length = average_path_length(linked > 0)
    return (clustering(linked > 0) * n / k) / (length * math.log(k) / math.log(n))


def spectral_gap(mask: MaskLike) -> float:
    """`1 - |lambda_2|` of the mask with every row divided by its number of blocks.

    The rate at which a random walk over the blocks forgets where it began: 0 where the mask falls
    into parts, 1 for a full one.
    """
    mask = check.mask("spectral_gap", "mask", mask, square=True)
    walk = mask / np.maximum(mask.sum(axis=1, keepdims=True), 1)
    sizes = np.sort(np.abs(np.linalg.eigvals(walk)))
    return float(1 - sizes[-2]) if len(mask) > 1 else 1.0


class Degrees(NamedTuple):
    """How many blocks a block-row, or a block-column, stores."""

    least: int
    mean: float
    most: int

    @property
    def imbalance(self) -> float:
        """most / mean: how much longer the longest takes than its share; 1 is perfect."""
        return self.most / self.mean if self.most else 1.0


class DegreeBalance(NamedTuple):
    """Columns bound the work of `x @ S`, rows that of `x @ S^T`."""

    columns: Degrees
    rows: Degrees


def degree_balance(mask: MaskLike) -> DegreeBalance:
    """Least, mean and most stored blocks of the block-columns and of the block-rows."""
    mask = check.mask("degree_balance", "mask", mask)
    counts = (mask.sum(axis=axis) for axis in (0, 1))
    return DegreeBalance(*(Degrees(int(n.min()), float(n.mean()), int(n.max())) for n in counts))


def _check_follow(chain: list[np.ndarray], steps: int) -> None:
    """What one step reaches, the next one must start from, for as many pairs as occur."""
    for s in range(1, min(steps, len(chain) + 1)):
        before, here = chain[s - 1], chain[s % len(chain)]
        if before.shape[1] != here.shape[0]:
            raise ValueError(
                f"mixing_profile: step {s} ends in {before.shape[1]} block-columns, but step "
                f"{s + 1} starts from {here.shape[0]} block-rows: pass masks whose shapes follow "
                "each other; going round again, the first follows the last."
            )


def _undirected(mask: Mask) -> np.ndarray:
    """Links without direction and without self-links, as float32 for BLAS."""
    return ((mask | mask.T) & ~np.eye(len(mask), dtype=bool)).astype(np.float32)


def _itself(n: int) -> Reach:
    """Every source reaches itself."""
    bits = np.zeros((n, -(-n // 64) * 8), np.uint8)
    packed = np.packbits(np.eye(n, dtype=bool), axis=1)
    bits[:, : packed.shape[1]] = packed
    return bits.view(np.uint64)


def _links(mask: Mask) -> Links:
    column, source = np.nonzero(mask.T)
    target, start = np.unique(column, return_index=True)
    return Links(target, np.append(start, len(source)), source, mask.shape[1])


def _advance(reach: Reach, links: Links) -> Reach:
    """One step of the boolean product: a target is reached by all that reached its sources."""
    target, bound, source, columns = links
    out = np.zeros((columns, reach.shape[1]), np.uint64)  # an empty block-column is not reached
    for a in range(0, len(target), 64):  # in groups, so that a full mask needs little memory
        b = min(a + 64, len(target))
        sources = reach[source[bound[a] : bound[b]]]
        out[target[a:b]] = np.bitwise_or.reduceat(sources, bound[a:b] - bound[a], axis=0)
    return out


def _connected(reach: Reach) -> int:
    return int(np.bitwise_count(reach).sum(dtype=np.int64))
