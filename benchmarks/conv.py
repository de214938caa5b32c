"""`python -m benchmarks.conv`: block-sparse convolutions against a plain dense kernel.

Forward, dx and dvalues of `bsjax.conv` on the layers of ResNet-50 and of WRN-28-10, with 8 images
at a time, each checked against the reference and then timed beside `lax.conv_general_dilated` on
the same machine in the same run: interleaved pairs, the median of their ratios and its quartiles.
`docs/benchmarks.md` says what exactly is measured, and what the fields mean.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bsjax
from benchmarks import _flags as flags
from benchmarks import _products as products
from benchmarks._conv_cases import LAYERS, QUICK, Case, Layer, cases, goal
from benchmarks._products import DENSE, PRODUCTS, Inputs, Programs, Record
from benchmarks._record import JsonLines, environment
from benchmarks._timing import clocked

DTYPES = ("float32", "bfloat16", "float16")
IMPLEMENTATIONS = ("xla", "auto", "dense", "mosaic")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 if a result was wrong, or 130 if the run was interrupted."""
    args = _parser().parse_args(argv)
    layers = [one for one in (QUICK if args.quick else LAYERS) if args.layer in one.name]
    found = list(
        cases(layers, args.block, args.density, args.dtype, args.implementation, args.seed)
    )
    say = functools.partial(print, flush=True)
    where = environment()
    say(f"{len(found)} cases on {where['cpu']}, {where['device']}, commit {where['commit']}")
    records: list[Record] = []
    programs, status = Programs(), 0
    with JsonLines(args.json, where) as out:
        try:
            for i, case in enumerate(found, 1):
                options = {"seed": args.seed, "budget": args.budget, "rounds": args.rounds}
                new = list(measure(case, programs, **options))
                for record in new:
                    out.write(record)
                records += new
                for text in lines(new):
                    say(f"[{i}/{len(found)}] {text}")
        except KeyboardInterrupt:
            say("interrupted: what follows is what was measured so far")
            status = 130
    for text in summary(records):
        say(text)
    say(f"written: {args.json}")
    return 1 if any(one["refused"] for one in records) else status


def draws(layer: Layer, dtype: str, seed: int) -> list[Inputs]:
    """Several draws of images, dy and the dense kernel."""
    (k, m), side = layer.channels, layer.side_out
    shapes = (
        (layer.images, layer.side, layer.side, k),
        (layer.images, side, side, m),
        (layer.window, layer.window, k, m),
    )
    return products.drawn(shapes, dtype, seed)


def stored(w: jax.Array, p: bsjax.BlockPattern) -> jax.Array:
    """The values of the pattern, cut out of a dense kernel."""
    (r, c), (br, bc) = p.grid, p.block
    blocks = np.asarray(w).reshape(*w.shape[:2], r, br, c, bc)
    return jnp.asarray(np.moveaxis(blocks, (2, 4), (0, 1))[np.asarray(p.row), np.asarray(p.col)])


def _sparse(x: Any, values: Any, p: Any, strides: int, name: Any) -> jax.Array:
    return bsjax.conv(x, values, p, strides=strides, implementation=name)


def _dense(x: Any, w: Any, strides: int) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (strides, strides), "SAME", dimension_numbers=numbers, precision="highest"
    )


def _product(which: str, run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Forward, dx or dvalues of `run(x, weights, *rest)`, as `f(x, dy, weights, *rest)`."""
    if which == "forward":
        return lambda x, dy, w, *rest: run(x, w, *rest)
    if which == "dx":
        return lambda x, dy, w, *rest: jax.vjp(lambda x: run(x, w, *rest), x)[1](dy)[0]
    return lambda x, dy, w, *rest: jax.vjp(lambda w: run(x, w, *rest), w)[1](dy)[0]


def measure(
    case: Case, programs: Programs, *, seed: int, budget: float, rounds: int | None
) -> Iterator[Record]:
    """A record for each product and implementation."""
    inputs = draws(case.layer, case.dtype, seed)
    sparse = [(d.x, d.dy, stored(d.w, case.p), case.p) for d in inputs]
    strides = case.layer.strides
    names = dict.fromkeys(case.implementations)
    if "auto" in names:  # what it chose is found by comparing
        names |= {"xla": None, "dense": None}
    jobs = {
        (which, name): (
            _product(which, functools.partial(_sparse, strides=strides, name=name)),
            sparse[0],
        )
        for which, name in itertools.product(PRODUCTS, names)
    }
    full = functools.partial(_dense, strides=strides)
    jobs |= {(which, DENSE): (_product(which, full), inputs[0]) for which in PRODUCTS}
    compiled = programs.compile(jobs)
    want = reference(case, programs, *sparse[0])
    clock = functools.partial(clocked, budget=budget, rounds=rounds)
    options = {"describe": describe, "terms": terms, "goal": goal, "clock": clock}
    for which in PRODUCTS:
        ready = {name: compiled[which, name] for name in (*names, DENSE)}
        given = (ready, sparse, inputs, want[which])
        yield from products.outcomes(case, which, *given, **options)


def reference(
    case: Case, programs: Programs, x: Any, dy: Any, values: Any, p: Any
) -> dict[str, jax.Array]:
    """y, dx and dvalues by the reference's own autodiff, in float32 from the same inputs."""

    def all_three(x, dy, values, p):
        def run(x, values):
            return _sparse(x, values, p, case.layer.strides, "reference")

        y, backward = jax.vjp(run, x, values)
        return dict(zip(PRODUCTS, (y, *backward(dy)), strict=True))

    x, dy, values = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (x, dy, values))
    args = (x, dy, values, p)
    return programs.compile({"reference": (all_three, args)})["reference"](*args)


def terms(case: Case, which: str) -> int:
    """The most products that one number of the result sums."""
    mask, taps = np.asarray(case.p.mask()), case.layer.window**2
    most = {
        "forward": taps * case.block * mask.sum(0).max(),
        "dx": taps * case.block * mask.sum(1).max(),
        "dvalues": case.layer.images * case.layer.side_out**2,
    }
    return int(most[which])


def describe(case: Case, which: str, name: str) -> Record:
    """What a record is about."""
    layer = case.layer
    return {
        "benchmark": "conv",
        "product": which,
        "layer": layer.name,
        "network": layer.network,
        "images": layer.images,
        "side": layer.side,
        "channels": list(layer.channels),
        "window": layer.window,
        "strides": layer.strides,
        "flops": layer.flops,
        "dtype": case.dtype,
        "pattern": "random",
        "block": list(case.p.block),
        "density": round(case.p.density, 6),
        "density_asked": case.density,
        "stored_blocks": case.p.nnz,
        "implementation": name,
        "refused": None,
        "skipped": None,
    }


def lines(records: Sequence[Record]) -> Iterator[str]:
    """A line for each implementation."""
    names = dict.fromkeys(one["implementation"] for one in records)
    for name in names:
        ones = [one for one in records if one["implementation"] == name]
        text = f"{ones[0]['layer']} b={ones[0]['block'][0]} {ones[0]['density']:.3f} {name}:"
        yield text + "".join(f"  {one['product']} {_outcome(one)}" for one in ones)


def _outcome(one: Record) -> str:
    if one["refused"]:
        return f"WRONG, not timed: {one['refused']}"
    ran = f" [{one['program']}]" * (one["program"] != one["implementation"])
    return f"{one['ratio']:.2f} ({one['ratio_low']:.2f}-{one['ratio_high']:.2f}){ran}"


def summary(records: Sequence[Record]) -> Iterator[str]:
    """Time over dense time by implementation, block, density and product, and the goals missed."""
    timed = [one for one in records if "ratio" in one]

    def key(one: Record) -> tuple[Any, ...]:
        taps = "1 tap" if one["window"] == 1 else "more taps"
        return one["implementation"], taps, one["block"][0], one["density_asked"], one["product"]

    for at, group in itertools.groupby(sorted(timed, key=key), key):
        ratios = np.array([one["ratio"] for one in group])
        yield (
            f"{at[0]:5} {at[1]:9} b={at[2]:<3} {at[3]:<4} {at[4]:7} time / dense time: "
            f"median {np.median(ratios):.2f}, {ratios.min():.2f} to {ratios.max():.2f}, "
            f"{len(ratios)} layers"
        )
    aimed = [one for one in timed if one["goal"] is not None]
    yield f"goals met: {sum(one['met'] for one in aimed)} of {len(aimed)}"
    for one in sorted(aimed, key=lambda one: one["goal"] / one["ratio"])[:12]:
        if not one["met"]:
            text = next(lines([one]))
            yield f"  missed: {text}, goal {one['goal']:.2f}"


def _parser() -> flags.Parser:
    parser = flags.Parser(
        prog="benchmarks.conv",
        description="Block-sparse convolutions against a dense kernel, on this machine.",
        epilog="Filters take lists: --block 32,64 --density 0.1,0.25",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="four layers instead of all")
    add("--layer", default="", help="only layers with this in their names, such as 3x3")
    add("--block", type=flags.many(flags.positive), help="block sides", default=(32, 64))
    add("--density", type=flags.many(flags.density), default=(0.5, 0.25, 0.1), help="densities")
    for name, known, default in (
        ("dtype", DTYPES, ("float32",)),
        ("implementation", IMPLEMENTATIONS, ("xla", "auto")),
    ):
        help = f"of {', '.join(known)}"
        add(f"--{name}", type=flags.many(flags.one_of(known)), help=help, default=default)
    add("--json", type=Path, default=Path("out/conv.jsonl"), help="results")
    add("--seed", type=flags.natural, default=0, help="of inputs and patterns")
    add("--rounds", type=flags.positive, help="pairs of runs per product, instead of --budget")
    add("--budget", type=flags.seconds, default=0.6, help="seconds per product, 5 to 25 pairs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
