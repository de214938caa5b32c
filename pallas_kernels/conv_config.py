"""How the kernels of convolutions are launched."""

import dataclasses
from collections.abc import Mapping

from pallas_kernels.config import (
    ACCUMULATOR,
    ENOUGH,
    MULTIPROCESSORS,
    ROWS,
    SHARED_MEMORY,
    SLICE,
    STAGES,
    Config,
    for_matmul,
    staged,
)

# of an H200, in FLOP/s (measured) and bytes/s (assumed)
TENSOR_CORES, CACHE_BANDWIDTH = 7.9e14, 5.5e12


def for_conv(
    n: int,
    block: tuple[int, int],
    out_bytes: int,
    workers: int = MULTIPROCESSORS,
    *,
    strips: Mapping[int, tuple[float, int, int]] | None = None,
) -> Config:
    """For `n` images and blocks (channels in, channels out). Nothing was tuned.

    `strips` says which numbers of neighbours can share what they read, and for each the pixels that
    are computed over those that there are, the pixels that are read, and taps.
    """
    shared = [_strip(block, out_bytes, workers, k, *strip) for k, strip in (strips or {}).items()]
    if found := min((one for one in shared if one), default=None, key=lambda one: one[0]):
        return found[1]
    found = for_matmul(n, block, out_bytes, workers)
    found = dataclasses.replace(found, columns=1, cluster=1, workers=workers, split=False)
    return staged(found, block[1], out_bytes)


def _strip(
    block: tuple[int, int],
    out_bytes: int,
    workers: int,
    pixels: int,
    padding: float,
    reads: int,
    taps: int,
) -> tuple[float, Config] | None:
    """How long a product of so many neighbours takes by our model, and how it is launched."""
    width_in, width_out = block
    slots = pixels // 2 * max(1, width_out // SLICE)
    if pixels // 2 * ROWS * width_out > ACCUMULATOR:
        return None
    for depth in (64, 32, 16):
        step = 2 * depth * (ROWS * reads + width_out * taps)
        out = slots * 2 * ROWS * min(SLICE, width_out) * out_bytes
        stages = min(STAGES, (SHARED_MEMORY - out) // step)
        # as deep as the values are wide, at most: deeper strips are in no test that a GPU passed
        if width_in % depth == 0 and depth <= width_out and stages >= ENOUGH:
            break
    else:
        return None
    flops = 2 * depth * ROWS * width_out * pixels * taps
    cost = padding * max(1 / TENSOR_CORES, step / flops / CACHE_BANDWIDTH)
    return cost, Config(
        tile=pixels * ROWS,
        pixels=pixels,
        depth=depth,
        stages=stages,
        slots=slots,
        workers=workers,
        split=False,
    )
