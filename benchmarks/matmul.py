"""`python -m benchmarks.matmul`: block-sparse products against a plain dense weight.

Forward, dx and dvalues of `bsjax.matmul`, each checked against the reference and then timed beside
the dense product on the same machine in the same run: interleaved pairs, the median of their ratios
and its quartiles. `docs/benchmarks.md` says what exactly is measured, and what the fields mean.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import _flags as flags
from benchmarks import _report as report
from benchmarks._cases import FULL, PATTERNS, QUICK, Case, Suite, cases
from benchmarks._peers import measure_peers
from benchmarks._products import Programs, Record, measure
from benchmarks._record import JsonLines, environment

DTYPES = ("float32", "bfloat16", "float16")
IMPLEMENTATIONS = ("xla", "auto", "dense")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 if a result was wrong, or 130 if the run was interrupted."""
    parser = _parser()
    args = parser.parse_args(argv)
    suite = _suite(parser, args)
    found = list(cases(suite, args.seed))
    if not found:
        parser.error("no case is left: give fewer filters, or densities that the patterns can have")
    where = environment()
    try:
        out = JsonLines(args.json, where)
        args.json.with_suffix(".png").touch()
    except OSError as error:
        parser.error(f"--json: cannot write {args.json}: {error.strerror}")
    console = Console() if sys.stdout.isatty() else Console(width=140)
    machine = f"{where['cpu']}, {where['cores']} cores, {where['device']}, jax {where['jax']}"
    console.print(f"{len(found)} cases on {machine}, commit {where['commit']}", highlight=False)
    with out:
        records, complete = _run(found, out, console, args)
    for part in (*report.tables(records), *report.break_even_table(records), ""):
        console.print(part, highlight=False)
    for text in report.summary(records):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    written = [args.json]
    if report.picture(records, args.json.with_suffix(".png"), where):
        written.append(args.json.with_suffix(".png"))
    console.print("written: " + ", ".join(map(str, written)), highlight=False, soft_wrap=True)
    if any(one["refused"] for one in records):
        return 1
    return 0 if complete else 130


def _run(
    found: list[Case], out: JsonLines, console: Console, args: argparse.Namespace
) -> tuple[list[Record], bool]:
    """All records, and True; or, after Ctrl-C, those that there are, and False."""
    records, programs = [], Programs()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    # Redrawn between the cases only: a bar that moves by itself takes time from what is measured.
    bar = Progress(
        *columns,
        console=console,
        auto_refresh=False,
        speed_estimate_period=600,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=sum(case.seconds for case in found))
        try:
            for i, case in enumerate(found, 1):
                bar.update(task, description=f"{i}/{len(found)} {case.size}", refresh=True)
                new = list(
                    measure(case, programs, seed=args.seed, budget=args.budget, rounds=args.rounds)
                )
                if case.peers:
                    new += measure_peers(case, programs, seed=args.seed)
                for record in new:
                    out.write(record)
                for text in report.lines(new):
                    text = f"[{i}/{len(found)}] {text}"
                    console.print(text, highlight=False, markup=False, soft_wrap=True)
                records += new
                bar.advance(task, case.seconds)
        except KeyboardInterrupt:
            console.print("interrupted: what follows is what was measured so far")
            return records, False
    return records, True


def _parser() -> flags.Parser:
    parser = flags.Parser(
        prog="benchmarks.matmul",
        description="Block-sparse products against a dense weight, on this machine.",
        epilog="Filters take lists: --block 64,128 --density 0.1,0.25",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a couple of minutes instead of some twenty")
    add(
        "--tokens",
        type=flags.many(flags.positive),
        help="numbers of tokens",
        default=argparse.SUPPRESS,
    )
    add("--shape", type=flags.many(flags.shape), help="weights, KxM", default=argparse.SUPPRESS)
    add("--block", type=flags.many(flags.positive), help="block sides", default=argparse.SUPPRESS)
    add("--density", type=flags.many(flags.density), help="densities", default=argparse.SUPPRESS)
    for name, known in (
        ("pattern", PATTERNS),
        ("dtype", DTYPES),
        ("implementation", IMPLEMENTATIONS),
    ):
        help = f"of {', '.join(known)}"
        add(f"--{name}", type=flags.many(flags.one_of(known)), help=help, default=argparse.SUPPRESS)
    add(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="also time scipy.sparse and jax.experimental.sparse, in a few cases",
    )
    add("--json", type=Path, default=Path("out/matmul.jsonl"), help="results; the PNG lies beside")
    add("--seed", type=flags.natural, default=0, help="of inputs and patterns")
    add("--rounds", type=flags.positive, help="pairs of runs per product, instead of --budget")
    add("--budget", type=flags.seconds, default=0.6, help="seconds per product, 5 to 25 pairs")
    return parser


def _suite(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Suite:
    """The suite that the flags describe."""
    suite = QUICK if args.quick else FULL
    names = {
        "shape": "shapes",
        "block": "blocks",
        "density": "densities",
        "pattern": "patterns",
        "dtype": "dtypes",
        "implementation": "implementations",
        "peers": "peers",
    }
    changes = {field: getattr(args, flag) for flag, field in names.items() if hasattr(args, flag)}
    if hasattr(args, "tokens"):  # whoever names them wants them in full
        changes |= {"tokens": args.tokens, "auto_tokens": (), "random_tokens": ()}
    suite = dataclasses.replace(suite, **changes)
    for k, m in suite.shapes:
        for block in suite.blocks:
            if k % block or m % block:
                parser.error(
                    f"--shape {k}x{m} is no multiple of --block {block}: change one of them"
                )
    return suite


if __name__ == "__main__":
    sys.exit(main())
