"""Which clock, and how long things take beside each other on a GPU.

The wall over calls that are queued back to back counts everything that a program makes the GPU do
and wait for. The host queues a call in some ten microseconds; where a call takes so little itself,
the sum of its kernels' times counts instead (CUPTI), and gaps between kernels are left out. Every
record says which; those of products hold both where both are known.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import _gpu_kernels as kernels

ROUNDS, ROUND = 9, 0.008  # of calls queued back to back, and the seconds of one
MOST = 400  # calls in a round
SESSIONS, PROFILED = 3, 20  # of the profiler, where it is the clock, and calls in one


class Times(NamedTuple):
    """Seconds of a call, one for each round."""

    clock: str  # "wall" or "kernels"
    seconds: np.ndarray
    wall: np.ndarray
    kernels: np.ndarray | None
    why_no_kernels: str | None = None


def measured(
    runs: Mapping[str, Callable[[int], Any]],
    *,
    rounds: int = ROUNDS,
    round_seconds: float = ROUND,
) -> dict[str, Times]:
    """In each round every run is queued as often as `round_seconds` allow; who goes first rotates.
    `run(i)` should take other inputs for another `i`. The clock is the same for all of them."""
    calls = {name: _calls(run, round_seconds) for name, run in runs.items()}
    names = list(runs)
    wall = {name: np.empty(rounds) for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            wall[name][i] = kernels.queued_seconds(runs[name], calls[name])
    short = min(np.median(one) for one in wall.values()) < kernels.QUEUED
    profiled: dict[str, list[float]] = {name: [] for name in names}
    fails: str | None = None
    for name in names * (SESSIONS if short else 1):
        found = kernels.device_seconds(runs[name], min(calls[name], PROFILED))
        if isinstance(found, str):
            fails = found
            break
        profiled[name] += found
    by_kernels = short and fails is None
    return {
        name: Times(
            "kernels" if by_kernels else "wall",
            np.array(profiled[name]) if by_kernels else wall[name],
            wall[name],
            np.array(profiled[name]) if fails is None else None,
            fails,
        )
        for name in names
    }


def _calls(run: Callable[[int], Any], seconds: float) -> int:
    jax.block_until_ready(run(0))  # what the first call does once
    kernels.queued_seconds(run, 2)
    return int(np.clip(round(seconds / kernels.queued_seconds(run, 3)), 2, MOST))
