"""How a kernel is launched, and what runs at all: pure functions of sizes, without a GPU."""

import dataclasses

SIDES = (16, 32, 64, 128, 256)
BLOCK = 128 * 256  # numbers in the largest block
SHARED_MEMORY = 232_448 - 4_096  # bytes of a Hopper multiprocessor, less what barriers take
ROWS = 64  # of a product of the tensor cores
ACCUMULATOR = 128 * 128  # float32 numbers that the registers of a warpgroup hold
SLICE = 64  # columns of an output tile that are staged at a time
MULTIPROCESSORS = 132  # of an H100 and an H200
MOST_STEPS = 2**31 - 1  # they are counted in int32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Frozen, so that it is a static argument, a key of a table and a line of JSON."""

    tile: int = 256  # `matmul`: tokens of an output tile; `sddmm`: rows of stored blocks in one
    warpgroups: int = 2  # that multiply; one more loads
    depth: int = 64  # features (`matmul`) or tokens (`sddmm`) of a step
    stages: int = 4  # steps in flight
    workers: int = MULTIPROCESSORS  # programs on the grid
    split: bool = True  # may cut an output tile between workers, so that all end together


def why_not(dtype: str, block: tuple[int, int]) -> str | None:
    """The reason why no kernel can multiply such blocks, or None."""
    if dtype not in ("bfloat16", "float16"):
        return (
            f"there is no kernel for {dtype} (the tensor cores would round it to 11 bits): "
            "cast x and the values to bfloat16 or float16"
        )
    sides = ", ".join(map(str, SIDES))
    if not set(block) <= set(SIDES):
        return f"blocks of {block[0]} x {block[1]}: each side must be one of {sides}"
    if block[0] * block[1] > BLOCK:
        return f"blocks of {block[0]} x {block[1]} do not fit in registers (at most {BLOCK} values)"
    return None


def for_matmul(
    n: int, block: tuple[int, int], out_bytes: int, workers: int = MULTIPROCESSORS
) -> Config:
    """For `n` tokens and blocks (features in, features out)."""
    width_in, width_out = block
    tile, warpgroups = 2 * max(ROWS, min(128, ACCUMULATOR // width_out)), 2
    if -(-n // tile) * tile > 1.25 * n:  # mostly padding
        tile = 2 * ROWS
    if n <= ROWS:
        tile, warpgroups = ROWS, 1
    depth = min(64, width_in)
    step = 2 * depth * (tile + width_out)
    config = Config(tile=tile, warpgroups=warpgroups, depth=depth, workers=workers)
    return _staged(config, step, tile * min(SLICE, width_out) * out_bytes)


def for_sddmm(block: tuple[int, int], out_bytes: int, workers: int = MULTIPROCESSORS) -> Config:
    """For stored blocks of that size."""
    height, width = block
    tile = max(height, 2 * max(ROWS, min(128, ACCUMULATOR // width)))
    config = Config(tile=tile, depth=64, workers=workers)
    step = 2 * config.depth * (tile + width)
    return _staged(config, step, tile * min(SLICE, width) * out_bytes)


def _staged(config: Config, step: int, out: int) -> Config:
    """`config` with as many stages of `step` bytes as fit beside `out` bytes: latency is hidden by
    what is in flight, and more than eight did not gain in dense kernels."""
    return dataclasses.replace(config, stages=min(8, (SHARED_MEMORY - out) // step))
