"""How long things take beside each other: interleaved, in pairs, with their spread.

The clock is the wall, dispatch included, and it stops when the result is there. That is what a user
waits for; where one call takes microseconds on an accelerator, use a profiler's clock instead and
say so in the record.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

FEWEST, MOST = 5, 25  # rounds, where the budget chooses


class Spread(NamedTuple):
    """A median with its quartiles."""

    median: float
    low: float
    high: float


def spread(samples: Any) -> Spread:
    """The median of `samples`, and the quartiles on either side."""
    return Spread(*(float(q) for q in np.percentile(samples, [50, 25, 75])))


def quartiles(series: Mapping[str, Any]) -> dict[str, float]:
    """For a record: the median of each under its name, and its quartiles as `_low` and `_high`."""
    found: dict[str, float] = {}
    for name, samples in series.items():
        found[name], found[f"{name}_low"], found[f"{name}_high"] = spread(samples)
    return found


def beside(ours: np.ndarray, dense: np.ndarray) -> dict[str, Any]:
    """For a record: what the seconds of interleaved pairs of runs say."""
    series = {"ms": 1e3 * ours, "dense_ms": 1e3 * dense, "ratio": ours / dense}
    return {"rounds": len(ours)} | quartiles(series)


def race(
    runs: Mapping[str, Callable[[int], Any]], *, budget: float = 1.0, rounds: int | None = None
) -> dict[str, np.ndarray]:
    """Seconds that each run takes in each round, `budget` seconds for all of them together.

    In a round everything runs once, so `times[a][i] / times[b][i]` compares two runs on the same
    machine in the same mood; `spread` of these quotients is the number to report. Who goes first
    rotates, because the caches belong to the last one. `run(i)` gets the number of the round and
    should take other inputs in each. A round of warm-up comes first and is thrown away.
    """
    names = list(runs)
    warm_up = sum(seconds(runs[name], 0) for name in names)
    if rounds is None:
        rounds = int(np.clip(budget / warm_up, FEWEST, MOST))
    times = {name: np.empty(rounds) for name in names}
    for i in range(rounds):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            times[name][i] = seconds(runs[name], i)
    return times


def clocked(
    runs: Mapping[str, Callable[[int], Any]], *, budget: float = 1.0, rounds: int | None = None
) -> tuple[str, dict[str, np.ndarray]]:
    """`race`, by the clock of the device, and what a record calls that: on a GPU calls that are
    queued back to back ("wall"), or the sum of their kernels' times where calls are short
    ("kernels", see `_gpu_clock`); as many samples of each run."""
    if jax.default_backend() == "cpu":
        return "wall", race(runs, budget=budget, rounds=rounds)
    from benchmarks import _gpu_clock as gpu

    times = gpu.measured(runs, rounds=rounds or gpu.ROUNDS)
    fewest = min(len(one.seconds) for one in times.values())
    clock = next(iter(times.values())).clock  # that of all
    return clock, {name: one.seconds[:fewest] for name, one in times.items()}


def seconds(run: Callable[[int], Any], i: int) -> float:
    """The time of one call, until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(run(i))
    return time.perf_counter() - start
