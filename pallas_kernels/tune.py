"""`python -m pallas_kernels.tune`: times configurations on the GPU at hand, and writes the table.

Offline, and resumable: each product is written as soon as it is known, and skipped by the next run.
A configuration that does not compile or gives wrong numbers is left out, and the reason is printed.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import config
from pallas_kernels._clock import clock, said, wrong
from pallas_kernels.config import Config

CACHE = 128e6  # bytes: weights rotate through more than a GPU caches, as the layers of a model do


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A product to tune, with a random pattern."""

    operation: str  # as in `config.Key`
    block: tuple[int, int]  # as stored
    density: float
    tokens: int = 8192
    shape: tuple[int, int] = (8192, 8192)
    dtype: str = "bfloat16"

    @property
    def sizes(self) -> tuple[int, int]:
        """The block as the kernel sees it."""
        height, width = self.block
        return (width, height) if self.operation == "matmul transposed" else self.block

    @property
    def stored(self) -> int:
        """Blocks."""
        (k, m), (br, bc) = self.shape, self.block
        return max(1, round(self.density * (k // br) * (m // bc)))

    def key(self, device: str) -> config.Key:
        return config.key(device, self.operation, self.dtype, self.sizes, self.tokens, self.density)


OPERATIONS = ("matmul", "matmul transposed", "sddmm")
# the most valuable first
PROBLEMS = [
    *(
        Problem(operation=operation, block=(side, side), density=density)
        for sides, densities in (((64, 128), (0.1, 0.5)), ((64, 128), (0.25, 0.05)))
        for density in densities
        for side in sides
        for operation in OPERATIONS
    ),
    *(
        Problem(
            operation="matmul", block=(side, side), density=0.03, tokens=64, shape=(12288, 12288)
        )
        for side in (32, 64)
    ),
    *(
        Problem(operation=operation, block=(side, side), density=density)
        for density in (0.1, 0.5, 0.25, 0.05)
        for side in (32, 16)
        for operation in OPERATIONS
    ),
    *(
        Problem(operation=operation, block=(64, 256), density=density)
        for density in (0.1, 0.25)
        for operation in OPERATIONS
    ),
]


class Job(NamedTuple):
    """`run(config, *args)`, several arguments to rotate through, and what comes out."""

    run: Callable[..., Array]
    args: list[tuple[Array, ...]]
    want: Array


def job(problem: Problem, seed: int = 0) -> Job:
    """Random arguments of a kernel, as the door to it would make them."""
    from pallas_kernels import block_sparse, lists, sampled_dense

    (k, m), (br, bc), n, dtype = problem.shape, problem.block, problem.tokens, problem.dtype
    r, c = k // br, m // bc
    keys = iter(jax.random.split(jax.random.key(seed), 32))
    e = problem.stored
    slots = jnp.sort(jax.random.permutation(next(keys), r * c)[:e])  # by column, then by row
    row, col = (slots % r).astype(jnp.int32), (slots // r).astype(jnp.int32)

    def normal(*shape: int) -> Array:
        return jax.random.normal(next(keys), shape, dtype)

    if problem.operation == "sddmm":

        def sddmm(chosen: Config, x: Array, y: Array, row: Array, col: Array) -> Array:
            x, y = (_padded(a, chosen.depth) for a in (x, y))
            ptr = lists.pointers(col, c)
            return sampled_dense.sddmm(x, y, row, ptr, chosen, block=(br, bc), out_dtype=dtype)

        x, y = normal(n, k), normal(n, m)
        full = jnp.dot(x.T, y, preferred_element_type=jnp.float32)
        want = full.reshape(r, br, c, bc).transpose(0, 2, 1, 3)[row, col]
        return Job(sddmm, [(x, y, row, col)], want)

    transpose = problem.operation == "matmul transposed"

    def matmul(chosen: Config, x: Array, values: Array, row: Array, col: Array) -> Array:
        # making the tables is a part of the time
        steps = lists.of_pattern(row, col, (r, c), columns=chosen.columns, transpose=transpose)
        y = block_sparse.matmul(
            _padded(x, chosen.tile * chosen.cluster),
            values,
            steps,
            chosen,
            blocks=r if transpose else c,
            transpose=transpose,
            out_dtype=dtype,
        )
        return jax.tree.leaves(y)[0][:n]

    x = normal(n, m if transpose else k)
    copies = min(8, max(1, round(CACHE / (2 * e * br * bc)))) if n <= 256 else 1
    values = [normal(e, br, bc) for _ in range(copies)]
    dense = jnp.zeros((r, c, br, bc), dtype).at[row, col].set(values[0])
    dense = dense.transpose(0, 2, 1, 3).reshape(k, m)
    want = jnp.dot(x, dense.T if transpose else dense, preferred_element_type=jnp.float32)
    return Job(matmul, [(x, one, row, col) for one in values], want)


def _padded(x: Array, tile: int) -> Array:
    return jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))


def compiled(job: Job, found: Sequence[Config]) -> dict[Config, Any]:
    """A program for each configuration, or the sentence that says why there is none."""

    def build(one: Config) -> Any:
        try:
            return jax.jit(lambda *args: job.run(one, *args)).lower(*job.args[0]).compile()
        except Exception as error:  # whatever a compiler says of a configuration is a reason
            return said(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(found, pool.map(build, found), strict=True))


type Times = dict[Config, float | str]


def times(problem: Problem, found: Sequence[Config], until: float = float("inf")) -> Times:
    """Seconds of each configuration, or why it has none. The first is timed in any case."""
    this, result = job(problem), {}
    for one, program in compiled(this, found).items():
        if isinstance(program, str):
            result[one] = program
            continue
        if result and time.monotonic() > until:
            result[one] = "out of time"
            continue

        def run(i: int, program: Any = program) -> Any:
            return program(*this.args[i % len(this.args)])

        result[one] = wrong(run(0), this.want) or clock(run)
    return result


def tuned(problem: Problem, device: str, measured: Times) -> dict[str, Any] | None:
    """A line of the table, or None if nothing was timed."""
    right = {one: seconds for one, seconds in measured.items() if not isinstance(seconds, str)}
    if not right:
        return None
    best, heuristic = min(right, key=lambda one: right[one]), next(iter(measured))
    fields = {name: value for name, value in dataclasses.asdict(best).items() if name != "workers"}
    first = measured[heuristic]
    return {
        **dataclasses.asdict(problem.key(device)),
        "config": fields,
        "us": round(1e6 * right[best], 2),
        "heuristic_us": None if isinstance(first, str) else round(1e6 * first, 2),
        "timed": len(right),
        "jax": jax.__version__,
    }


def load(path: Path) -> list[dict[str, Any]]:
    """The lines of a table; none if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def save(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """A product a line, in an order that makes for small differences. Never half a file."""
    order = sorted(json.dumps(line) for line in lines)
    text = "[\n" + ",\n".join(order) + "\n]\n" if order else "[]\n"
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def merged(lines: Sequence[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """`lines` with `new` in the place of what was known of that product."""
    (key,) = config.read([new])
    return [line for line in lines if key not in config.read([line])] + [new]


def run(
    problems: Sequence[Problem], path: Path, budget: float, *, again: bool = False
) -> Iterator[tuple[Problem, Times]]:
    """Tunes what the table does not have yet, in order, for `budget` seconds."""
    until, device = time.monotonic() + budget, jax.devices()[0]
    for problem in problems:
        lines = load(path)
        if time.monotonic() > until:
            return
        if not again and problem.key(device.device_kind) in config.read(lines):
            continue
        bytes_ = jnp.dtype(problem.dtype).itemsize
        workers = device.core_count if device.platform == "gpu" else config.MULTIPROCESSORS
        sizes = (problem.tokens, problem.sizes, bytes_, workers)
        found = [*config.candidates(problem.operation, *sizes, density=problem.density)]
        measured = times(problem, found, until)
        if line := tuned(problem, device.device_kind, measured):
            save(path, merged(lines, line))
        yield problem, measured


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 if there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="pallas_kernels.tune", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=600, help="seconds")
    parser.add_argument("--table", type=Path, default=config.TABLE, help="what is rewritten")
    parser.add_argument("--again", action="store_true", help="also what the table has")
    args = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        sys.stderr.write(
            f"pallas_kernels.tune: it times kernels on a GPU, and JAX found "
            f"{jax.default_backend()} only: run it where a GPU is at hand.\n"
        )
        return 1
    for problem, measured in run(PROBLEMS, args.table, args.budget, again=args.again):
        sys.stdout.write(f"{problem}\n")
        for one, seconds in measured.items():
            text = seconds if isinstance(seconds, str) else f"{1e6 * seconds:.1f} us"
            sys.stdout.write(f"  {one}: {text}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
