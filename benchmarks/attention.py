"""`python -m benchmarks.attention`: block-sparse attention against dense attention.

Forward, and forward with the gradients of q, k and v, of `bsjax.attention` beside
`jax.nn.dot_product_attention` on the same machine in the same run: interleaved pairs, the median of
their ratios and its quartiles. What is timed is first checked against dense attention of a few
queries. `docs/benchmarks.md` says what exactly is measured, and what the fields mean.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import _flags as flags
from benchmarks._attention import PATTERNS, WHAT, Case, Record, line, measure, summary
from benchmarks._record import JsonLines, environment

IMPLEMENTATIONS = ("xla", "auto", "dense", "mosaic")
DTYPES = ("float32", "bfloat16", "float16")
SPARSITIES = (0.5, 0.75, 0.9, 0.95, 0.98)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 if a result was wrong, or 130 if the run was interrupted."""
    args = _parser().parse_args(argv)
    say = functools.partial(print, flush=True)
    where = environment()
    axes = (
        args.tokens, args.block, args.dtype, args.pattern, args.sparsity, args.implementation,
    )  # fmt: skip
    cases = [
        Case(tokens, args.heads, args.head_dim, block, dtype, pattern, sparsity, name)
        for tokens, block, dtype, pattern, sparsity, name in itertools.product(*axes)
    ]
    say(f"{len(cases)} cases on {where['cpu']}, {where['cores']} cores, {where['device']}, "
        f"jax {where['jax']}, commit {where['commit']}")  # fmt: skip
    records: list[Record] = []
    status = 0
    with JsonLines(args.json, where) as out:
        try:
            for case in cases:
                for record in measure(case, args.what, args.seed, args.rounds, args.budget):
                    out.write(record)
                    records.append(record)
                    say(line(record))
        except KeyboardInterrupt:
            say("interrupted: what follows is what was measured so far")
            status = 130
    for text in summary(records):
        say(text)
    say(f"written: {args.json}")
    return 1 if any(one["refused"] for one in records) else status


def _parser() -> flags.Parser:
    parser = flags.Parser(
        prog="benchmarks.attention",
        description="Block-sparse attention against dense attention, on this machine.",
        epilog="Lists have commas: --tokens 4096,16384 --sparsity 0.9; what they name is combined.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, many = parser.add_argument, flags.many
    add("--tokens", type=many(flags.positive), default=(4096, 8192, 16384), help="sequences")
    add("--heads", type=flags.positive, default=2, help="of queries and of keys")
    add("--head-dim", type=flags.positive, default=64, help="features of a head")
    add("--block", type=many(flags.positive), default=(64, 128), help="of queries and of keys")
    add("--sparsity", type=many(flags.fraction), default=SPARSITIES, help="what is not stored")
    for name, known, default in (
        ("pattern", tuple(PATTERNS), ("random", "window")),
        ("dtype", DTYPES, ("float32",)),
        ("implementation", IMPLEMENTATIONS, ("auto",)),
        ("what", WHAT, WHAT),
    ):
        help = f"of {', '.join(known)}"
        add(f"--{name}", type=many(flags.one_of(known)), default=default, help=help)
    add("--json", type=Path, default=Path("out/attention.jsonl"), help="results")
    add("--seed", type=flags.natural, default=0, help="of inputs and patterns")
    add("--rounds", type=flags.positive, help="pairs of runs, instead of --budget")
    add("--budget", type=flags.seconds, default=6.0, help="seconds for a case, 5 to 25 pairs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
