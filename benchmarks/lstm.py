"""`python -m benchmarks.lstm`: a wide sparse recurrent cell beside dense ones.

A training step (forward, and the gradient of every parameter and of the input, through `--length`
steps of `--batch` sequences), a step of inference, and a recurrent product by itself: of a
block-sparse cell, of the dense cell of the same width, and of the dense cell with as many
parameters. All have the same internal steps and norms, and the gradient of each matrix is one
product over all steps. `docs/benchmarks.md` says what exactly is measured.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bsjax
import bsjax.nnx
from benchmarks import _flags as flags
from benchmarks import _lstm_cases as cases
from benchmarks._lstm_cases import CASES, CELLS, Case
from benchmarks._record import JsonLines, environment
from benchmarks._timing import clocked, spread

type Record = dict[str, Any]

SPARSE, WIDE, EQUAL = "block-sparse", "dense, same width", "dense, same parameters"
STEP_BY_STEP = "block-sparse, in nnx.RNN"
GOALS = {"cpu": {"train": 4.0}, "gpu": {"product": 15.0}}  # times as fast as the dense cell
PARTS = ("train", "infer", "product")


@nnx.jit
def train(rnn: Any, x: jax.Array, dy: jax.Array) -> Any:
    """The gradients of all parameters and of x."""
    loss = lambda rnn, x: (rnn(x).astype(jnp.float32) * dy).sum()  # noqa: E731
    return nnx.grad(loss, argnums=(0, 1))(rnn, x)


@nnx.jit
def infer(cell: Any, carry: Any, x: jax.Array) -> Any:
    """One step."""
    return cell(carry, x)


def measure(case: Case, *, rounds: int, parts: Sequence[str] = PARTS) -> Iterator[Record]:
    """A record for each part, or one that says why a cell is wrong."""
    about = {"benchmark": "lstm"} | dataclasses.asdict(case)
    if reason := cases.check(case):
        yield about | {"part": "check", "refused": reason}
        return
    sparse = cases.sparse(case)
    dense = {WIDE: case.state, EQUAL: cases.narrower(case)}
    cells = {SPARSE: sparse} | {name: cases.dense(case, m) for name, m in dense.items()}
    for part in parts:
        runs = {"train": _training, "infer": _inference, "product": _products}[part](case, cells)
        clock, times = clocked(runs, rounds=rounds)
        read = case.bytes if part == "train" else case.batch
        of = {
            name: {
                "width": cells.get(name, sparse).hidden_features,
                "parameters": cases.count(cells.get(name, sparse)),
                "ms": 1e3 * float(np.median(seconds)),
                "bytes_per_second": read / float(np.median(seconds)),
                "speedup": spread(times[WIDE] / seconds)._asdict(),
            }
            for name, seconds in times.items()
        }
        # a goal is one for what it was set for
        goal = next((GOALS[name].get(part) for name, one in CASES.items() if one == case), None)
        met = None if goal is None else of[SPARSE]["speedup"]["median"] >= goal
        found = {"clock": clock, "of": of, "goal": goal, "met": met}
        yield about | {"part": part, "refused": None} | found


def _training(case: Case, cells: dict[str, Any]) -> dict[str, Callable[[int], Any]]:
    rnns: dict[str, Any] = {name: bsjax.nnx.RNN(cell) for name, cell in cells.items()}
    rnns[STEP_BY_STEP] = nnx.RNN(cells[SPARSE])
    xs = [cases.normal(i, (case.batch, case.length, case.inputs), case.dtype) for i in range(2)]

    def run(rnn: Any) -> Callable[[int], Any]:
        shape = (case.batch, case.length, rnn.cell.hidden_features)
        dys = [cases.normal(2 + i, shape, "float32") for i in range(2)]
        return lambda i: train(rnn, xs[i % 2], dys[i % 2])

    return {name: run(rnn) for name, rnn in rnns.items()}


def _inference(case: Case, cells: dict[str, Any]) -> dict[str, Callable[[int], Any]]:
    xs = [cases.normal(i, (case.batch, case.inputs), case.dtype) for i in range(2)]

    def run(cell: Any) -> Callable[[int], Any]:
        carry = cell.initialize_carry(xs[0].shape, nnx.Rngs(0), jax.nn.initializers.normal(1.0))
        return lambda i: infer(cell, carry, xs[i % 2])

    return {name: run(cell) for name, cell in cells.items()}


def _products(case: Case, cells: dict[str, Any]) -> dict[str, Callable[[int], Any]]:
    """The first internal step, or the gates if there is none."""

    def run(cell: Any) -> Callable[[int], Any]:
        layer = cell.steps[0] if cell.steps else cell.gates
        f = jax.jit(functools.partial(bsjax.matmul, implementation=layer.implementation))
        values, p = layer.values[...], layer.pattern.get_value()
        hs = [cases.normal(i, (case.batch, case.state), values.dtype) for i in range(2)]
        return lambda i: f(hs[i % 2], values, p)

    return {name: run(cells[name]) for name in (SPARSE, WIDE)}


def table(record: Record) -> Iterator[str]:
    """A part for people."""
    if record["refused"]:
        yield f"refused: {record['refused']}"
        return
    goal = {True: ", goal met", False: ", goal missed", None: ""}[record["met"]]
    wanted = "" if record["goal"] is None else f" (goal: {record['goal']:g}x{goal})"
    yield f"{record['part']}{wanted}"
    for name, one in record["of"].items():
        ratio = one["speedup"]
        yield (
            f"  {name:26} {one['width']:6} wide {one['parameters']:12,} parameters "
            f"{one['ms']:10.2f} ms {one['bytes_per_second']:10,.0f} bytes/s "
            f"{ratio['median']:6.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 if a result was wrong, or 130 if the run was interrupted."""
    parser = _parser()
    args = vars(parser.parse_args(argv))
    path, rounds, parts = (args.pop(name) for name in ("json", "rounds", "parts"))
    where, say = environment(), functools.partial(print, flush=True)
    case = dataclasses.replace(CASES["cpu" if where["platform"] == "cpu" else "gpu"], **args)
    if case.state % case.block:
        parser.error(f"--state {case.state} is no multiple of --block {case.block}: change one")
    say(f"{case} on {where['device']}, {where['cpu']}, commit {where['commit']}")
    status = 0
    with JsonLines(path, where) as out:
        try:
            for record in measure(case, rounds=rounds, parts=parts):
                out.write(record)
                for text in table(record):
                    say(text)
                status = 1 if record["refused"] else status
        except KeyboardInterrupt:
            say("interrupted: above is what was measured so far")
            status = 130
    say(f"written: {path}")
    return status


def _parser() -> flags.Parser:
    parser = flags.Parser(
        prog="benchmarks.lstm",
        description="A block-sparse recurrent cell beside dense ones, on this machine.",
        epilog="What is not given is that of the device: "
        + "; ".join(f"{name}: {case}" for name, case in CASES.items()),
    )
    add = functools.partial(parser.add_argument, default=argparse.SUPPRESS)
    add("--cell", choices=tuple(CELLS), help="which one")
    for name, help in (
        ("state", "features of the state"),
        ("block", "side of a block"),
        ("depth", "internal steps of a small world"),
        ("inputs", "features of the input"),
        ("batch", "sequences"),
        ("length", "steps that a gradient goes back"),
    ):
        add(f"--{name}", type=flags.positive, help=help)
    add("--density", type=flags.density, help="stored share of the blocks, diagonal included")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of all arrays")
    add("--implementation", choices=("auto", "xla", "mosaic", "dense"), help="of the sparse cell")
    known = flags.many(flags.one_of(PARTS))
    parser.add_argument("--parts", type=known, default=PARTS, help=f"of {', '.join(PARTS)}")
    parser.add_argument("--json", type=Path, default=Path("out/lstm.jsonl"), help="results")
    parser.add_argument("--rounds", type=flags.positive, default=7, help="of all in turn")
    return parser


if __name__ == "__main__":
    sys.exit(main())
