"""How the attention kernels are launched, and what runs at all: pure functions of sizes."""

import dataclasses
import math

from pallas_kernels.config import MULTIPROCESSORS, ROWS, SHARED_MEMORY, SLICE

HEADS = (32, 64, 96, 128, 192, 256)  # sizes
SIDE = 64  # blocks have a multiple of it, of queries and of keys
STAGES = 8  # at most
# What registers hold: smaller than medium, sums and two whole steps; larger than large, sums and
# half a step, or those of one of dk and dv; the largest, a quarter.
MEDIUM, LARGE, LARGEST = 96, 128, HEADS[-1]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Frozen, so that it is a static argument.

    A tile has `ROWS` tokens for each warpgroup that multiplies, of one head or of `heads` that
    share keys, values and list. With `split` two warpgroups have the same tokens, and one sums dv,
    the other dk.
    """

    warpgroups: int = 2  # that multiply, beside one that loads
    heads: int = 1
    split: bool = False
    step: int = 128  # tokens of the other side that are loaded and multiplied at a time
    stages: int = 2  # steps in flight
    slots: int = 1  # slices of an output tile that are on their way out
    workers: int = MULTIPROCESSORS

    @property
    def rows(self) -> int:
        """Tokens of a tile."""
        return self.warpgroups * ROWS // (self.heads * (1 + self.split))


def why_not(dtype: str, head: int, block: tuple[int, int]) -> str | None:
    """The reason why no kernel can attend with heads of that size and blocks (queries, keys)."""
    if dtype not in ("bfloat16", "float16"):
        return (
            f"there is no kernel for {dtype} (the tensor cores would round it to 11 bits): "
            "cast q, k and v to bfloat16 or float16"
        )
    if head not in HEADS:
        return f"heads of {head}: kernels know sizes of {', '.join(map(str, HEADS))}"
    if block[0] % SIDE or block[1] % SIDE:
        return f"blocks of {block[0]} x {block[1]}: each side must be a multiple of {SIDE}"
    return None


def for_forward(
    head: int, block: tuple[int, int], *, shared: int = 1, workers: int = MULTIPROCESSORS
) -> Config:
    """For heads of that size and blocks (queries, keys), where `shared` query heads have the same
    keys, values and list."""
    config = _tiled(block[0], shared, workers)
    step = 128 if head <= LARGE and block[1] % 128 == 0 else 64
    return _staged(dataclasses.replace(config, step=step), head, tiles=1)


def for_dq(
    head: int,
    block: tuple[int, int],
    *,
    shared: int = 1,
    everywhere: bool = False,
    apart: bool = False,
    workers: int = MULTIPROCESSORS,
) -> Config:
    """The same for dq, which has q and dy in its tiles. `everywhere` and
    `apart` are as scores have it: there is a bias or a dropout; numbers by slot and a softcap."""
    config = _tiled(block[0], shared, workers)
    step = 128 if head < MEDIUM and block[1] % 128 == 0 else 64
    if head == LARGEST or (everywhere and head > LARGE) or (apart and head == LARGE):
        step = 32
    return _staged(dataclasses.replace(config, step=step), head, tiles=2)


def for_dkv(
    head: int, block: tuple[int, int], *, crowded: bool = False, workers: int = MULTIPROCESSORS
) -> Config:
    """The same for dk and dv, whose tiles are keys and whose steps are queries. If `crowded`,
    scores take more registers than a mask of indices does."""
    config = _tiled(block[1], 1, workers)
    if head > LARGE:
        config = dataclasses.replace(config, warpgroups=2, split=True)
    step = 32 if head == LARGEST or (crowded and head == LARGE) else 64
    return _staged(dataclasses.replace(config, step=step), head, tiles=2)


def _tiled(side: int, shared: int, workers: int) -> Config:
    """Two warpgroups, if a block has the rows for them or there are heads that share."""
    if side % (2 * ROWS) == 0:
        return Config(warpgroups=2, workers=workers)
    if shared % 2 == 0:
        return Config(warpgroups=2, heads=2, workers=workers)
    return Config(warpgroups=1, workers=workers)


def _staged(config: Config, head: int, tiles: int) -> Config:
    """With a slot for every slice of the output, or as many as leave two stages, and as many
    stages as fit beside `tiles` that stay and the slots."""
    columns = math.gcd(SLICE, head)
    slots = head // columns
    while slots > 1 and _stages(config, head, tiles, slots) < 2:
        slots -= 1
    stages = min(STAGES, _stages(config, head, tiles, slots))
    return dataclasses.replace(config, stages=stages, slots=slots)


def _stages(config: Config, head: int, tiles: int, slots: int) -> int:
    """That fit beside the rest."""
    rows = config.warpgroups * ROWS
    resident = 2 * tiles * rows * head // (1 + config.split)
    out = rows * (2 * slots * math.gcd(SLICE, head) + 4)
    return (SHARED_MEMORY - resident - out) // (4 * config.step * (head + 2))
