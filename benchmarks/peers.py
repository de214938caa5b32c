"""`python -m benchmarks.peers`: what else multiplies block-sparse weights on a GPU, on our cases.

PyTorch's BSR, stanford-stk, cuSPARSE through CuPy and jax.experimental.sparse, as far as they are
installed; what is missing or fails is skipped, and the record says why. The weights are stored in
both orientations for nothing, and the fastest of the forms that a package offers counts. The
denominator is the package's own dense product, in the same process.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bsjax
from benchmarks import _gpu_cases as gpu_cases
from benchmarks import _gpu_kernels as kernels
from benchmarks import _gpu_suite as suite
from benchmarks import _products as products
from benchmarks._gpu_cases import PRODUCTS, GpuCase
from benchmarks._gpu_peers import PEERS, Forms, Problem
from benchmarks._products import Programs, Record
from benchmarks._record import JsonLines, environment
from benchmarks._timing import beside

CASES = [
    GpuCase(block=(side, side), density=density)
    for side, density in ((64, 0.1), (128, 0.1), (32, 0.1), (128, 0.5))
]
LIMIT = 1.0  # seconds of a product: what takes longer is not timed again
ROUNDS, ROUND = 7, 0.03


@functools.lru_cache(maxsize=1)
def _problem(case: GpuCase, programs: Programs, seed: int) -> tuple[Problem, dict[str, np.ndarray]]:
    """The inputs of a case, and the products of the reference."""
    p = bsjax.BlockPattern.from_mask(gpu_cases.mask(case, seed), case.block)
    inputs = suite.draws(case, seed)
    x, dy, values, _ = suite.arguments(case, p, inputs, seed)[0]
    want = suite.wanted(programs, x, dy, values, p)
    x, dy, w, values = (np.asarray(a.astype(jnp.float32)) for a in (*inputs[0], values))
    host = {name: np.asarray(a) for name, a in want.items()}
    return Problem(x, dy, w, values, p, case.dtype), host


def measure(
    peer: str,
    case: GpuCase,
    programs: Programs,
    *,
    seed: int = 0,
    forms_of: Callable[[Problem], Forms] | None = None,
) -> Iterator[Record]:
    """A record for each product; `skipped` says why there is no time in it."""
    problem, want = _problem(case, programs, seed)
    try:
        forms = (forms_of or PEERS[peer])(problem)
    except Exception as error:  # not installed, too old, no such block: all of it is a reason
        forms = kernels.said(error)
    for product in PRODUCTS:
        record = suite.describe(case, problem.p, product, peer)
        record |= {"benchmark": "peers gpu", "peer": True, "program": None, "clock": "wall"}
        if isinstance(forms, str):
            yield record | {"skipped": forms}
            continue
        right = want[product]
        if product == "dvalues":  # others store their blocks by rows
            right = right[problem.by_rows()]
        best, reasons = fastest(forms, product, right)
        if best is None:
            yield record | {"skipped": "; ".join(reasons) or "it has no such product"}
            continue
        runs = {peer: forms.sparse[product][best], products.DENSE: forms.dense[product]}
        times = race(runs, forms.wait)
        record |= {"program": best, "reasons": reasons} | beside(times[peer], times[products.DENSE])
        yield record | {"efficiency": problem.p.density / record["ratio"]}


def fastest(forms: Forms, product: str, want: np.ndarray) -> tuple[str | None, list[str]]:
    """The fastest form that is right, and why others are none."""
    times, reasons = timed(
        forms.sparse.get(product, {}),
        lambda got: relative(forms.host(got), want),
        lambda form: seconds(form, 1, forms.wait),
    )
    for name in [name for name, one in times.items() if one > LIMIT]:
        reasons.append(f"{name}: {times.pop(name):.1f} s, the limit is {LIMIT:g}")
    return min(times, key=lambda name: times[name], default=None), reasons


def timed[T](
    forms: Mapping[str, Callable[[], Any]],
    wrong: Callable[[Any], str | None],
    clock: Callable[[Callable[[], Any]], T],
) -> tuple[dict[str, T], list[str]]:
    """What `clock` says of each form whose result is right, and why others have no time."""
    times, reasons = {}, []
    for name, form in forms.items():
        try:
            if off := wrong(form()):
                reasons.append(f"{name}: {off}")
            else:
                times[name] = clock(form)
        except Exception as error:
            reasons.append(f"{name}: {kernels.said(error)}")
    return times, reasons


def relative(got: np.ndarray, want: np.ndarray) -> str | None:
    """Says so if `got` is not `want` but for its rounding."""
    if got.shape != want.shape:
        return f"a result of shape {got.shape}, not {want.shape}"
    off = float(np.linalg.norm((got - want).ravel()) / np.linalg.norm(want.ravel()))
    return None if off < kernels.WRONG else f"wrong by {off:.2g} of the result"


def seconds(run: Callable[[], Any], calls: int, wait: Callable[[Any], None]) -> float:
    """Of a call, by the wall, when so many are queued back to back."""
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = run()
    wait(result)
    return (time.perf_counter() - start) / calls


def race(
    runs: Mapping[str, Callable[[], Any]], wait: Callable[[Any], None]
) -> dict[str, np.ndarray]:
    """Seconds of a call of each, in rounds that belong together."""
    calls = {}
    for name, run in runs.items():
        seconds(run, 1, wait)  # what the first call does once
        calls[name] = int(np.clip(round(ROUND / seconds(run, 1, wait)), 1, 100))
    times = {name: np.empty(ROUNDS) for name in runs}
    for i in range(ROUNDS):
        for name, run in runs.items():
            times[name][i] = seconds(run, calls[name], wait)
    return times


def lines(records: Sequence[Record]) -> Iterator[str]:
    """For people: a line for each product."""
    for one in records:
        said = f"skipped: {one['skipped']}"
        if not one["skipped"]:
            said = f"{one['ms']:.3f} ms ({one['program']}), {one['ratio']:.2f} of dense"
        yield f"{one['case']} {one['product']} {one['implementation']}: {said}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 if there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.peers", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("out/peers.jsonl"), help="results")
    parser.add_argument("--seed", type=int, default=0, help="of inputs and patterns")
    args = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        print("benchmarks.peers: its cases are for a GPU, and JAX found none.", file=sys.stderr)
        return 2
    programs = Programs()
    with JsonLines(args.json, environment()) as out:
        for case in CASES:
            for peer in PEERS:
                found = list(measure(peer, case, programs, seed=args.seed))
                for record in found:
                    out.write(record)
                for text in lines(found):
                    print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
