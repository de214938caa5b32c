"""How a kernel is launched, and what runs at all: pure functions of sizes, without a GPU."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

SIDES = (16, 32, 64, 128, 256)
BLOCK = 128 * 256  # numbers in the largest block
SHARED_MEMORY = 232_448 - 4_096  # bytes of a Hopper multiprocessor, less what barriers take
ROWS = 64  # of a product of the tensor cores
ACCUMULATOR = 128 * 128  # float32 numbers that the registers of a warpgroup hold
SLICE = 64  # columns of an output tile that are staged at a time
CACHE = 24e6  # bytes that a Hopper GPU keeps of what all multiprocessors read: half of its L2
WINDOW = 0.3  # of a tile of x: programs walk it together
SLICES = 4096  # of a sampled axis: a list of them has to fit in shared memory
MULTIPROCESSORS = 132  # of an H200
MOST_STEPS = 2**31 - 1  # they are counted in int32
COLUMNS = (1, 2, 4)
DENSE = 0.4  # from here on a row of one block-column is often one of its neighbour
ENOUGH = 3  # stages: fewer are worse than waiting for a slot
STAGES = 8  # at most; what is best is for the tuner to find
# what was tuned stands for sizes near it
TOKENS = (64, 256, 1024, 8192)
DENSITIES = (0.03, 0.05, 0.1, 0.25, 0.5)
TABLE = Path(__file__).with_name("tuned.json")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Frozen, so that it is a static argument, a key of a table and a line of JSON."""

    tile: int = 256  # `matmul`: tokens of an output tile; `sddmm`: rows of stored blocks in one
    warpgroups: int = 2  # that multiply; one more loads
    columns: int = 1  # `matmul`: output blocks side by side that share what is read of x
    cluster: int = 1  # `matmul`: programs with other tokens that share what is read of the values
    pixels: int = 1  # `conv`: neighbours in an output tile that share what they read
    depth: int = 64  # features (`matmul`) or tokens (`sddmm`) of a step
    stages: int = 4  # steps in flight
    slots: int = 1  # slices of an output tile that are on their way out
    workers: int = MULTIPROCESSORS  # equal shares of the work, for a cluster of programs each
    split: bool = True  # may cut an output tile between workers, so that all end together


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """What a tuned configuration was measured for."""

    device: str  # as JAX names its kind
    operation: str  # "matmul", "matmul transposed" or "sddmm"
    dtype: str
    block: tuple[int, int]  # (features in, features out) of a product; stored blocks for "sddmm"
    tokens: int  # of TOKENS
    density: float  # of DENSITIES


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
    n: int,
    block: tuple[int, int],
    out_bytes: int,
    workers: int = MULTIPROCESSORS,
    *,
    density: float = 0,
    tuned: Key | None = None,
) -> Config:
    """For `n` tokens, blocks (features in, features out) and stored shares of them: as `tuned`, if
    the table has it."""
    width_in, width_out = block
    columns = _columns(n, width_out, density)
    tile, warpgroups = _tile(width_out * columns), 2
    if n <= ROWS:
        tile, warpgroups = ROWS, 1
    config = Config(
        tile=tile,
        columns=columns,
        warpgroups=warpgroups,
        depth=min(64, width_in),
        workers=workers,
    )
    if n > ROWS and _padding(n, config) > 1.25:
        config = dataclasses.replace(config, tile=2 * ROWS)
    pair = dataclasses.replace(config, cluster=2, workers=workers // 2)
    if width_out * columns >= 2 * ROWS and n > ROWS and _padding(n, pair) <= 1.1:
        config = pair
    return _looked_up(tuned, n, block, out_bytes, workers) or staged(config, width_out, out_bytes)


def _tile(width: int) -> int:
    """Tokens of an output tile, as many as two warpgroups hold sums for."""
    return 2 * max(ROWS, min(128, ACCUMULATOR // width))


def _columns(n: int, width: int, density: float) -> int:
    """Output blocks side by side: as many as make a tile of 64 columns, or of 128 where neighbours
    share many rows. Measured on an H100."""
    if n <= ROWS:
        return 1
    target = 2 * ROWS if density >= DENSE else ROWS
    return max(one for one in COLUMNS if one == 1 or one * width <= target)


def interleaved(tiles: int, groups: int, workers: int, x_bytes: int, value_bytes: int) -> int:
    """Into how many strands to cut the tiles of tokens (see `_workers.Order`): as few as leave what
    is under way in a cache, the values of the groups and what is about to be read of x."""

    def cached(strands: int) -> float:
        under_way = min(1, workers / (strands * groups))
        return value_bytes * under_way + WINDOW * strands * x_bytes / tiles

    every = [strands for strands in (1, 2, 4, 8, 16) if tiles % strands == 0]
    return next((one for one in every if cached(one) <= CACHE), min(every, key=cached))


def for_sddmm(
    block: tuple[int, int],
    out_bytes: int,
    workers: int = MULTIPROCESSORS,
    *,
    n: int = TOKENS[-1],
    tuned: Key | None = None,
) -> Config:
    """For stored blocks of that size and `n` tokens: as `tuned`, if the table has it."""
    height, width = block
    tile = max(height, _tile(width))
    config = Config(tile=tile, depth=64, workers=workers)
    return _looked_up(tuned, n, block, out_bytes, workers) or staged(config, width, out_bytes)


def staged(config: Config, width: int, out_bytes: int) -> Config:
    """`config` with a slot for every slice of the output, or as many as leave `ENOUGH` stages, and
    with as many stages as fit beside them: latency is hidden by what is in flight."""
    slots = width * config.columns // min(SLICE, width)
    while slots > 1 and _stages(config, width, out_bytes, slots) < ENOUGH:
        slots //= 2
    stages = min(STAGES, _stages(config, width, out_bytes, slots))
    return dataclasses.replace(config, stages=stages, slots=slots)


def _stages(config: Config, width: int, out_bytes: int, slots: int) -> int:
    """That fit beside the slots."""
    step = 2 * config.depth * (config.tile + width * config.columns)
    out = slots * config.tile * min(SLICE, width) * out_bytes
    return (SHARED_MEMORY - out) // step


def misfit(operation: str, config: Config, block: tuple[int, int], out_bytes: int) -> str | None:
    """Why a kernel cannot be launched so, or None."""
    rows, more = divmod(config.tile, config.warpgroups)
    if more or rows % ROWS:
        return f"{config.warpgroups} warpgroups cannot share {config.tile} rows by {ROWS}"
    width = block[1] * config.columns
    if rows * width > ACCUMULATOR:
        return f"{rows} x {width} sums do not fit in the registers of a warpgroup"
    if operation == "sddmm" and config.tile % block[0]:
        return f"{config.tile} rows are no whole blocks of {block[0]}"
    if operation == "sddmm" and block[0] >= ROWS and config.depth % ROWS:
        return f"steps of {config.depth} tokens: a product that transposes takes {ROWS} at a time"
    if operation != "sddmm" and block[0] % config.depth:
        return f"steps of {config.depth} features do not divide blocks of {block[0]}"
    most = _stages(config, block[1], out_bytes, config.slots)
    if not 2 <= config.stages <= most:
        return f"{config.stages} stages: shared memory holds 2 to {most}"
    return None


def candidates(
    operation: str,
    n: int,
    block: tuple[int, int],
    out_bytes: int,
    workers: int = MULTIPROCESSORS,
    *,
    density: float = 0,
) -> Iterator[Config]:
    """Configurations worth timing: the heuristic's first, then those one step away from it and
    each other."""
    if operation == "sddmm":
        heuristic = for_sddmm(block, out_bytes, workers)
    else:
        heuristic = for_matmul(n, block, out_bytes, workers, density=density)
    # 40 registers of a thread for loads and 232 for products leave no room for a third warpgroup
    shapes = [(2, 64), (2, 128), (1, 128), (1, 64), (2, 256), (1, 256)]
    tiles = [
        dataclasses.replace(heuristic, warpgroups=groups, tile=groups * rows)
        for groups, rows in shapes
    ]
    depths = [dataclasses.replace(heuristic, depth=depth) for depth in (128, 32)]
    tiles, depths = ([staged(one, block[1], out_bytes) for one in ones] for ones in (tiles, depths))
    fewer = [
        dataclasses.replace(heuristic, stages=stages)
        for stages in (2, 3, 4, 6)
        if stages < heuristic.stages
    ]
    whole = [dataclasses.replace(one, split=False) for one in (heuristic, *tiles[:2])]
    shared = [
        staged(
            dataclasses.replace(
                heuristic,
                columns=columns,
                cluster=cluster,
                tile=min(heuristic.tile, _tile(block[1] * columns)),
                workers=workers // cluster,
            ),
            block[1],
            out_bytes,
        )
        for cluster in (1, 2)
        for columns in COLUMNS
        if operation != "sddmm"
    ]
    least = min(_padding(n, one) for one in (heuristic, *tiles))
    for one in dict.fromkeys((heuristic, *shared, *tiles, *depths, *fewer, *whole)):
        wasteful = operation != "sddmm" and _padding(n, one) > max(1.25, least)
        if not wasteful and misfit(operation, one, block, out_bytes) is None:
            yield one


def key(
    device: str, operation: str, dtype: str, block: tuple[int, int], n: int, density: float
) -> Key:
    """Where the configuration of a product of that size stands in the table."""
    tokens = next((size for size in TOKENS if n <= size), TOKENS[-1])
    near = min(DENSITIES, key=lambda one: abs(math.log(one / max(density, 1e-9))))
    return Key(
        device=device, operation=operation, dtype=dtype, block=block, tokens=tokens, density=near
    )


def read(lines: Iterable[Mapping[str, Any]]) -> dict[Key, Config]:
    """The table: each line holds the fields of its `Key`, and those of a `Config` in "config".
    A line with other fields was written for other kernels, and is left out."""
    keys, fields = ({field.name for field in dataclasses.fields(kind)} for kind in (Key, Config))
    return {
        Key(**{name: line[name] for name in keys - {"block"}}, block=tuple(line["block"])): Config(
            **line["config"]
        )
        for line in lines
        if keys <= set(line) and set(line["config"]) <= fields
    }


@functools.cache
def table() -> dict[Key, Config]:
    """What ships: `python -m pallas_kernels.tune` writes it."""
    return read(json.loads(TABLE.read_text(encoding="utf-8")))


def _looked_up(
    tuned: Key | None, n: int, block: tuple[int, int], out_bytes: int, workers: int
) -> Config | None:
    found = tuned and table().get(tuned)
    if not tuned or not found:
        return None
    found = dataclasses.replace(found, workers=workers // found.cluster)
    most = _stages(found, block[1], out_bytes, found.slots)  # another output may leave less room
    found = dataclasses.replace(found, stages=min(found.stages, most))
    wasteful = tuned.operation != "sddmm" and n > ROWS and _padding(n, found) > 1.25
    return None if wasteful or misfit(tuned.operation, found, block, out_bytes) else found


def _padding(n: int, config: Config) -> float:
    """Rows of whole tiles over `n`."""
    rows = config.tile * config.cluster
    return -(-n // rows) * rows / max(1, n)
