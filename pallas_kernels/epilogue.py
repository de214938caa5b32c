"""What happens to the sums of an output tile before they are rounded and written, once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Replicated, Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ring
from pallas_kernels.config import ACCUMULATOR, ROWS, SLICE


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + jnp.exp(-x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: jnp.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + jnp.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))),
    "silu": lambda x: x * _sigmoid(x),
    "tanh": jnp.tanh,
    "sigmoid": _sigmoid,
}


def _gelu_slope(x: Array) -> Array:
    x = jnp.clip(x, -16, 16)  # beyond it is 0 or 1, and powers of x overflow
    t = jnp.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
    return 0.5 * (1 + t) + 0.3989422804014327 * x * (1 - t * t) * (1 + 0.134145 * x * x)


def _silu_slope(x: Array) -> Array:
    s = _sigmoid(x)
    return s * (1 + x * (1 - s))


# derivatives, finite at every finite x
SLOPES: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: jnp.where(x > 0, 1.0, 0.0),
    "gelu": _gelu_slope,
    "silu": _silu_slope,
    "tanh": lambda x: 1 - jnp.tanh(x) ** 2,
    "sigmoid": lambda x: _sigmoid(x) * (1 - _sigmoid(x)),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Epilogue:
    """`y = activation(sums + bias) + residual`; with `keep`, `sums + bias` is a second output.

    With `gated`, output blocks are pairs side by side, and
    `y = activation(left) * right + residual` has half the columns.

    With `slope`, the name of an activation, the sums are the gradient of what that returned, and
    `y = sums * slope'(z)` is the gradient of its argument z, an operand in the place of the
    residual. If it was `gated`, z and y are pairs, with twice the columns of the sums:
    `y = (sums * slope'(left) * right, sums * slope(left))`. With `total`, what every 64 tokens add
    to the sum of y over tokens is a second output, in float32 (the gradient of a bias).
    """

    activation: str | None = None
    gated: bool = False
    bias: bool = False
    residual: bool = False
    keep: bool = False
    slope: str | None = None
    total: bool = False

    @property
    def operands(self) -> int:
        """How many arrays it reads beside the sums."""
        return self.bias + self.residual + (self.slope is not None)

    def outs(self, n: int, columns: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of `n` tokens and so many columns of sums."""
        kept = jax.ShapeDtypeStruct((n, columns), dtype)
        if self.slope is not None:
            columns *= 1 + self.gated
            total = jax.ShapeDtypeStruct((n // ROWS, columns), jnp.float32)
            return (jax.ShapeDtypeStruct((n, columns), dtype), *[total] * self.total)
        y = jax.ShapeDtypeStruct((n, columns // (1 + self.gated)), dtype)
        return (y, *[kept] * self.keep)

    def scratch(
        self,
        rows: int,
        width: int,
        dtype: Any,
        warpgroups: int,
        blocks: int = 1,
        slots: int = 1,
    ) -> tuple[Any, Any]:
        """Shared memory for so many slices of a tile of `blocks`, and barriers for what is read
        into it."""
        pairs = self.gated and self.slope is None  # of blocks of sums
        columns = min(SLICE, width // (1 + pairs))
        room = slots * min(SLICE, width)
        computes = self.activation is not None or self.slope is not None
        if computes and rows // warpgroups * width * blocks >= ACCUMULATOR:
            columns = min(SLICE // 2, columns)  # few registers are left for what it computes
        staging = _ring.swizzled((room // columns, rows, columns), columns, dtype)
        return staging, plgpu.Barrier(num_barriers=warpgroups)

    def write(
        self,
        sums: Array,
        row: Any,
        block: Any,
        outs: tuple[Any, ...],
        operands: tuple[Any, ...],
        staging: _ring.Slots,
        barrier: Any,
        biased: Any = None,
    ) -> None:
        """Writes the rows of an output block from there on, a slice at a time.

        `outs` are y and, with `keep`, what goes into the activation, or `total`; `operands` are
        bias `[1, m]` and residual, as far as there are any, or z. If output blocks share a bias,
        `biased` is the one whose bias this has.
        """
        if self.slope is not None:
            act, slope = ACTIVATIONS[self.slope], SLOPES[self.slope]
            self._write_slope(act, slope, sums, row, block, outs, operands, staging, barrier)
            return
        rows, width = staging.shape
        rows, half = pl.ds(row, rows), sums.shape[1] // (1 + self.gated)

        def before(first: int) -> Array:
            part, columns = sums[:, first : first + width], block * sums.shape[1] + first
            if self.bias:
                place = (block if biased is None else biased) * sums.shape[1] + first
                own = plgpu.load(
                    operands[0].at[0, pl.ds(place, width)],
                    layout=plgpu.Layout.WGMMA.reduce(0),
                    optimized=False,
                )
                part = part + lax.broadcast_in_dim(own.astype(part.dtype), part.shape, (1,))
            if self.keep:
                _stage(part, staging, outs[1].at[rows, pl.ds(columns, width)])
            return part

        for first in range(0, half, width):
            part = before(first)
            if self.activation is not None:
                part = ACTIVATIONS[self.activation](part)
            if self.gated:
                part = part * before(half + first)
            here = (rows, pl.ds(block * half + first, width))
            if self.residual:
                part = part + _read(operands[-1].at[here], staging, barrier)
            _stage(part, staging, outs[0].at[here])

    def _write_slope(self, act, slope, sums, row, block, outs, operands, staging, barrier) -> None:
        (rows, width), side = staging.shape, sums.shape[1]

        def here(first: int) -> tuple[Any, Any]:
            start = block * side * (1 + self.gated) + first
            return pl.ds(row, rows), pl.ds(start, width)

        def read(first: int) -> Array:
            return _read(operands[0].at[here(first)], staging, barrier)

        def put(part: Array, first: int) -> None:
            tokens, columns = here(first)
            slot = _stage(part, staging, outs[0].at[tokens, columns])
            if self.total:
                for start in range(0, rows, ROWS):
                    own = plgpu.load(
                        slot.at[pl.ds(start, ROWS)], layout=_columns(width), optimized=False
                    )
                    total = jnp.sum(own.astype(jnp.float32), axis=0)
                    _store(outs[1].at[lax.div(row + start, ROWS), columns], total)
                plgpu.commit_smem()  # what was read may be overwritten

        for first in range(0, side, width):
            part, z = sums[:, first : first + width], read(first)
            if self.gated:
                put(part * act(z), side + first)
                put(part * slope(z) * read(side + first), first)
            else:
                put(part * slope(z), first)


def _columns(width: int) -> Any:
    """Where a warp holds eight columns of a matrix whole, so that a sum over rows needs no other:
    what JAX reserves for sums across warps is shared by all warpgroups of a program."""
    warps = min(4, width // 8)
    return plgpu.Layout.TILED(
        Tiling(((8, 8 * warps), (8,), (2,))),
        warp_dims=(-3,) if warps == 4 else (-3, Replicated(4 // warps)),
        lane_dims=(-4, -2),
        vector_dim=-1,
    )


def _read(operand: Any, staging: _ring.Slots, barrier: Any) -> Array:
    slot = staging.next()
    plgpu.copy_gmem_to_smem(operand, slot, barrier)
    plgpu.barrier_wait(barrier)
    return slot[...].astype(jnp.float32)


def _store(out: Any, numbers: Array) -> None:
    """To global memory, fewer than a cache line at a time, which newer JAX wants to be told."""
    if hasattr(plgpu, "store"):
        plgpu.store(out, numbers, optimized=False)
    else:
        out[...] = numbers


def _stage(part: Array, staging: _ring.Slots, out: Any) -> Any:
    return staging.put(part, lambda slot: plgpu.copy_smem_to_gmem(slot, out))
