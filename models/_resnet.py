"""Residual networks of Flax modules, dense or with block-sparse convolutions in their stages."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import bsjax
import bsjax.nnx
from models import _resnet_plan as plan
from models._resnet_plan import Conv, Residual, Size

# one object each: two networks of a size are made of the same functions, or both would compile
HE = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
STORED_HE = bsjax.inits.stored_fan_in(2**0.5)  # the same over stored inputs


class ResNet(nnx.Module):
    """`logits[n, classes]`, float32, of images `x[n, h, w, channels]`.

    Convolutions have no bias, since a normalisation follows, and a border of `window // 2` zeros.
    Computed in `size.dtype`; parameters are float32, and so are normalisations and what they keep.
    A bottleneck takes its stride in the middle, as is usual today, not in its first convolution.
    """

    def __init__(self, size: Size, channels: int, classes: int, seed: int) -> None:
        # streams of their own: with or without sampling, a seed gives the same weights
        rngs = nnx.Rngs(params=seed, sampling=seed)
        self.size, build = size, Builder(size, seed, rngs)
        window, stride = (7, 2) if size.kind == "bottleneck" else (3, 1)
        self.stem = build.dense(channels, size.stem, window, stride)
        wide = size.kind == "wide"
        self.norm = build.norm(size.channels if wide else size.stem)
        make = PreActivated if wide else PostActivated
        blocks = [make(one, build) for stage in plan.stages_of(size) for one in stage]
        self.blocks = nnx.List(blocks)
        # small: at first all classes are equally likely
        small = nnx.initializers.normal(0.01)
        self.classifier = nnx.Linear(size.channels, classes, kernel_init=small, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = self.size.kind == "wide"
        x = self.stem(x.astype(self.size.dtype))
        if not wide:
            x = nnx.relu(self.norm(x))
        if self.size.kind == "bottleneck":
            x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for block in self.blocks:
            x = block(x)
        if wide:
            x = nnx.relu(self.norm(x))
        return self.classifier(x.astype(jnp.float32).mean((1, 2)))


class PostActivated(nnx.Module):
    """`relu(f(x) + shortcut(x))`, f convolutions, each normalised, with ReLU between them.

    He et al. 2016. Without a projection, the shortcut into another stage takes every second pixel
    and adds channels of zeros (their option A).
    """

    def __init__(self, block: Residual, build: "Builder") -> None:
        self.convs: nnx.List = nnx.List([build.conv(conv) for conv in block.convs])
        self.norms: nnx.List = nnx.List([build.norm(conv.m) for conv in block.convs])
        self.stride = max(conv.stride for conv in block.convs)
        self.projection: Any = nnx.data(None)
        self.projection_norm: Any = nnx.data(None)
        if block.projection is not None:
            self.projection = build.projection(block.projection)
            self.projection_norm = build.norm(block.projection.m)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(nnx.relu(y) if i else y))
        if self.projection is not None:
            return nnx.relu(y + self.projection_norm(self.projection(x)))
        x = x[:, :: self.stride, :: self.stride]
        more = y.shape[-1] - x.shape[-1]
        return nnx.relu(y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more))))

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(i, j) where nothing but normalisation j sees what convolution i gives."""
        return ((i, i) for i in range(len(self.convs)))


class PreActivated(nnx.Module):
    """`f(x) + shortcut(x)`, where each convolution of f comes after a normalisation and ReLU.

    He et al. 2016, "Identity Mappings in Deep Residual Networks", as Zagoruyko and Komodakis have
    it: a projection sees x normalised, too.
    """

    def __init__(self, block: Residual, build: "Builder") -> None:
        self.convs: nnx.List = nnx.List([build.conv(conv) for conv in block.convs])
        self.norms: nnx.List = nnx.List([build.norm(conv.k) for conv in block.convs])
        self.projection: Any = nnx.data(None)
        if block.projection is not None:
            self.projection = build.projection(block.projection)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norms[0](x))
        shortcut = x if self.projection is None else self.projection(y)
        y = self.convs[0](y)
        for conv, norm in list(zip(self.convs, self.norms, strict=True))[1:]:
            y = conv(nnx.relu(norm(y)))
        return y + shortcut

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(i, j) where nothing but normalisation j sees what convolution i gives."""
        return ((i, i + 1) for i in range(len(self.convs) - 1))


class Norm(nnx.BatchNorm):
    """`nnx.BatchNorm` in float32, whose result has the dtype of x."""

    def __call__(self, x: Any, *args: Any, **more: Any) -> jax.Array:
        return super().__call__(x.astype(jnp.float32), *args, **more).astype(x.dtype)


class Nothing(nnx.Module):
    """What is left of a normalisation that was folded."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class SampledConv(nnx.Module):
    """A dense convolution of which training computes a sample of the channels in.

    `bsjax.sampled_conv` after Adelman et al. 2018; exact after `eval()`.
    """

    def __init__(self, conv: Conv, size: Size, rngs: nnx.Rngs) -> None:
        self.strides, self.size, self.deterministic = conv.stride, size, False
        shape = (conv.window, conv.window, conv.k, conv.m)
        self.kernel = nnx.Param(HE(rngs.params(), shape, jnp.float32))
        self.rngs = rngs["sampling"].fork()

    def __call__(self, x: jax.Array) -> jax.Array:
        return bsjax.sampled_conv(
            x.astype(self.size.dtype),
            self.kernel[...].astype(self.size.dtype),
            key=None if self.deterministic else self.rngs(),
            fraction=self.size.fraction,
            block=self.size.sampled_block,
            strides=self.strides,
            padding=_border(self.kernel.shape[0]),
        )


class Builder:
    """Makes the layers of a network, with patterns and weights of one seed."""

    def __init__(self, size: Size, seed: int, rngs: nnx.Rngs) -> None:
        self.size, self.rngs, self.masks = size, rngs, plan.masks(size, seed)
        self.dtype = jnp.dtype(size.dtype)
        # products of float32 are in full float32, as in bsjax
        exact = jax.lax.Precision.HIGHEST
        self.precision = exact if self.dtype == jnp.float32 else None

    def norm(self, channels: int) -> Norm:
        return Norm(channels, momentum=0.9, epsilon=1e-5, dtype=jnp.float32, rngs=self.rngs)

    def dense(self, k: int, m: int, window: int, stride: int) -> nnx.Conv:
        return nnx.Conv(
            k,
            m,
            (window, window),
            stride,
            padding=_border(window),
            use_bias=False,
            kernel_init=HE,
            dtype=self.dtype,
            precision=self.precision,
            rngs=self.rngs,
        )

    def conv(self, conv: Conv) -> nnx.Module:
        """Block-sparse, sampled or dense."""
        if conv.stored is not None:
            return bsjax.nnx.BlockConv(
                conv.k,
                conv.m,
                (conv.window, conv.window),
                conv.stride,
                pattern=next(self.masks),
                block=conv.block,
                padding=_border(conv.window),
                use_bias=False,
                kernel_init=STORED_HE,
                dtype=self.dtype,
                rngs=self.rngs,
            )
        if self.size.fraction < 1:
            return SampledConv(conv, self.size, self.rngs)
        return self.projection(conv)

    def projection(self, conv: Conv) -> nnx.Conv:
        """Dense, whatever the others are."""
        return self.dense(conv.k, conv.m, conv.window, conv.stride)


def _border(window: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (window // 2, window // 2), (window // 2, window // 2)


def fold(model: ResNet) -> tuple[ResNet, int]:
    """A network for inference whose block-sparse convolutions do what the normalisations after them
    did (`bsjax.nnx.fold_batch_norm`), and how many of these are gone.

    In a network that normalises before each convolution only those within a block can go: the first
    of a block normalises a sum, and others follow from the same sum.
    """
    model = nnx.clone(model)
    model.eval()
    gone = 0
    for block in model.blocks:
        for i, j in block.pairs():
            if isinstance(block.convs[i], bsjax.nnx.BlockConv):
                block.convs[i] = bsjax.nnx.fold_batch_norm(block.convs[i], block.norms[j])
                block.norms[j] = Nothing()
                gone += 1
    return model, gone
