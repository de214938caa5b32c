"""The sampled products that are measured, the most telling first; their floors, and what is wanted.

A floor is what nothing can be faster than: the FLOPs of the sample, or the bytes that go through
device memory, each over its ceiling; and what runs one after the other adds up. It knows neither
launches nor gaps, and a gather that a kernel does by itself is free.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks import _gpu_floor as floors
from benchmarks._gpu_floor import Ceilings, Work

POLICIES = ("forward", "backward", "weight")
# `layer` is what training runs: y, dx and dw, scores and sampling included. Of policy "forward":
# `sampler` is scores and sampling alone, and `gather` the copies of "xla".
PARTS = ("layer", "forward", "dx", "dw", "sampler", "gather")
FRACTIONS = (0.25, 0.5, 0.1)
SPEEDUP = {0.25: 3.0, 0.5: 1.7, 0.1: 6.0}  # on a GPU, wanted of blocks of 64 and 128
GPU_SIDE, CPU_SIDE = 8192, 2048
SLICE = 256  # tokens and features that scores are estimated from
WIDE = 256  # columns of a product that keep the tensor cores busy


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SampledCase:
    """A layer of n tokens and (k, m) features, and how it is sampled."""

    block: int
    fraction: float
    sampler: str = "systematic"
    policy: str = "forward"
    implementation: str = "mosaic"
    tokens: int = GPU_SIDE
    shape: tuple[int, int] = (GPU_SIDE, GPU_SIDE)
    dtype: str = "bfloat16"
    score_slice: int | None = None  # scores are estimated from so many neighbours

    @property
    def name(self) -> str:
        (k, m), how = self.shape, f"{self.policy} {self.sampler} {self.implementation}"
        how += f" slice {self.score_slice}" if self.score_slice else ""
        size = f"{self.tokens} tokens {k}x{m} {self.dtype}"
        return f"{size} block {self.block} {self.fraction:g} {how}"

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `sampled_matmul`."""
        names = ("block", "fraction", "sampler", "policy", "implementation", "score_slice")
        return {name: getattr(self, name) for name in names}

    @property
    def parts(self) -> tuple[str, ...]:
        """Those that can be timed by themselves."""
        if self.policy != "forward":
            return PARTS[:4]
        found = PARTS if self.implementation == "xla" else PARTS[:5]
        return tuple(one for one in found if one != "sampler" or not self.score_slice)

    def sampled(self, length: int) -> int:
        """How much of an axis is computed."""
        groups = math.ceil(length / self.block)
        return min(length, self.block * max(1, round(self.fraction * groups)))


def grid(
    policies: Sequence[str],
    samplers: Sequence[str],
    implementations: Sequence[str],
    fractions: Sequence[float],
    blocks: Sequence[int],
) -> Iterator[SampledCase]:
    """Everything combined with everything; what is named first varies slowest."""
    for policy, sampler, implementation, fraction, block in itertools.product(
        policies, samplers, implementations, fractions, blocks
    ):
        yield SampledCase(
            policy=policy,
            sampler=sampler,
            implementation=implementation,
            fraction=fraction,
            block=block,
        )


def on_gpu() -> list[SampledCase]:
    """Of groups of one, which no kernel reads, only what their copies cost."""
    forward, blocks, quarter = POLICIES[:1], (64, 128), FRACTIONS[:1]
    found = [*grid(forward, ("systematic",), ("mosaic",), FRACTIONS, blocks)]
    found.append(SampledCase(block=64, fraction=0.1, score_slice=SLICE))
    found.append(SampledCase(block=1, fraction=0.25, implementation="xla"))
    found += grid(forward, ("systematic",), ("xla",), FRACTIONS, blocks)
    found += grid(forward, ("uniform",), ("mosaic",), quarter, blocks)
    return [*found, *grid(forward, ("uniform",), ("xla",), quarter, blocks[:1])]


def on_cpu() -> list[SampledCase]:
    """All policies, in float32 and smaller."""
    found = grid(POLICIES, ("systematic",), ("xla",), FRACTIONS, (1, 64))
    return [resized(one, CPU_SIDE, "float32") for one in found]


def resized(case: SampledCase, side: int, dtype: str) -> SampledCase:
    return dataclasses.replace(case, tokens=side, shape=(side, side), dtype=dtype)


def predicted(case: SampledCase, part: str, ceilings: Ceilings) -> dict[str, Any]:
    """The floors of a part and of its dense counterpart in milliseconds, and `ideal`: the share of
    the dense product's FLOPs."""
    (k, m), n = case.shape, case.tokens
    works = _works(case)[part]
    least = [floors.floor(work, ceilings) for work in works]
    whole = [_product(case, n, k, m)] * (1 if part in PARTS[1:4] else 3)
    dense = sum(floors.floor(work, ceilings).seconds for work in whole)
    seconds = sum(one.seconds for one in least)
    return {
        "floor_ms": 1e3 * seconds,
        "floor_by": max(least, key=lambda one: one.seconds).by if seconds else None,
        "dense_floor_ms": 1e3 * dense,
        "floor_speedup": dense / seconds if seconds else None,
        "ideal": sum(work.flops for work in works) / sum(work.flops for work in whole),
        "ceilings": "measured" if ceilings.measured else "assumed",
    }


def _works(case: SampledCase) -> dict[str, list[Work]]:
    """What each part has to do, one after the other."""
    (k, m), n = case.shape, case.tokens

    def product(*sizes: int) -> Work:
        return _product(case, *sizes)

    def moved(*numbers: int) -> list[Work]:
        """Numbers that are read or written beside the operands and results of products."""
        return [_moved(case, sum(numbers))]

    def scored(*numbers: int) -> list[Work]:
        free = case.sampler == "uniform" or case.score_slice
        return [] if free else moved(*numbers)

    copies = case.implementation == "xla"
    tokens = case.sampled(n)
    if case.policy == "forward":
        s = case.sampled(k)
        sampler, gather = scored(n * k, k * m), moved(2 * n * s, 2 * s * m)
        forward = [*sampler, *(gather if copies else []), product(n, s, m)]
        # a kernel adds the zeros; copies read what the product wrote, and write everything
        dx = [product(n, m, s), *moved(n * (s + k if copies else k - s))]
        dw = [product(s, n, m), *moved(m * (s + k if copies else k - s))]
        alone = {"sampler": sampler or moved(0), "gather": gather}
        return {"layer": forward + dx + dw, "forward": forward, "dx": dx, "dw": dw} | alone
    forward, dw = [product(n, k, m)], [product(k, tokens, m)]
    if case.policy == "backward":
        s = case.sampled(m)
        dx = [*scored(n * m, k * m), *moved(2 * s * (n + k)), product(n, s, k)]
        dw = [*scored(n * k, n * m), *moved(2 * tokens * (k + m)), *dw]
        return {"layer": forward + dx + dw, "forward": forward, "dx": dx, "dw": dw}
    dx, kept = [product(n, m, k)], [*scored(n * k), *moved(2 * tokens * k)]
    dw = [*moved(2 * tokens * m), *dw]
    return {"layer": kept + forward + dx + dw, "forward": forward, "dx": dx, "dw": dw}


def _product(case: SampledCase, a: int, b: int, c: int) -> Work:
    """(a, b) times (b, c)."""
    moved = _moved(case, a * b + b * c + a * c).memory
    return Work(2.0 * a * b * c, WIDE, 0.0, moved)


def _moved(case: SampledCase, numbers: int) -> Work:
    size = 2 if "16" in case.dtype else np.dtype(case.dtype).itemsize
    return Work(0.0, WIDE, 0.0, float(size * numbers))


def goal(case: SampledCase, part: str) -> dict[str, float]:
    """What is wanted, by the name of a field and from which value on."""
    if part != "layer" or case.policy != "forward":
        return {}
    size = (case.tokens, case.shape, case.dtype, case.implementation)
    if size == (GPU_SIDE, (GPU_SIDE, GPU_SIDE), "bfloat16", "mosaic") and case.block in (64, 128):
        return {"speedup": SPEEDUP[case.fraction]} if case.fraction in SPEEDUP else {}
    if size == (CPU_SIDE, (CPU_SIDE, CPU_SIDE), "float32", "xla") and case.block in (1, 64):
        return {"speedup": 1.0} if case.fraction <= 0.5 else {}
    return {}


def forecast(case: SampledCase, ceilings: Ceilings) -> Iterator[str]:
    """For people: the floor of every part."""
    layer = predicted(case, "layer", ceilings)
    parts = ", ".join(
        f"{part} {predicted(case, part, ceilings)['floor_ms']:.4f}" for part in case.parts[1:]
    )
    wanted = ", ".join(f"{name} {value:g}" for name, value in goal(case, "layer").items())
    yield (
        f"layer floor {layer['floor_ms']:.4f} ms ({parts}), dense {layer['dense_floor_ms']:.4f}: "
        f"speed-up at most {layer['floor_speedup']:.2f}, {1 / layer['ideal']:.2f} by FLOPs; "
        f"goal: {wanted or 'none'}"
    )
