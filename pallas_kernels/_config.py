"""How a kernel is launched: the numbers that tuning chooses, and what they take of a machine."""

import dataclasses

SHARED_MEMORY = 232_448 - 2_048  # bytes of a Hopper multiprocessor, less what barriers take


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Frozen, so that it is a static argument, a key of a table and a line of JSON."""

    tile: int = 256  # `matmul`: tokens of an output tile; `sddmm`: rows of stored blocks in one
    warpgroups: int = 2  # that multiply; one more loads
    depth: int = 64  # features (`matmul`) or tokens (`sddmm`) of a step
    stages: int = 4  # steps in flight
    workers: int = 132  # programs on the grid: one for every multiprocessor
    split: bool = True  # may cut an output tile between workers, so that all end together


def staged(config: Config, step: int, out: int) -> Config | None:
    """`config` with as many stages of `step` bytes as fit beside `out` bytes, or None."""
    stages = min(config.stages, (SHARED_MEMORY - out) // step)
    return dataclasses.replace(config, stages=stages) if stages >= 2 else None
