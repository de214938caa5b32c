"""What happens to the sums of an output tile before they are rounded and written, once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ring
from pallas_kernels.config import ACCUMULATOR, SLICE


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + jnp.exp(-x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: jnp.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + jnp.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))),
    "silu": lambda x: x * _sigmoid(x),
    "tanh": jnp.tanh,
    "sigmoid": _sigmoid,
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Epilogue:
    """`y = activation(sums + bias) + residual`; with `keep`, `sums + bias` is a second output.

    With `gated`, output blocks are pairs side by side, and
    `y = activation(left) * right + residual` has half the columns.
    """

    activation: str | None = None
    gated: bool = False
    bias: bool = False
    residual: bool = False
    keep: bool = False

    def outs(self, n: int, columns: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of `n` tokens and so many columns of sums."""
        y = jax.ShapeDtypeStruct((n, columns // (1 + self.gated)), dtype)
        return (y, jax.ShapeDtypeStruct((n, columns), dtype)) if self.keep else (y,)

    def scratch(
        self, rows: int, width: int, dtype: Any, warpgroups: int, blocks: int = 1
    ) -> tuple[Any, Any]:
        """Shared memory for a slice of a tile of so many blocks, and barriers for what is read into
        it."""
        columns = min(SLICE, width // (1 + self.gated))
        if self.activation is not None and rows // warpgroups * width * blocks >= ACCUMULATOR:
            columns = min(SLICE // 2, columns)  # few registers are left for what it computes
        staging = _ring.swizzled((rows, columns), columns, dtype)
        return staging, plgpu.Barrier(num_barriers=warpgroups)

    def write(
        self,
        sums: Array,
        row: Any,
        block: Any,
        outs: tuple[Any, ...],
        operands: tuple[Any, ...],
        staging: Any,
        barrier: Any,
    ) -> None:
        """Writes the rows of an output block from there on, a slice at a time.

        `outs` are y and, with `keep`, what goes into the activation; `operands` are bias `[1, m]`
        and residual, as far as there are any.
        """
        rows, width = staging.shape
        rows, half = pl.ds(row, rows), sums.shape[1] // (1 + self.gated)

        def before(first: int) -> Array:
            part, columns = sums[:, first : first + width], block * sums.shape[1] + first
            if self.bias:
                own = plgpu.load(
                    operands[0].at[0, pl.ds(columns, width)],
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
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.copy_gmem_to_smem(operands[-1].at[here], staging, barrier)
                plgpu.barrier_wait(barrier)
                part = part + staging[...].astype(part.dtype)
            _stage(part, staging, outs[0].at[here])


def _stage(part: Array, staging: Any, out: Any) -> None:
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staging[...] = part.astype(staging.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, out)
