"""What the kernels of the gradients of attention share."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ring, _tiles
from pallas_kernels._place import Place, Spot
from pallas_kernels.config import ROWS


def weights(
    at: Place,
    own: Array,
    log2: Array,
    spot: Spot | None,
    partial: bool,
    dtype: Any,
    apart: bool = False,
) -> tuple[Array, Array, Any]:
    """Of a tile of products: rounded, without those that are dropped; all, those negative; and the
    slope of its scores, by which they are multiplied already unless it is wanted `apart`."""
    scores = at.spec
    own = scores.of(own)
    slope = scores.slope(own)
    if spot is not None:
        own = at.scores(own, spot, partial)
    weights = jnp.exp2(own * scores.factor - log2)
    if scores.dropout is not None:
        weights = at.dropped(weights, spot, jnp.negative)
        rounded = lax.max(weights, jnp.zeros_like(weights)).astype(dtype)
    else:
        rounded = weights.astype(dtype)
    return (rounded, weights, slope) if apart else (rounded, weights * slope, None)


def put(numbers: Array, memory: Any, out: Any) -> None:
    """Starts writing one for each row."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    memory[...] = numbers
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(memory, out)


def scoped(
    load: Any,
    multiply: Any,
    walk: _tiles.Walk,
    like: Any,
    numbers: bool,
    sums_of_rows: bool = False,
) -> None:
    """With two tiles that stay and two that come and go, perhaps with a number for each token; and
    memory for slices on their way out, and perhaps for a number for each row."""
    config, d, dtype = walk.config, like.shape[3], like.dtype
    streams: Any = [_tiles.memory(config, config.step, d, dtype, config.stages)] * 2
    if numbers:
        shape = (config.stages, config.step)
        streams = [(one, plgpu.SMEM(shape, jnp.float32)) for one in streams]
    many, out = config.warpgroups, _tiles.staging(config, d, dtype)
    if sums_of_rows:
        out = (out, plgpu.SMEM((many, ROWS), jnp.float32))
    pl.run_scoped(
        lambda *scratch: _ring.roles(
            many, lambda: load(*scratch), lambda: multiply(*scratch), _tiles.REGISTERS
        ),
        *[_tiles.memory(config, ROWS, d, dtype, walk.parts)] * 2,
        *streams,
        out,
        (plgpu.Barrier(num_arrivals=2 * walk.parts), plgpu.Barrier(num_arrivals=many)),
        [_ring.ring(config.stages, many, 1 + numbers) for _ in range(2)],
        collective_axes="warpgroup",
    )
