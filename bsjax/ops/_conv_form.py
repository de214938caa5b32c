"""The geometry of a convolution, and its three products as one call of `lax` each.

    target[n, q, o] = sum_t source[n, strides q + dilation t - low, i] w[t, i, o]

for all windows q and taps t; pixels outside the source are zeros. This is linear in both, so the
same geometry has two more products, which are convolutions again.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bsjax.ops import _validate as validate
from bsjax.pattern._validate import size

PADDINGS = ("SAME", "VALID", "SAME_LOWER")
type Padding = Any  # a name of PADDINGS, a number, or a number or a pair for each axis
type Sizes = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """Axes of space of the source, which taps read, and of the target, which has a pixel for each
    place of the window; `low` zeros are before the first pixel of the source."""

    source: Sizes
    target: Sizes
    window: Sizes
    strides: Sizes
    dilation: Sizes
    low: Sizes

    @property
    def extent(self) -> Sizes:
        """How far a window reaches."""
        return tuple((w - 1) * d + 1 for w, d in zip(self.window, self.dilation, strict=True))

    @property
    def high(self) -> Sizes:
        """Zeros behind the last pixel of the source; negative where last pixels are not read."""
        axes = zip(self.target, self.strides, self.extent, self.source, self.low, strict=True)
        return tuple((q - 1) * s + extent - p - low for q, s, extent, p, low in axes)

    @property
    def is_pointwise(self) -> bool:
        """Whether there is a single tap: then the convolution is a product of pixels."""
        return math.prod(self.window) == 1

    def space(self, transpose: bool) -> tuple[Sizes, Sizes]:
        """Axes of space of what goes in and of what comes out."""
        return (self.target, self.source) if transpose else (self.source, self.target)

    @property
    def reads_some(self) -> bool:
        """Whether a single tap reads other pixels than all of the source, each once."""
        return self.source != self.target or any((*self.low, *self.high))

    def read(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The pixels that a single tap reads of `x[..., *source, i]`: `[..., *target, i]`."""
        lead = x.ndim - len(self.source) - 1
        edges = zip(self.source, self.low, self.high, strict=True)
        config = [(low, max(high, -p - low), 0) for p, low, high in edges]
        config = [*[(0, 0, 0)] * lead, *config, (0, 0, 0)]
        x = lax.pad(x, jnp.zeros((), x.dtype), config)
        return x[..., *(slice(None, None, s) for s in self.strides), :]

    def conv(
        self, x: Float[Array, "n ..."], w: Float[Array, "..."], **options: Any
    ) -> Float[Array, "n ..."]:
        """The target of `x[n, *source, i]` and `w[*window, i, o]`."""
        x, padding = self._cropped(x, self.strides)
        return _conv(x, w, self.strides, padding, rhs_dilation=self.dilation, **options)

    def back(
        self, y: Float[Array, "n ..."], w: Float[Array, "..."], **options: Any
    ) -> Float[Array, "n ..."]:
        """The transpose of `conv`: what `y[n, *target, i]` sends to the source, with taps
        `w[*window, i, o]` in reverse."""
        padding = [
            (extent - 1 - a, extent - 1 - b)
            for extent, a, b in zip(self.extent, self.low, self.high, strict=True)
        ]
        ones = (1,) * len(self.window)
        dilations = {"lhs_dilation": self.strides, "rhs_dilation": self.dilation}
        return _conv(y, w, ones, padding, **dilations, **options)

    def taps(
        self, x: Float[Array, "i ..."], y: Float[Array, "..."], **options: Any
    ) -> Float[Array, "i ..."]:
        """`[i, *window, o]`: the sum over n and windows of source times target, `x[i, *source, n]`
        times `y[*target, n, o]`."""
        x, padding = self._cropped(x, (1,) * len(self.window))
        return _conv(x, y, self.dilation, padding, rhs_dilation=self.strides, **options)

    def _cropped(
        self, x: Float[Array, "n ..."], least: Sizes
    ) -> tuple[Array, list[tuple[int, int]]]:
        """A source without pixels at its ends that no tap reads (which convolutions by so few
        pixels that they do not count may keep), and padding for the rest."""
        keep = [
            slice(max(0, -low), p + high if high <= -step else p)
            for p, low, high, step in zip(self.source, self.low, self.high, least, strict=True)
        ]
        padding = [(max(0, a), max(0, b)) for a, b in zip(self.low, self.high, strict=True)]
        return x[:, *keep], padding


def _conv(x: Array, w: Array, strides: Any, padding: Any, **options: Any) -> Array:
    """`lax.conv_general_dilated` of `x[n, *space, i]` with `w[*window, i, o]`."""
    axes = "DHW"[-(x.ndim - 2) :]
    numbers = f"N{axes}C", f"{axes}IO", f"N{axes}C"
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers, **options)


def forward(space: Sizes, window: Sizes, strides: Sizes, padding: Any, dilation: Sizes) -> Form:
    """Of a convolution that reads `space`, with `padding` from `pads`."""
    low, target = [], []
    for axis, (p, w, s, d) in enumerate(zip(space, window, strides, dilation, strict=True)):
        extent = (w - 1) * d + 1
        if padding in ("SAME", "SAME_LOWER"):
            q = -(-p // s)
            total = max(0, (q - 1) * s + extent - p)
            before = total - total // 2 if padding == "SAME_LOWER" else total // 2
        else:
            before, after = (0, 0) if padding == "VALID" else padding[axis]
            q = max(0, (p + before + after - extent) // s + 1)
        low.append(before)
        target.append(q)
    return Form(space, tuple(target), window, strides, dilation, tuple(low))


def transposed(space: Sizes, window: Sizes, strides: Sizes, padding: Any, dilation: Sizes) -> Form:
    """Of the transpose of a convolution, which reads `space`: with the sizes and the meaning of
    padding that `jax.lax.conv_transpose` has."""
    low, source = [], []
    for axis, (q, w, s, d) in enumerate(zip(space, window, strides, dilation, strict=True)):
        extent = (w - 1) * d + 1
        if padding == "SAME":
            p, before = q * s, max(0, extent - s) // 2
        elif padding == "VALID":
            p, before = q * s + max(0, extent - s), 0
        else:
            a, b = padding[axis]
            p, before = max(0, (q - 1) * s + 1 + a + b - (extent - 1)), extent - 1 - a
        low.append(before)
        source.append(p)
    return Form(tuple(source), space, window, strides, dilation, tuple(low))


def each(op: str, name: str, value: Any, axes: int) -> Sizes:
    """A number for each axis of space."""
    several = value if isinstance(value, tuple | list) else (value,) * axes
    if len(several) != axes:
        raise ValueError(
            f"{op}: `{name}` must be one number, or one for each of {axes} axes of space, got "
            f"{value!r}."
        )
    return tuple(size(op, name, one, least=1) for one in several)


def pads(
    op: str, value: Any, axes: int, names: tuple[str, ...] = PADDINGS
) -> str | tuple[tuple[int, int], ...]:
    """One of some names, or a pair for each axis of space."""
    if isinstance(value, str):
        validate.one_of(op, "padding", value, names)
        return value
    several = value if isinstance(value, tuple | list) else (value,) * axes
    pairs = [one if isinstance(one, tuple | list) else (one, one) for one in several]
    if len(pairs) != axes or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"{op}: `padding` must be a name, a number, or for each of {axes} axes of space a "
            f"number or a pair (before, after), got {value!r}."
        )
    return tuple((size(op, "padding", a), size(op, "padding", b)) for a, b in pairs)
