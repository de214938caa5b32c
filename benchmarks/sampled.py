"""`python -m benchmarks.sampled`: sampled layers beside the dense one, forward and backward.

y, dx and dw, scores and sampling included, against the exact layer in the same process; on a GPU
also each part by itself. First the ceilings of the machine and the floors that follow, then the
clock. `docs/benchmarks.md` says what exactly is measured, and what the fields mean. Where a kernel
may fault, `python -m benchmarks.gpu --only ceilings,sampled` runs the same cases in processes of
their own.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _flags as flags
from benchmarks import _gpu_table as gpu_table
from benchmarks import _sampled_cases as cases
from benchmarks._gpu_floor import Ceilings, ceilings_from
from benchmarks._sampled_cases import PARTS, POLICIES, SampledCase

type Record = dict[str, Any]

SAMPLERS = ("uniform", "with_replacement", "bernoulli", "systematic", "priority", "top_k", "wta")
IMPLEMENTATIONS = ("mosaic", "xla", "auto", "dense")
MOST_COPIED = 2**28  # bytes of the copy that measures a CPU's memory


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 if a result was wrong, or 130 if the run was interrupted."""
    parser = _parser()
    args = parser.parse_args(argv)
    say = functools.partial(print, flush=True)
    from benchmarks._products import Programs
    from benchmarks._record import JsonLines, environment

    where = environment()
    gpu = where["platform"] == "gpu"
    found = _cases(args, gpu)
    for one in found:
        if one.shape[0] % one.block:
            parser.error(f"--size {one.shape[0]} is no multiple of --block {one.block}: change one")
    say(f"{len(found)} cases on {where['device']}, {where['cpu']}, commit {where['commit']}")
    records: list[Record] = []
    status = 0
    with JsonLines(args.json, where) as out:
        ceilings = Ceilings()
        try:
            if not args.dry_run:
                measured = list(_ceilings(found, gpu))
                ceilings = ceilings_from(measured, ("flops", "memory"))
                for one in measured:
                    out.write(one)
                    say(f"{one['ceiling']}: {one['value']:.4g} {one['unit']}")
            for case in found:
                for record in _predictions(case, args.parts, ceilings):
                    out.write(record)
                    records.append(record)
                say(f"{case.name}: {next(cases.forecast(case, ceilings))}")
            programs = Programs()
            for case in () if args.dry_run else found:
                records += _measured(case, programs, ceilings, args, out, say, gpu)
        except KeyboardInterrupt:
            say("interrupted: what follows is what was measured so far")
            status = 130
    for text in gpu_table.sampled(_latest(records)):
        say(text)
    say(f"written: {args.json}")
    return 1 if any(one["refused"] for one in records) else status


def _ceilings(found: Sequence[SampledCase], gpu: bool) -> Iterator[Record]:
    """Of a GPU as the run book measures them; of a CPU with the size and the dtype at hand."""
    from benchmarks import _gpu_ceilings as ceilings

    if gpu:
        yield from itertools.chain(ceilings.dense(), ceilings.memory())
        return
    side, dtype = max(one.shape[0] for one in found), found[0].dtype
    yield from ceilings.dense(side, dtype)
    yield from ceilings.memory(min(MOST_COPIED, 64 * side * side))


def _predictions(case: SampledCase, parts: Sequence[str], ceilings: Ceilings) -> Iterator[Record]:
    from benchmarks import _sampled_suite as suite

    for part in case.parts:
        if part in parts:
            yield (
                suite.describe(case, part)
                | {"skipped": "not measured"}
                | cases.predicted(case, part, ceilings)
            )


def _measured(
    case: SampledCase, programs: Any, ceilings: Ceilings, args: Any, out: Any, say: Any, gpu: bool
) -> Iterator[Record]:
    from benchmarks import _sampled_suite as suite
    from benchmarks._gpu_clock import measured

    clock = measured if gpu else functools.partial(suite.raced, rounds=args.rounds)
    for record in suite.measure(
        case, programs, ceilings, parts=args.parts, seed=args.seed, clock=clock
    ):
        out.write(record)
        for text in suite.lines([record]):
            say(text)
        yield record


def _latest(records: Sequence[Record]) -> list[Record]:
    """What was measured in the place of what was predicted."""
    return list({(one["case"], one["part"]): one for one in records}.values())


def _cases(args: argparse.Namespace, gpu: bool) -> list[SampledCase]:
    """What the device is asked for, or everything that the flags name."""
    names = ("policy", "sampler", "implementation", "fraction", "block")
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    side = args.size or (cases.GPU_SIDE if gpu else cases.CPU_SIDE)
    dtype = args.dtype or ("bfloat16" if gpu else "float32")
    found = cases.on_gpu() if gpu else cases.on_cpu()
    if given:
        lists = [list(dict.fromkeys(getattr(one, name) for one in found)) for name in names]
        wanted = [given.get(name, one) for name, one in zip(names, lists, strict=True)]
        found = list(cases.grid(*wanted))
    return [cases.resized(one, side, dtype) for one in found]


def _parser() -> flags.Parser:
    parser = flags.Parser(
        prog="benchmarks.sampled",
        description="Sampled layers against the dense one, on this machine.",
        epilog="Lists have commas: --block 64,128 --fraction 0.1,0.25; what they name is combined.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--size", type=flags.positive, help="tokens, features in and out; default: by device")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: by device")
    for name, known in (
        ("policy", POLICIES),
        ("sampler", SAMPLERS),
        ("implementation", IMPLEMENTATIONS),
    ):
        help = f"of {', '.join(known)}"
        add(f"--{name}", type=flags.many(flags.one_of(known)), help=help, default=argparse.SUPPRESS)
    add("--fraction", type=flags.many(flags.fraction), help="shares", default=argparse.SUPPRESS)
    add("--block", type=flags.many(flags.positive), help="of neighbours", default=argparse.SUPPRESS)
    parts = flags.many(flags.one_of(PARTS))
    add("--parts", type=parts, help=f"of {', '.join(PARTS)}", default=PARTS)
    add("--json", type=Path, default=Path("out/sampled.jsonl"), help="results")
    add("--seed", type=flags.natural, default=0, help="of inputs and samples")
    add("--rounds", type=flags.positive, default=7, help="pairs of runs of a part, on a CPU")
    add("--dry-run", action="store_true", help="only the floors, by assumed ceilings of an H200")
    return parser


if __name__ == "__main__":
    sys.exit(main())
