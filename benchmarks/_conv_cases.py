"""Which convolutions are measured: the layers of two networks, with batches for a CPU."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import bsjax
from benchmarks._cases import AUTO
from bsjax import patterns


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A convolution of square images with padding "SAME"."""

    network: str
    images: int
    side: int
    channels: tuple[int, int]
    window: int = 3
    strides: int = 1

    @property
    def name(self) -> str:
        k, m = self.channels
        size, stride = f"{self.window}x{self.window}", f"/{self.strides}" * (self.strides > 1)
        return f"{self.network} {size}{stride} {k}->{m} {self.images}x{self.side}x{self.side}"

    @property
    def side_out(self) -> int:
        return -(-self.side // self.strides)

    @property
    def flops(self) -> int:
        """Of the dense layer, forward."""
        k, m = self.channels
        return 2 * self.images * self.side_out**2 * self.window**2 * k * m


def _resnet(side: int, k: int, m: int, window: int = 3, strides: int = 1) -> Layer:
    return Layer(
        network="resnet50", images=8, side=side, channels=(k, m), window=window, strides=strides
    )


def _wrn(side: int, k: int, m: int, strides: int = 1) -> Layer:
    return Layer(network="wrn28-10", images=8, side=side, channels=(k, m), strides=strides)


# Every kind of layer of the residual stages, at 224 and at 32 pixels; the networks are trained with
# 256 and 128 images at a time. Their first convolution, of three channels, is dense.
LAYERS = (
    _resnet(56, 64, 64),
    _resnet(56, 64, 256, 1),
    _resnet(56, 256, 64, 1),
    _resnet(56, 128, 128, 3, 2),
    _resnet(56, 256, 512, 1, 2),
    _resnet(28, 128, 128),
    _resnet(28, 128, 512, 1),
    _resnet(28, 512, 128, 1),
    _resnet(28, 256, 256, 3, 2),
    _resnet(14, 256, 256),
    _resnet(14, 256, 1024, 1),
    _resnet(14, 1024, 256, 1),
    _resnet(14, 512, 512, 3, 2),
    _resnet(7, 512, 512),
    _resnet(7, 512, 2048, 1),
    _resnet(7, 2048, 512, 1),
    _wrn(32, 160, 160),
    _wrn(32, 160, 320, 2),
    _wrn(16, 320, 320),
    _wrn(16, 320, 640, 2),
    _wrn(8, 640, 640),
)
QUICK = (
    _resnet(56, 128, 128, 3, 2),
    _resnet(28, 128, 128),
    _resnet(7, 512, 512),
    _wrn(16, 320, 320),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A layer with a random pattern of square blocks of channels."""

    layer: Layer
    block: int
    density: float
    dtype: str
    implementations: tuple[str, ...]
    p: bsjax.BlockPattern = dataclasses.field(repr=False, compare=False)


def cases(
    layers: Sequence[Layer],
    blocks: Sequence[int],
    densities: Sequence[float],
    dtypes: Sequence[str],
    implementations: Sequence[str],
    seed: int,
) -> Iterator[Case]:
    """Everything combined, where blocks divide the channels and the pattern stores any."""
    for dtype, layer, block in itertools.product(dtypes, layers, blocks):
        k, m = layer.channels
        if k % block or m % block:
            continue
        for density in densities:
            mask = patterns.random((k // block, m // block), density, seed=seed)
            if mask.any():
                p = bsjax.BlockPattern.from_mask(mask, block)
                yield Case(
                    layer=layer,
                    block=block,
                    density=density,
                    dtype=dtype,
                    implementations=tuple(implementations),
                    p=p,
                )


def goal(case: Case, implementation: str) -> float | None:
    """The most that time over dense time should be, where the house has said so."""
    if implementation == "auto":
        return AUTO if case.p.density > SPARSE else 1.0
    return 1.0 if implementation == "xla" and case.p.density <= SPARSE else None


SPARSE = 0.25  # from here down stored blocks alone should be faster than the dense layer


def on_gpu() -> Iterator[Case]:
    """Two of the layers with as many images as they are trained with."""
    layers = _resnet(28, 128, 128), _resnet(14, 256, 256)
    layers = [dataclasses.replace(one, images=256) for one in layers]
    yield from cases(layers, (64,), (0.5, 0.25), ("bfloat16",), ("mosaic",), seed=0)
