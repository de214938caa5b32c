"""Which implementation runs: pure functions of shapes and dtypes, testable on any machine."""

import dataclasses
from typing import Any, Literal, NoReturn, get_args

from bsjax.ops import _mosaic

type Implementation = Literal["auto", "xla", "mosaic", "dense", "reference"]
IMPLEMENTATIONS = get_args(Implementation.__value__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """All that a choice may depend on. Static: known when Python traces."""

    op: str  # as called, for messages; a key of `CPU_BREAK_EVEN` for a choice
    n: int
    grid: tuple[int, int]
    block: tuple[int, int]
    capacity: int
    dtype: Any
    taps: int = 1  # of a convolution; then n is the number of its windows
    pixels: int = 1  # of an image, of the larger that goes in or comes out
    images: Any = None  # of a convolution, which kernels take for tokens

    @property
    def density(self) -> float:
        return self.capacity / max(1, self.grid[0] * self.grid[1])


# The density at which the product over stored blocks costs what the dense product costs, at many
# tokens on a CPU, by the shorter block side: measured by `python -m benchmarks.matmul`, and for
# convolutions and their dvalues ("taps") by `python -m benchmarks.conv`, in the least apt layer.
CPU_BREAK_EVEN = {
    "matmul": {8: 0.12, 16: 0.3, 32: 0.42, 64: 0.6, 128: 0.7},
    "sddmm": {8: 0.12, 16: 0.3, 32: 0.42, 64: 0.5, 128: 0.6},
    "conv": {8: 0.12, 16: 0.28, 32: 0.4, 64: 0.6, 128: 0.7},
    "taps": {8: 0.15, 16: 0.3, 32: 0.45, 64: 0.65, 128: 0.8},
}
# The same of the kernels on a Hopper GPU, in 16 bits: `python -m benchmarks.gpu` on an H100, with
# 8192 tokens. Products below `GPU_FLOPS` were not measured and run dense, as do short blocks.
GPU_BREAK_EVEN = {
    "matmul": {32: 0.15, 64: 0.45, 128: 0.6},
    "sddmm": {64: 0.33, 128: 0.6},
}
GPU_FLOPS = 2e11
# Making the dense matrix costs as much as multiplying this many tokens by it.
TODENSE_TOKENS = {"matmul": 64, "sddmm": 0, "conv": 64, "taps": 0}
# Narrow weights do little with each number of x and y, which the loops turn around first: so many
# FLOPs of the dense product a number, beyond what the tables hold for 2048 x 2048. Measured with
# 1x1 convolutions of 64 to 1024 channels, `python -m benchmarks.conv`.
TURN_FLOPS, TABLE_SIDE = {"matmul": 80, "sddmm": 0, "conv": 0, "taps": 0}, 2048
# A turn of a loop over block-columns costs as much as so much work of the dense product.
LOOP_FLOPS = 1.5e6


def check(wanted: str, problem: Problem) -> None:
    """An explicit request is kept or refused, never replaced."""
    if wanted not in IMPLEMENTATIONS:
        names = ", ".join(f'"{name}"' for name in IMPLEMENTATIONS)
        raise ValueError(f"{problem.op}: `implementation` must be one of {names}, got {wanted!r}.")
    if wanted == "mosaic" and (reason := _mosaic.why_not(problem)):
        refuse(problem.op, wanted, reason)


def refuse(op: str, implementation: str, reason: str) -> NoReturn:
    """Says why an explicit request cannot be kept."""
    raise ValueError(
        f'{op}: implementation="{implementation}" cannot run here: {reason}. '
        'Use implementation="auto", which takes the fastest that can.'
    )


def fastest(problem: Problem, platform: str) -> str:
    """What `auto` runs on a platform: "cpu", "cuda" (with kernels that can run) or another.

    Loops over stored blocks were measured on CPUs only; elsewhere the dense product is what is
    known not to be slow.
    """
    (r, c), (br, bc) = problem.grid, problem.block
    flops = max(1, 2 * problem.n * problem.taps * r * br * c * bc)
    if platform == "cuda":
        table = GPU_BREAK_EVEN.get(problem.op, {})  # kernels of convolutions: not measured
        side = max((s for s in table if s <= min(problem.block)), default=0)
        worth = flops >= GPU_FLOPS and problem.density <= table.get(side, 0)
        return "mosaic" if worth else "dense"
    if platform != "cpu":
        return "dense"
    table = CPU_BREAK_EVEN[problem.op]
    side = max((s for s in table if s <= min(problem.block)), default=min(table))
    # times over that of the product with a stored dense weight
    stored = problem.density / table[side] + LOOP_FLOPS * max(r, c) / flops
    narrow = 1 / max(1, r * br) + 1 / max(1, c * bc) - 2 / TABLE_SIDE
    stored += TURN_FLOPS[problem.op] * max(0, narrow)
    dense = 1 + TODENSE_TOKENS[problem.op] / max(1, problem.n)
    return "dense" if stored > dense else "xla"
