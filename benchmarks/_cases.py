"""Which products are measured, and what the house wants of them."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

import bsjax
from bsjax import patterns

PATTERNS = ("random", "barabasi_albert", "banded")
NEAR = 1.35  # a pattern of at most this many times more or fewer blocks stands for a density


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One sparse weight `(k, m)` with square blocks, and a number of tokens."""

    shape: tuple[int, int]
    tokens: int
    dtype: str
    pattern: str
    block: int
    density: float  # as asked for; the pattern's own may be a little different
    implementations: tuple[str, ...]
    p: bsjax.BlockPattern = dataclasses.field(repr=False, compare=False)
    peers: bool = False  # also time what one would use without this library

    @property
    def size(self) -> str:
        """For people."""
        return f"{self.tokens} tokens {self.shape[0]}x{self.shape[1]}"

    @property
    def seconds(self) -> float:
        """A guess of what it takes to measure, for the progress bar."""
        return 3 + self.tokens * self.shape[0] * self.shape[1] / 2e9


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """Everything combined with everything, as far as a run may take: patterns that are not random
    are measured with the first weight only, and not at `auto_tokens` and `random_tokens`."""

    shapes: Sequence[tuple[int, int]] = ((2048, 2048), (1024, 4096))
    tokens: Sequence[int] = (64, 2048)
    blocks: Sequence[int] = (16, 32, 64, 128)
    densities: Sequence[float] = (0.03, 0.05, 0.1, 0.25, 0.5)
    patterns: Sequence[str] = PATTERNS
    dtypes: Sequence[str] = ("float32",)
    implementations: Sequence[str] = ("xla", "auto")
    # only `auto` and the first weight at auto_tokens, only wide weights at random_tokens
    auto_tokens: Sequence[int] = (512,)
    random_tokens: Sequence[int] = (4096,)
    peers: bool = True


FULL = Suite()
QUICK = Suite(
    shapes=((2048, 2048),),
    blocks=(32, 64, 128),
    densities=(0.05, 0.25),
    patterns=("random", "barabasi_albert"),
    random_tokens=(),
    peers=False,
)
PEER_BLOCKS, PEER_DENSITIES = (16, 64), (0.05, 0.25)


def cases(suite: Suite, seed: int = 0) -> Iterator[Case]:
    """The cases of a suite; those of equal inputs follow each other. What does not exist (no
    Barabasi-Albert graph has so few edges) is left out."""
    for dtype, size in itertools.product(suite.dtypes, _sizes(suite)):
        (k, m), tokens, names, implementations = size
        for name, block, density in itertools.product(names, suite.blocks, suite.densities):
            mask = nearest(name, (k // block, m // block), density, seed)
            if mask is None:
                continue
            case = Case(
                shape=(k, m),
                tokens=tokens,
                dtype=dtype,
                pattern=name,
                block=block,
                density=density,
                implementations=implementations,
                p=bsjax.BlockPattern.from_mask(mask, block),
            )
            yield dataclasses.replace(case, peers=suite.peers and _has_peers(case, suite))


def _sizes(suite: Suite) -> Iterator[tuple[tuple[int, int], int, list[str], tuple[str, ...]]]:
    """Weight, tokens, patterns and implementations that are measured together."""
    random = [name for name in suite.patterns if name == "random"]
    everything = tuple(suite.implementations)
    auto = tuple(name for name in everything if name == "auto")
    for shape in suite.shapes:
        first = shape == suite.shapes[0]
        for tokens in sorted({*suite.tokens, *suite.auto_tokens, *suite.random_tokens}):
            if tokens in suite.tokens:
                yield shape, tokens, list(suite.patterns) if first else random, everything
            elif tokens in suite.auto_tokens and first and auto:
                yield shape, tokens, random, auto
            elif tokens in suite.random_tokens and shape[0] < shape[1]:
                yield shape, tokens, random, everything


def _has_peers(case: Case, suite: Suite) -> bool:
    return (
        (case.pattern, case.dtype, case.shape) == ("random", "float32", suite.shapes[0])
        and case.tokens in suite.tokens
        and case.block in PEER_BLOCKS
        and case.density in PEER_DENSITIES
    )


def nearest(
    pattern: str, grid: tuple[int, int], density: float, seed: int = 0
) -> np.ndarray | None:
    """The mask of that kind whose density is nearest, or None if none is near."""
    r, c = grid
    n = min(grid)  # a graph is square: a longer axis draws its columns several times
    masks: Iterable[np.ndarray]
    if pattern == "random":
        masks = [patterns.random(grid, density, seed=seed)]
    elif pattern == "banded":
        masks = (patterns.banded(grid, width) for width in range(n))
    else:
        stored = ((2 * m * (n - m) + m * m + n - m, m) for m in range(1, n))
        m = min(stored, key=lambda one: abs(math.log(one[0] / (density * n * n))), default=(0, 0))
        masks = [patterns.stretch(patterns.barabasi_albert(n, m[1], seed=seed), (r, c))]
    off, mask = min(
        ((abs(math.log(max(mask.mean(), 1e-9) / density)), mask) for mask in masks),
        key=lambda one: one[0],
    )
    return mask if off <= math.log(NEAR) else None


def goal(case: Case, implementation: str) -> float | None:
    """The most that time over dense time should be, where the house has said so."""
    goals = []
    measured = case.shape == (2048, 2048) and case.tokens == 2048 and case.dtype == "float32"
    if measured and case.pattern == "random" and case.block in GOALS and implementation != "dense":
        slope, start = GOALS[case.block]
        goals.append(slope * case.p.density + start)
    if implementation == "auto" and case.tokens >= AUTO_FROM:
        goals.append(AUTO)
    return min(goals, default=None)


GOALS = {128: (1.8, 0.15), 64: (2.8, 0.20)}  # slope * density + start, by block
AUTO, AUTO_FROM = 1.08, 512  # `auto` over dense, from that many tokens up
TEMPORARIES = 1.5  # temporary bytes over those of x, y and values, at 2048 tokens
