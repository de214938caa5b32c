"""What a residual network is made of: its convolutions, which blocks they store, what they cost.

The networks for CIFAR of He, Zhang, Ren and Sun 2016 ("Deep Residual Learning for Image
Recognition"), the wide ones of Zagoruyko and Komodakis 2016 ("Wide Residual Networks"), and the
bottlenecks that He et al. made for ImageNet. Each has stages of equal blocks; the first convolution
and the classifier are dense, and those in a stage store a share of the blocks of channels.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bsjax import patterns
from models._cli import Mistake

PATTERNS = ("balanced", "watts_strogatz", "block_diagonal")
NAMES = "resnet-20 to resnet-110 (6n + 2), wrn-16-4, wrn-28-10 (6n + 4) or resnet-50"
DEEPEST = 50  # blocks of a stage: beyond, names are typing mistakes


class Size(NamedTuple):
    """A network. Channels of a stage are its width, four times that for bottlenecks."""

    kind: str  # "basic", "wide" (normalised before each convolution) or "bottleneck"
    blocks: tuple[int, ...]  # residual blocks of each stage
    widths: tuple[int, ...]
    densities: tuple[float, ...] = ()  # stored share of the weights of each stage; (): all
    block: int = 16  # side of a block of channels
    patterns: tuple[str, ...] = ("balanced",)  # of all stages, or of each
    rewired: float = 0.2  # share of the links of "watts_strogatz"
    fraction: float = 1.0  # sampled share of the channels into a convolution of a stage
    sampled_block: int = 1
    dtype: str = "float32"  # to compute in; parameters and statistics are float32

    @property
    def expansion(self) -> int:
        return 4 if self.kind == "bottleneck" else 1

    @property
    def stem(self) -> int:
        """Channels out of the first convolution."""
        return 64 if self.kind == "bottleneck" else 16

    @property
    def channels(self) -> int:
        """Into the classifier."""
        return self.expansion * self.widths[-1]


class Conv(NamedTuple):
    """A convolution of a stage. `stored` counts blocks; None is a dense one."""

    window: int
    k: int
    m: int
    stride: int
    side: int  # of the image out
    stored: int | None
    block: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.k // self.block, self.m // self.block

    def takes(self, density: float) -> bool:
        """Whether that is at least a block for each block-column."""
        return self.k // self.block * density >= 1

    @property
    def weights(self) -> int:
        channels = self.k * self.m if self.stored is None else self.stored * self.block**2
        return self.window**2 * channels


class Residual(NamedTuple):
    """A residual block: its convolutions in order, and the projection of its shortcut, if any."""

    convs: tuple[Conv, ...]
    projection: Conv | None

    @property
    def all(self) -> tuple[Conv, ...]:
        return self.convs if self.projection is None else (*self.convs, self.projection)


class Costs(NamedTuple):
    """Parameters, and floating-point operations of the forward pass of one image.

    A multiplication and an addition are two; of the rest (normalisation, ReLU, sums of the
    residual) nothing is counted. A training step has three times as many.
    """

    parameters: int
    flops: int


def named(name: str) -> Size:
    """`resnet-D` with D = 6n + 2, `wrn-D-K` with D = 6n + 4, K times as wide, or `resnet-50`.

    `resnet-50` is the one of ImageNet, with bottlenecks.
    """
    if name == "resnet-50":
        return Size("bottleneck", (3, 4, 6, 3), (64, 128, 256, 512))
    match = re.fullmatch(r"resnet-(\d+)|wrn-(\d+)-(\d+)", name)
    kind, depth, wide = "basic", 0, 1
    if match:
        kind = "basic" if match[1] else "wide"
        depth = int(match[1] or match[2]) - (2 if match[1] else 4)
        wide = int(match[3] or 1)
    if not match or depth < 6 or depth % 6 or depth // 6 > DEEPEST or not 1 <= wide <= 64:
        raise Mistake(f"--network {name} is not known: give {NAMES}")
    return Size(kind, (depth // 6,) * 3, tuple(wide * width for width in (16, 32, 64)))


def depth(size: Size) -> int:
    """What its name says: layers with weights, the shortcuts of the wide ones among them."""
    convs = {"basic": 2, "wide": 2, "bottleneck": 3}[size.kind]
    return convs * sum(size.blocks) + (4 if size.kind == "wide" else 2)


def with_density(size: Size, densities: tuple[float, ...]) -> Size:
    """Stages that store these shares of their weights."""
    every = each_stage("--density", densities, size)
    return size._replace(densities=every) if min(every) < 1 else size


def each_stage[T](flag: str, values: tuple[T, ...], size: Size) -> tuple[T, ...]:
    """One value for all stages, or one for each. Raises `Mistake` for another number of them."""
    if len(values) not in (1, len(size.blocks)):
        raise Mistake(
            f"{flag} has {len(values)} values, but the network {len(size.blocks)} stages: give one "
            "value, or one for each stage"
        )
    return values * (len(size.blocks) // len(values))


def dense(size: Size) -> Size:
    """The same layers with all of their weights and channels."""
    return size._replace(densities=(), fraction=1.0)


def deeper(size: Size, densities: tuple[float, ...], *, match: bool) -> Size:
    """Twice as many blocks in each stage, at these densities.

    With `match` they are the most: where a stage had more weights than the dense stage of half the
    depth, its density is lowered until it has as many. That is a little below a half, since the
    convolution that enters a stage is not doubled. A stage has one size of images, but for the
    convolution that enters it, so equal weights are equal operations too.
    """
    double = size._replace(blocks=tuple(2 * n for n in size.blocks))
    double = with_density(double, densities)
    if not match or not double.densities:
        return double
    lowered = []
    whole = zip(stages_of(size), stages_of(double._replace(densities=())), strict=True)
    for i, (dense, deep) in enumerate(whole):
        wanted = sum(conv.weights for block in dense for conv in block.all)
        every = sum(conv.weights for block in deep for conv in block.all)
        density, before = double.densities[i], 2.0
        while density < before:  # what is too narrow for a density stays dense, and lowers it
            convs = [conv for block in deep for conv in block.convs if conv.takes(density)]
            weights = sum(conv.weights for conv in convs)
            most = 1 - (every - wanted) / weights if convs else 0
            density, before = min(density, most), density
        if not convs or density <= 0:
            raise Mistake(
                f"stage {i + 1}, {size.widths[i]} channels wide, has no room for twice the depth "
                f"with equal parameters in blocks of {size.block}: take a smaller --block, a wider "
                "--network, or --no-match"
            )
        lowered.append(density)
    return double._replace(densities=tuple(lowered))


# ---------------------------------------------------------------------------------- convolutions


def stages_of(size: Size, side: int = 32) -> list[list[Residual]]:
    """The blocks of every stage, for images of `side` pixels."""
    k = size.stem
    if size.kind == "bottleneck":  # the first convolution and the pooling halve it, rounding up
        side = math.ceil(side / 4)
    stages = []
    for i, (blocks, width) in enumerate(zip(size.blocks, size.widths, strict=True)):
        found, m = [], width * size.expansion
        for j in range(blocks):
            stride = 2 if i and not j else 1
            out = math.ceil(side / stride)
            shapes = [(3, k, width, stride, out), (3, width, width, 1, out)]
            if size.kind == "bottleneck":
                shapes = [(1, k, width, 1, side), (3, width, width, stride, out)]
                shapes += [(1, width, m, 1, out)]
            changes = (stride > 1 or k != m) and size.kind != "basic"
            convs = tuple(Conv(*shape, None, size.block) for shape in shapes)
            projection = Conv(1, k, m, stride, out, None, size.block) if changes else None
            found.append(Residual(convs, projection))
            k, side = m, out
        density = size.densities[i] if size.densities else 1.0
        stages.append(_sparse(found, density, i + 1) if density < 1 else found)
    return stages


def _sparse(blocks: list[Residual], density: float, stage: int) -> list[Residual]:
    """The same blocks with the share `density` of the weights of their convolutions, to a block.

    Dense are projections, which are few weights and all that a shortcut has, and convolutions of
    too few channels in for a block in each block-column.
    """
    target, stored = 0.0, 0
    sparse = []
    for block in blocks:
        convs = []
        for conv in block.convs:
            if not conv.takes(density):
                convs.append(conv)
                continue
            for name, channels in (("into", conv.k), ("out of", conv.m)):
                if channels % conv.block:
                    raise Mistake(
                        f"--block {conv.block} does not divide the {channels} channels {name} a "
                        f"convolution of stage {stage}: give a divisor of them"
                    )
            # what rounding left over goes into the next convolution of the stage
            r, c = conv.grid
            target += density * r * c
            count = min(max(round(target) - stored, c), r * c)
            stored += count
            convs.append(conv._replace(stored=count))
        sparse.append(Residual(tuple(convs), block.projection))
    return sparse


def costs(size: Size, *, side: int = 32, channels: int = 3, classes: int = 10) -> Costs:
    """By the shapes of all layers; a gain and an offset for each channel that is normalised."""
    stem = size.stem * channels * (49 if size.kind == "bottleneck" else 9)
    first = math.ceil(side / 2) if size.kind == "bottleneck" else side
    weights, flops = stem, 2 * stem * first**2
    normalised = 0 if size.kind == "wide" else size.stem
    for residual in (block for stage in stages_of(size, side) for block in stage):
        for conv in residual.all:
            weights += conv.weights
            flops += 2 * conv.weights * conv.side**2
        normalised += sum(conv.k if size.kind == "wide" else conv.m for conv in residual.convs)
        if size.kind == "bottleneck" and residual.projection:
            normalised += residual.projection.m
    normalised += size.channels if size.kind == "wide" else 0
    classifier = size.channels * classes
    return Costs(weights + 2 * normalised + classifier + classes, flops + 2 * classifier)


# -------------------------------------------------------------------------------------- patterns


def masks(size: Size, seed: int) -> Iterator[np.ndarray]:
    """Which blocks each sparse convolution stores, in the order of the network."""
    generator = np.random.default_rng([seed, 1])
    stages = zip(each_stage("--pattern", size.patterns, size), stages_of(size), strict=True)
    for pattern, conv in ((p, c) for p, stage in stages for block in stage for c in block.convs):
        if conv.stored is not None:
            own = int(generator.integers(2**31))
            yield mask(pattern, conv.grid, conv.stored, own, rewired=size.rewired)


def mask(
    pattern: str, grid: tuple[int, int], stored: int, seed: int, *, rewired: float = 0.2
) -> np.ndarray:
    """A bool mask of exactly `stored` blocks, one of `PATTERNS`.

    "watts_strogatz" is the densest ring with shortcuts that is not more than that, drawn larger
    where the grid is no square, with blocks at random beside it. "block_diagonal" has the number of
    parts that comes closest, and its block-rows are shuffled as ShuffleNet shuffles channels (Zhang
    et al. 2018), so that each part reads from all parts of the layer before; then blocks are added
    or taken away at random.
    """
    r, c = grid
    if pattern == "balanced":
        return patterns.balanced(grid, stored / (r * c), seed=seed)
    nodes = min(grid)
    if pattern == "watts_strogatz":
        links = max(0, (stored * nodes // (r * c) - 1) // 2)
        ring = patterns.watts_strogatz(nodes, min(links, (nodes - 1) // 2), rewired, seed=seed)
        return _exactly(patterns.stretch(ring, grid), stored, seed)
    parts = min(max(round(r * c / stored), 1), nodes)
    shuffled = np.argsort(np.arange(r) % parts, kind="stable")  # 0 2 1 3 for two parts of two
    diagonal = np.zeros(grid, bool)
    diagonal[shuffled] = patterns.block_diagonal(grid, parts)
    return _exactly(diagonal, stored, seed)


def _exactly(mask: np.ndarray, stored: int, seed: int) -> np.ndarray:
    """With blocks added at random, or taken from the fullest rows and columns."""
    generator, mask = np.random.default_rng([seed, 2]), mask.copy()
    missing = stored - int(mask.sum())
    if missing > 0:
        empty = np.flatnonzero(~mask)
        mask.flat[generator.choice(empty, missing, replace=False)] = True
    for _ in range(-missing):
        crowd = np.where(mask, mask.sum(0) + mask.sum(1)[:, None], 0)
        mask.flat[generator.choice(np.flatnonzero(crowd == crowd.max()))] = False
    return mask
