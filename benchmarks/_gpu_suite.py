"""Measures a case on a GPU: its three products beside the dense product, in the same process.

A wrong kernel has no speed: each result is compared with the reference in float32 first.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bsjax
from benchmarks import _gpu_cases as gpu_cases
from benchmarks import _gpu_kernels as kernels
from benchmarks import _products as products
from benchmarks._gpu_cases import PRODUCTS, TWIN, GpuCase
from benchmarks._gpu_clock import Times, measured
from benchmarks._gpu_floor import Ceilings
from benchmarks._products import DENSE, Inputs, Programs, Record, Runner
from benchmarks._sampled_cases import SampledCase
from benchmarks._timing import quartiles

MOSAIC = "mosaic"


def draws(case: GpuCase | SampledCase, seed: int) -> list[Inputs]:
    """Standard normal x, dy and dense weight, drawn on the device; several, to rotate through more
    than the cache holds."""
    (k, m), n = case.shape, case.tokens
    size = 2 * (n * k + n * m + k * m)
    return _draws((k, m), n, case.dtype, seed, int(np.clip(-(-products.CACHE // size), 2, 8)))


@functools.lru_cache(maxsize=1)
def _draws(shape: tuple[int, int], n: int, dtype: str, seed: int, count: int) -> list[Inputs]:
    (k, m), keys = shape, iter(jax.random.split(jax.random.key(seed), 3 * count))
    sizes = ((n, k), (n, m), (k, m))
    return [
        Inputs(*(jax.random.normal(next(keys), size, dtype) for size in sizes))
        for _ in range(count)
    ]


def arguments(case: GpuCase, p: bsjax.BlockPattern, inputs: list[Inputs], seed: int) -> list[Any]:
    """x, dy, values and the pattern, with as many draws of values as rotate."""
    size = 2 * p.nnz * p.block[0] * p.block[1]
    count = int(np.clip(-(-products.CACHE // size), 2, 16)) if case.few else len(inputs)
    keys = jax.random.split(jax.random.key(seed + 1), count)
    values = [jax.random.normal(key, (p.capacity, *p.block), case.dtype) for key in keys]
    return [
        (inputs[i % len(inputs)].x, inputs[i % len(inputs)].dy, one, p)
        for i, one in enumerate(values)
    ]


def measure(
    case: GpuCase,
    programs: Programs,
    ceilings: Ceilings,
    *,
    implementation: str = MOSAIC,
    seed: int = 0,
    clock: Callable[..., dict[str, Times]] = measured,
) -> Iterator[Record]:
    """A record for each product."""
    p = bsjax.BlockPattern.from_mask(gpu_cases.mask(case, seed), case.block)
    inputs = draws(case, seed)
    sparse = arguments(case, p, inputs, seed)
    jobs = {
        (product, implementation): (
            functools.partial(products.SPARSE[product], implementation=implementation),
            sparse[0],
        )
        for product in PRODUCTS
    }
    jobs |= {(product, DENSE): (products.FULL[product], inputs[0]) for product in PRODUCTS}
    compiled, broken = compile_each(programs, jobs)
    want = wanted(programs, *sparse[0])
    twins: list[Any] = []
    if case.pattern == "hub":
        twins = arguments(case, gpu_cases.twin(case, seed), inputs, seed)
    for product in PRODUCTS:
        common = describe(case, p, product, implementation) | predicted(case, product, ceilings)
        if fails := broken.get((product, implementation)):
            yield common | {"refused": fails}
            continue
        got = compiled[product, implementation](*sparse[0])
        if refused := kernels.wrong(got, want[product]):
            yield common | {"refused": refused}
            continue
        # stricter: what explains rounding once from float32
        most = _terms(case, p, product)
        differs = products.differs(got, want[product], case.dtype, most)
        del got
        runs = {
            implementation: Runner(compiled[product, implementation], sparse),
            DENSE: Runner(compiled[product, DENSE], inputs),
        }
        if twins:
            runs[TWIN] = Runner(compiled[product, implementation], twins)
        record = common | {"differs": differs, **timing(clock(runs), implementation, p.density)}
        record["of_floor"] = record["floor_ms"] / record["ms"]
        record["of_tile_floor"] = record["tile_floor_ms"] / record["ms"]
        goal = gpu_cases.goal(case, product)
        yield record | {"goal": goal, "met": gpu_cases.met(goal, record)}


def wanted(programs: Programs, x: Any, dy: Any, values: Any, p: Any) -> dict[str, jax.Array]:
    """The products of the reference, in float32 from the same numbers."""
    x, dy, values = (a.astype(jnp.float32) for a in (x, dy, values))
    return products.reference(programs, x, dy, values, p)


def compile_each(
    programs: Programs, jobs: Mapping[Any, tuple[Callable, tuple[Any, ...]]]
) -> tuple[dict[Any, Any], dict[Any, str]]:
    """What compiles, together; and of the others why not, each by itself."""
    try:
        return programs.compile(jobs), {}
    except Exception:  # one of them: find out which, and keep the rest
        compiled, broken = {}, {}
        for name, one in jobs.items():
            try:
                compiled |= programs.compile({name: one})
            except Exception as error:
                broken[name] = kernels.said(error)
        return compiled, broken


def predicted(case: GpuCase, product: str, ceilings: Ceilings, seed: int = 0) -> Record:
    """How a kernel would be launched, and the floors."""
    device = jax.devices()[0].device_kind
    config = kernels.chosen(product, case, device, seed)
    floors = gpu_cases.predicted(case, product, config, ceilings, seed)
    return {"config": config} | floors


def describe(case: GpuCase, p: bsjax.BlockPattern, product: str, implementation: str) -> Record:
    """What a record is about, in the words of `benchmarks.matmul`."""
    return {
        "benchmark": "matmul gpu",
        "case": case.name,
        "product": product,
        "shape": list(case.shape),
        "tokens": case.tokens,
        "dtype": case.dtype,
        "pattern": case.pattern,
        "block": list(case.block),
        "density": round(p.density, 6),
        "density_asked": case.density,
        "stored_blocks": p.nnz,
        "implementation": implementation,
        "peer": False,
        "refused": None,
        "skipped": None,
    }


def timing(times: Mapping[str, Times], name: str, density: float) -> Record:
    """Medians and quartiles of a run and of the dense product, and what follows from them:
    `ratio` is time over dense time, `efficiency` the FLOP/s of stored blocks over the dense's."""
    ours, dense = times[name], times[DENSE]
    series = {
        "ms": 1e3 * ours.seconds,
        "dense_ms": 1e3 * dense.seconds,
        "ratio": _quotients(ours.seconds, dense.seconds),
        "wall_ms": 1e3 * ours.wall,
        "dense_wall_ms": 1e3 * dense.wall,
    }
    if ours.kernels is not None and dense.kernels is not None:
        series |= {"kernels_ms": 1e3 * ours.kernels, "dense_kernels_ms": 1e3 * dense.kernels}
    if TWIN in times:
        series["over_twin"] = _quotients(ours.seconds, times[TWIN].seconds)
    record: Record = {"clock": ours.clock, "rounds": len(ours.seconds)} | quartiles(series)
    return record | {
        "efficiency": density / record["ratio"],
        "speedup": 1 / record["ratio"],
        "no_kernels": ours.why_no_kernels,
    }


def _quotients(ours: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of the same round where there are as many; else each over the median of the others."""
    return ours / (others if len(ours) == len(others) else np.median(others))


def _terms(case: GpuCase, p: bsjax.BlockPattern, product: str) -> int:
    stored, (br, bc) = np.asarray(p.mask()), p.block
    most = {
        "forward": br * stored.sum(0).max(initial=0),
        "dx": bc * stored.sum(1).max(initial=0),
        "dvalues": case.tokens,
    }
    return max(1, int(most[product]))


def lines(records: list[Record]) -> Iterator[str]:
    """For people: a line for each product."""
    for one in records:
        start = f"{one['case']:40} {one['product']:8} "
        if one["refused"]:
            yield f"{start} REFUSED: {one['refused']}"
            continue
        goals = ", ".join(
            f"{name} {one[name]:.2f} of {value:g} {'met' if one['met'][name] else 'MISSED'}"
            for name, value in one["goal"].items()
            if name in one["met"]
        )
        yield (
            f"{start} {one['ms']:8.4f} ms ({one['clock']}), dense {one['dense_ms']:.4f}, "
            f"efficiency {one['efficiency']:.2f}, speed-up {one['speedup']:.2f}; {goals}"
            + (f"; {one['differs']}" if one["differs"] else "")
        )
