"""PixelCNN++ (Salimans et al. 2017) whose gated residual blocks may be block-sparse.

Two streams of features see an image: `above` of a pixel knows the rows above it, `before` also the
pixels to its left in its own row. Their convolutions are shifted so that no window reaches a pixel
that comes later in raster order. On the way up images become smaller, on the way down larger again,
and each block on the way down is told what one on the way up has found.

Departures from the authors' code: no weight normalisation, but weights of the variance that keeps
that of their input; features are made larger by a 1 x 1 convolution whose channels are spread over
2 x 2 pixels, the transposed convolution of window 2 and stride 2 in other words; as many blocks on
the way down as on the way up at every scale. After Gray, Radford and Kingma 2017, "GPU Kernels for
Block-Sparse Weights", the convolutions of the blocks store some blocks of channels only.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import bsjax
import bsjax.nnx
from models._decoder import by_fan_in
from models._logistic import numbers, positions

type Conv = Callable[..., nnx.Module]  # (features in, out, window, gain=1.0, use_bias=True)
type Keys = Iterator[Array] | None  # of dropout; None is no dropout

ABOVE, BEFORE, POINT = (2, 3), (2, 2), (1, 1)  # windows of the streams, and of a pixel
PADDING = {
    ABOVE: ((1, 0), (1, 1)),
    BEFORE: ((1, 0), (1, 0)),
    (1, 3): ((0, 0), (1, 1)),
    (2, 1): ((1, 0), (0, 0)),
    POINT: ((0, 0), (0, 0)),
}
LAST_GAIN = 0.1  # of a residual: a block begins as little more than the identity
PATTERNS = ("block_diagonal", "balanced")


class Size(NamedTuple):
    """What a model is made of."""

    channels: int  # of an image
    levels: int  # of a channel
    filters: int  # features of a stream
    blocks: int  # pairs of gated blocks at each scale, on each way
    scales: int
    mixtures: int
    dropout: float
    density: float  # stored share of the blocks of channels; 1 is dense
    block: int  # channels of one
    pattern: str


def concat_elu(x: Array) -> Array:
    """Twice as many features: both signs (Shang et al. 2016)."""
    return jax.nn.elu(jnp.concatenate([x, -x], axis=-1))


def down(x: Array) -> Array:
    """Every pixel gets what the one above it had."""
    return jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]


def right(x: Array) -> Array:
    """Every pixel gets what the one to its left had."""
    return jnp.pad(x, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]


class Gated(nnx.Module):
    """`x + a * sigmoid(b)`, where a and b are convolutions of x and of what is `told`."""

    def __init__(self, conv: Conv, size: Size, window: tuple[int, int], told: int) -> None:
        features = size.filters
        self.first = conv(2 * features, features, window)
        self.aside = nnx.data(None)
        if told:
            self.aside = conv(2 * told * features, features, POINT, use_bias=False)
        self.second = conv(2 * features, 2 * features, window, gain=LAST_GAIN)
        self.dropout = size.dropout

    def __call__(self, x: Array, keys: Keys, *told: Array) -> Array:
        y = self.first(concat_elu(x))
        if self.aside is not None:
            y = y + self.aside(concat_elu(jnp.concatenate(told, axis=-1)))
        y = concat_elu(y)
        if keys is not None and self.dropout:
            kept = jax.random.bernoulli(next(keys), 1 - self.dropout, y.shape)
            y = jnp.where(kept, y / (1 - self.dropout), 0)
        a, b = jnp.split(self.second(y), 2, axis=-1)
        return x + a * jax.nn.sigmoid(b)


class Pair(nnx.Module):
    """A block of each stream; on the way down both are told what the way up has found."""

    def __init__(self, conv: Conv, size: Size, told: int) -> None:
        self.above = Gated(conv, size, ABOVE, told)
        self.before = Gated(conv, size, BEFORE, told + 1)

    def __call__(
        self, above: Array, before: Array, keys: Keys, told: tuple[Array, ...] = ()
    ) -> tuple[Array, Array]:
        above = self.above(above, keys, *told[:1])
        return above, self.before(before, keys, above, *told[1:])


class Scale(nnx.Module):
    """The blocks at one size of the image, and the ways to and from a smaller one."""

    def __init__(self, conv: Conv, plain: Conv, size: Size, last: bool) -> None:
        features = size.filters
        self.up = nnx.List([Pair(conv, size, 0) for _ in range(size.blocks)])
        self.down = nnx.List([Pair(conv, size, 1) for _ in range(size.blocks)])
        windows = () if last else (ABOVE, BEFORE)
        self.smaller = nnx.List([plain(features, features, w, strides=2) for w in windows])
        self.larger = nnx.List([plain(features, 4 * features, POINT) for _ in windows])


class PixelCNN(nnx.Module):
    """`raw[n, h, w, numbers]` of the mixture of each pixel of `x[n, h, w, c]`, of integer levels,
    from the pixels before it in raster order. With a key, dropout draws from it."""

    def __init__(self, size: Size, rngs: nnx.Rngs, seed: int = 0) -> None:
        plain, features = dense(rngs), size.filters
        conv = plain if size.density == 1 else block_sparse(size, rngs, seed)
        seen = size.channels + 1
        self.first_above = plain(seen, features, ABOVE)
        self.first_row = plain(seen, features, (1, 3))
        self.first_left = plain(seen, features, (2, 1), use_bias=False)
        last = size.scales - 1
        self.scales = nnx.List([Scale(conv, plain, size, i == last) for i in range(size.scales)])
        self.head = plain(features, numbers(size.channels, size.mixtures), POINT)
        self.size = size

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        keys = None if key is None else (jax.random.fold_in(key, i) for i in itertools.count())
        v = positions(x, self.size.levels, self.head.kernel[...].dtype)
        v = jnp.pad(v, ((0, 0),) * 3 + ((0, 1),), constant_values=1)  # padding is zeros there too
        above = down(self.first_above(v))
        before = down(self.first_row(v)) + right(self.first_left(v))
        found = []
        for scale in self.scales:
            found.append([(above, before)])
            for pair in scale.up:
                above, before = pair(above, before, keys)
                found[-1].append((above, before))
            if scale.smaller:
                to_above, to_before = scale.smaller
                above, before = to_above(above), to_before(before)
        found[-1].pop()  # is where the way down begins
        for scale in reversed(self.scales):
            told = found.pop()
            if scale.larger:
                to_above, to_before = scale.larger
                above, before = spread(to_above(above)), spread(to_before(before))
            for pair in scale.down:
                above, before = pair(above, before, keys, told.pop())
        return self.head(jax.nn.elu(before))


def spread(x: Array) -> Array:
    """`[n, 2 h, 2 w, c]` of `x[n, h, w, 4 c]`."""
    n, h, w, features = x.shape
    x = x.reshape(n, h, w, 2, 2, features // 4)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, features // 4)


def dense(rngs: nnx.Rngs) -> Callable[..., nnx.Conv]:
    """Convolutions that store every weight."""

    def conv(
        k: int, m: int, window: tuple[int, int], gain: float = 1.0, **options: Any
    ) -> nnx.Conv:
        init = by_fan_in(gain)
        return nnx.Conv(
            k, m, window, padding=PADDING[window], kernel_init=init, rngs=rngs, **options
        )

    return conv


def block_sparse(size: Size, rngs: nnx.Rngs, seed: int) -> Conv:
    """Convolutions that store a share of their blocks of channels, others in each layer."""
    seeds = itertools.count(1000 * seed)

    def conv(
        k: int, m: int, window: tuple[int, int], gain: float = 1.0, **options: Any
    ) -> nnx.Module:
        return bsjax.nnx.BlockConv(
            k,
            m,
            window,
            padding=PADDING[window],
            pattern=mask(size, k // size.filters, m // size.filters, next(seeds)),
            block=size.block,
            kernel_init=bsjax.inits.stored_fan_in(gain),
            rngs=rngs,
            **options,
        )

    return conv


def mask(size: Size, k: int, m: int, seed: int) -> np.ndarray:
    """Stored blocks of a convolution of k streams of features to m.

    "balanced" is any of that density with columns of equal length. "block_diagonal" divides the
    channels of each stream into 1 / density groups, and the channels in are shuffled, block by
    block, so that groups are other ones in each layer.
    """
    blocks = size.filters // size.block
    if size.pattern == "balanced":
        return bsjax.patterns.balanced((k * blocks, m * blocks), size.density, seed=seed)
    groups = bsjax.patterns.block_diagonal((blocks, blocks), round(1 / size.density))
    shuffled = np.random.default_rng(seed).permutation(blocks)
    return np.tile(groups[shuffled], (k, m))


def flops(model: PixelCNN, pixels: int) -> int:
    """Of an image forward: a multiplication and an addition for each stored weight and pixel."""

    def weights(part: Any) -> int:
        leaves = jax.tree.leaves(nnx.state(part, nnx.Param))
        return sum(leaf.size for leaf in leaves if leaf.ndim > 1)

    ends = model.first_above, model.first_row, model.first_left, model.head
    total = pixels * sum(map(weights, ends))
    for i, scale in enumerate(model.scales):
        small = pixels // 4 ** (i + 1)
        total += pixels // 4**i * (weights(scale.up) + weights(scale.down))
        total += small * (weights(scale.smaller) + weights(scale.larger))
    return 2 * total


def stored_share(model: nnx.Module) -> float:
    """Stored blocks of all block-sparse convolutions over all their blocks."""
    layers = (one for _, one in nnx.iter_modules(model) if isinstance(one, bsjax.nnx.BlockConv))
    patterns = [layer.pattern.get_value() for layer in layers]
    blocks = sum(math.prod(p.grid) for p in patterns)
    return sum(p.capacity for p in patterns) / blocks if blocks else 1.0
