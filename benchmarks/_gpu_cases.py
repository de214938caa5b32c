"""The products that are measured on a GPU, the most telling first, and what is wanted of them."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

import bsjax
from benchmarks import _gpu_floor as floors
from benchmarks._cases import nearest
from benchmarks._gpu_floor import Ceilings, Sizes
from bsjax import patterns

PRODUCTS = ("forward", "dx", "dvalues")
KIND = {"kind 2": 2, "kind 4": 4}  # neighbouring block-columns that store the same rows
TWIN = "balanced"  # a pattern of as many stored blocks as a hub pattern, beside it

# Wanted, by block: the FLOP/s of stored blocks over those of the dense product, at each density.
DENSITIES = (0.05, 0.1, 0.25, 0.5)
EFFICIENCY = {
    128: (0.65, 0.68, 0.75, 0.85),
    64: (0.38, 0.42, 0.55, 0.70),
    32: (0.27, 0.36, 0.45, 0.45),
    16: (0.18, 0.22, 0.25, 0.25),
}
DVALUES = {128: 0.60, 64: 0.42, 32: 0.30, 16: 0.15}
WIDE = 0.85  # 64 x 256 blocks, and 64 x 64 in groups of four, from a density of 0.1 up
SPEEDUP = {32: 10.0, 64: 15.0}  # over the dense product, with few tokens
HUB = 1.15  # time of a hub pattern over that of a balanced one
OF_FLOOR = 0.8  # the floor over the time, always


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GpuCase:
    """A block-sparse weight and a number of tokens."""

    block: tuple[int, int]
    density: float
    tokens: int = 8192
    shape: tuple[int, int] = (8192, 8192)
    pattern: str = "random"  # or "hub", or one of KIND
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        (br, bc), (k, m) = self.block, self.shape
        size = f"{self.tokens} tokens {k}x{m} {br}x{bc} {self.density:g}"
        kind = "" if (self.pattern, self.dtype) == ("random", "bfloat16") else f" {self.pattern}"
        return size + kind + ("" if self.dtype == "bfloat16" else f" {self.dtype}")

    @property
    def grid(self) -> tuple[int, int]:
        return self.shape[0] // self.block[0], self.shape[1] // self.block[1]

    @property
    def few(self) -> bool:
        return self.tokens <= 256

    def sizes(self, product: str, stored: int) -> Sizes:
        """As the kernel of a product sees them."""
        (k, m), (br, bc) = self.shape, self.block
        if product == "dx":
            return Sizes(self.tokens, (m, k), (bc, br), stored)
        return Sizes(self.tokens, (k, m), (br, bc), stored)


@functools.lru_cache(maxsize=4)
def mask(case: GpuCase, seed: int = 0) -> np.ndarray:
    """The stored blocks."""
    if case.pattern == "hub":
        found = nearest("barabasi_albert", case.grid, case.density, seed)
        if found is None:
            raise ValueError(f"{case.name}: no Barabasi-Albert graph has such a density")
        return found
    if case.pattern in KIND:
        group = (1, KIND[case.pattern])
        return patterns.grouped(case.grid, case.density, group=group, seed=seed)
    return patterns.random(case.grid, case.density, seed=seed)


def twin(case: GpuCase, seed: int = 0) -> bsjax.BlockPattern:
    """As many stored blocks as the case has, as many in each block-column as in any other."""
    r, c = case.grid
    stored = int(mask(case, seed).sum())
    rng = np.random.default_rng(seed + 1)
    counts = stored // c + (np.arange(c) < stored % c)
    rows = np.argsort(rng.random((r, c)), axis=0)
    even = np.zeros((r, c), bool)
    np.put_along_axis(even, rows, np.arange(r)[:, None] < counts, axis=0)
    return bsjax.BlockPattern.from_mask(even, case.block)


def _cases() -> tuple[list[GpuCase], list[GpuCase]]:
    """The most telling, and the rest."""

    def square(*sides: int, densities: tuple[float, ...]) -> list[GpuCase]:
        return [
            GpuCase(block=(side, side), density=density) for density in densities for side in sides
        ]

    few = [
        GpuCase(block=(side, side), density=0.03, tokens=64, shape=(12288, 12288))
        for side in (32, 64)
    ]
    wide = [GpuCase(block=(64, 256), density=density) for density in (0.1, 0.25, 0.5, 0.05)]
    hubs = [GpuCase(block=(side, side), density=0.1, pattern="hub") for side in (64, 128)]
    twos, fours = (
        [GpuCase(block=(64, 64), density=density, pattern=kind) for density in (0.1, 0.5, 0.25)]
        for kind in KIND
    )
    first = square(64, 128, densities=(0.1, 0.5)) + few + fours[:2]
    first += square(64, 128, densities=(0.25, 0.05))
    rest = fours[2:] + twos
    rest += square(32, densities=(0.1, 0.5)) + hubs[:1] + wide[:1] + square(16, densities=(0.1,))
    rest += wide[1:] + square(32, densities=(0.25, 0.05)) + hubs[1:]
    rest += square(16, densities=(0.5, 0.25, 0.05))
    rest += [GpuCase(block=(64, 64), density=0.1, dtype="float16")]
    return first, rest


FIRST, REST = _cases()


def predicted(
    case: GpuCase, product: str, config: Mapping[str, Any], ceilings: Ceilings, seed: int = 0
) -> dict[str, Any]:
    """The floors, in milliseconds: of the best ways to share, of a kernel launched as `config`
    says, and of the dense product; the FLOP/s that follow, over the dense product's."""
    stored = mask(case, seed)
    stored = stored.T if product == "dx" else stored
    sizes = case.sizes(product, int(stored.sum()))
    least = floors.best(product, sizes, stored, ceilings)
    shares = (config[name] for name in ("tile", "columns", "cluster"))
    ours = floors.floor(floors.launched(product, sizes, stored, *shares), ceilings)
    dense = floors.floor(floors.dense(case.tokens, case.shape), ceilings)
    return {
        "floor_ms": 1e3 * least.seconds,
        "floor_by": least.by,
        "tile_floor_ms": 1e3 * ours.seconds,
        "tile_floor_by": ours.by,
        "dense_floor_ms": 1e3 * dense.seconds,
        "floor_efficiency": float(stored.mean()) * dense.seconds / least.seconds,
        "ceilings": "measured" if ceilings.measured else "assumed",
    }


def goal(case: GpuCase, product: str) -> dict[str, float]:
    """What is wanted: by the name of a field, and from which value on (`over_twin`: up to it)."""
    wanted = {"of_floor": OF_FLOOR}
    if case.pattern == "hub":
        return wanted | {"over_twin": HUB}
    side = case.block[0]
    if case.few:
        known = product == "forward" and side in SPEEDUP
        return wanted | ({"speedup": SPEEDUP[side]} if known else {})
    if case.dtype != "bfloat16" or case.density not in DENSITIES:
        return wanted
    at = DENSITIES.index(case.density)
    wide = case.block != (side, side)
    if (wide or case.pattern == "kind 4") and product == "forward" and case.density >= 0.1:
        return wanted | {"efficiency": WIDE}  # what dx writes side by side shares nothing
    if wide:
        return wanted
    efficiency = DVALUES[side] if product == "dvalues" else EFFICIENCY[side][at]
    return wanted | {"efficiency": efficiency}


def met(wanted: Mapping[str, float], record: Mapping[str, Any]) -> dict[str, bool]:
    """Which of the goals a record reaches, of those it has a number for."""
    return {
        name: record[name] <= value if name == "over_twin" else record[name] >= value
        for name, value in wanted.items()
        if record.get(name) is not None
    }
