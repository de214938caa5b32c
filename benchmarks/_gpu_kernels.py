"""What the benchmarks know of the kernels: their configurations, their tuner and its clock."""

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks._gpu_cases import GpuCase, mask
from pallas_kernels import _clock, config, tune
from pallas_kernels.tune import PROBLEMS, Problem

__all__ = ["PROBLEMS", "Problem", "chosen", "device_seconds", "keep_table", "tuner", "wrong"]

OPERATIONS = {"forward": "matmul", "dx": "matmul transposed", "dvalues": "sddmm"}
QUEUED, kernel_seconds, queued_seconds = _clock.QUEUED, _clock.kernel_seconds, _clock.queued_seconds
said, wrong, WRONG = _clock.said, _clock.wrong, _clock.WRONG


def chosen(product: str, case: GpuCase, device: str = "", seed: int = 0) -> dict[str, Any]:
    """How the kernel of a product is launched."""
    stored = int(mask(case, seed).sum())
    sizes = case.sizes(product, stored).block
    density = stored / math.prod(case.grid)
    tuned = config.key(device, OPERATIONS[product], case.dtype, sizes, case.tokens, density)
    if product == "dvalues":
        found = config.for_sddmm(sizes, 2, n=case.tokens, tuned=tuned)
    else:
        options = {"density": density, "tuned": tuned}
        found = config.for_matmul(case.tokens, sizes, 2, **options)
    fields = dataclasses.asdict(found)
    del fields["workers"]  # the device's
    return fields


def tuner(problem: Problem, table: Path = config.TABLE) -> Iterator[dict[str, Any]]:
    """A record for each configuration of a product, the fastest first."""
    for _, measured in tune.run([problem], table, 60, again=True):
        right = {one: s for one, s in measured.items() if not isinstance(s, str)}
        order = [*sorted(right.items(), key=lambda one: one[1])]
        order += [(one, s) for one, s in measured.items() if isinstance(s, str)]
        heuristic = next(iter(measured))
        for one, seconds in order:
            failed = seconds if isinstance(seconds, str) else None
            yield {
                "benchmark": "tune",
                **dataclasses.asdict(problem),
                "config": dataclasses.asdict(one),
                "heuristic": one == heuristic,
                "us": None if isinstance(seconds, str) else 1e6 * seconds,
                "skipped": failed,
            }


def keep_table(where: Path) -> None:
    """A copy of the tuned table, beside the results."""
    shutil.copy(config.TABLE, where)


type Run = Callable[[int], Any]


def device_seconds(run: Run, calls: int) -> list[float] | str:
    """Kernels' seconds of each of so many calls, or why there are none."""
    kernels = kernel_seconds(lambda: [run(i) for i in range(calls)])
    if isinstance(kernels, str):
        return kernels
    if len(kernels) % calls:
        return f"{len(kernels)} kernels in {calls} calls"
    each = len(kernels) // calls
    return [sum(kernels[i * each : (i + 1) * each]) for i in range(calls)]
