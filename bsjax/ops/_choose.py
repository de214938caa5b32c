"""Which implementation runs: pure functions of shapes and dtypes, testable on any machine."""

import dataclasses
from typing import Any, Literal, get_args

from bsjax.ops import _mosaic

type Implementation = Literal["auto", "xla", "mosaic", "dense", "reference"]
IMPLEMENTATIONS = get_args(Implementation.__value__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """All that a choice may depend on. Static: known when Python traces."""

    op: str  # as the user called it, for messages
    n: int
    grid: tuple[int, int]
    block: tuple[int, int]
    capacity: int
    dtype: Any

    @property
    def density(self) -> float:
        return self.capacity / max(1, self.grid[0] * self.grid[1])


# The largest density at which stored blocks alone are faster than the dense product, by the shorter
# block side: measured by `python -m benchmarks.matmul` on CPUs, the worst of y, dx and dvalues.
CPU_BREAK_EVEN = {8: 0.12, 16: 0.3, 32: 0.42, 64: 0.5, 128: 0.6}


def break_even(block: tuple[int, int]) -> float:
    """The density from which on dense is the faster choice on a CPU."""
    side = max((s for s in CPU_BREAK_EVEN if s <= min(block)), default=min(CPU_BREAK_EVEN))
    return CPU_BREAK_EVEN[side]


def choose(problem: Problem, wanted: str) -> str:
    """The implementation to run. An explicit request is kept or refused, never replaced."""
    if wanted not in IMPLEMENTATIONS:
        names = ", ".join(f'"{name}"' for name in IMPLEMENTATIONS)
        raise ValueError(f"{problem.op}: `implementation` must be one of {names}, got {wanted!r}.")
    if wanted == "mosaic" and (reason := _mosaic.why_not(problem)):
        raise ValueError(
            f'{problem.op}: implementation="mosaic" cannot run here: {reason}. '
            'Use implementation="auto", which takes the fastest that can.'
        )
    if wanted != "auto":
        return wanted
    return "dense" if problem.density > break_even(problem.block) else "xla"
