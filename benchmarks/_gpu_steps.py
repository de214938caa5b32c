"""What the GPU run book does, in its order. An operation adds itself by a `Step` in `STEPS`."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import _gpu_cases as gpu_cases
from benchmarks import _gpu_kernels as kernels
from benchmarks import _sampled_cases as sampled_cases
from benchmarks._gpu_cases import FIRST, PRODUCTS, REST, GpuCase
from benchmarks._gpu_floor import Ceilings
from benchmarks._sampled_cases import SampledCase

type Record = dict[str, Any]


class Context(NamedTuple):
    """What an item may need: the ceilings so far, and programs that others have compiled."""

    ceilings: Ceilings
    programs: Any
    implementation: str
    seed: int


class Item(NamedTuple):
    """A piece of work that is done in one go: its records are written together."""

    name: str
    seconds: float  # a guess
    run: Callable[[Context], Iterable[Record]]
    lines: Callable[[list[Record]], Iterator[str]] | None = None  # for people
    predict: Callable[[Ceilings], Iterator[str]] | None = None


class Step(NamedTuple):
    """Items that belong together, or a selection of tests. Lower priorities come first."""

    name: str
    priority: float
    items: Callable[[], Sequence[Item]] = list
    tests: Sequence[str] = ()  # arguments of pytest
    seconds: float = 0  # of tests: a guess
    warm_up: float = 15  # what starting a process takes


def ceilings() -> list[Item]:
    def run(name: str, _: Context) -> Iterator[Record]:
        from benchmarks._gpu_ceilings import CEILINGS

        yield from CEILINGS[name]()

    def lines(records: list[Record]) -> Iterator[str]:
        for one in records:
            yield f"{one['ceiling']}: {one['value']:.4g} {one['unit']} ({one['clock']})"

    return [
        Item(f"ceilings {name}", 5, functools.partial(run, name), lines)
        for name in ("dense", "memory", "l2", "launch")
    ]


def suite(cases: Sequence[GpuCase]) -> list[Item]:
    def run(case: GpuCase, at: Context) -> Iterator[Record]:
        from benchmarks import _gpu_suite

        yield from _gpu_suite.measure(
            case, at.programs, at.ceilings, implementation=at.implementation, seed=at.seed
        )

    def lines(records: list[Record]) -> Iterator[str]:
        from benchmarks import _gpu_suite

        yield from _gpu_suite.lines(records)

    def predict(case: GpuCase, ceilings: Ceilings) -> Iterator[str]:
        for product in PRODUCTS:
            config = kernels.chosen(product, case)
            one = gpu_cases.predicted(case, product, config, ceilings)
            wanted = gpu_cases.goal(case, product)
            goal = ", ".join(f"{name} {value:g}" for name, value in wanted.items())
            yield (
                f"{product:8} floor {one['floor_ms']:.4f} ms by {one['floor_by']}, tiles of "
                f"{config['tile']} x {config['columns']}: {one['tile_floor_ms']:.4f}, "
                f"dense {one['dense_floor_ms']:.4f}, "
                f"efficiency {one['floor_efficiency']:.2f}; goal: {goal}"
            )

    return [
        Item(
            f"matmul {case.name}",
            8,
            functools.partial(run, case),
            lines,
            functools.partial(predict, case),
        )
        for case in cases
    ]


def tuner(problems: Sequence[kernels.Problem]) -> list[Item]:
    def run(problem: kernels.Problem, _: Context) -> Iterator[Record]:
        yield from kernels.tuner(problem)

    def lines(records: list[Record]) -> Iterator[str]:
        right = [one for one in records if one["us"]]
        for one in right[:1]:
            heuristic = next((two["us"] for two in right if two["heuristic"]), None)
            before = f"{heuristic:.1f}" if heuristic else "none"
            yield f"{one['us']:.1f} us with {one['config']}, the heuristic {before}"
        for one in records:
            if one["skipped"]:
                yield f"left out: {one['config']}: {one['skipped']}"

    return [
        Item(
            f"tune {one.operation} {one.tokens} {one.block[0]}x{one.block[1]} {one.density:g}",
            8,
            functools.partial(run, one),
            lines,
        )
        for one in problems
    ]


def peers() -> list[Item]:
    def run(peer: str, case: GpuCase, at: Context) -> Iterator[Record]:
        from benchmarks import peers

        yield from peers.measure(peer, case, at.programs, seed=at.seed)

    def lines(records: list[Record]) -> Iterator[str]:
        from benchmarks import peers

        yield from peers.lines(records)

    from benchmarks import peers

    return [
        Item(f"peer {peer}, {case.name}", 10, functools.partial(run, peer, case), lines)
        for case in peers.CASES
        for peer in peers.PEERS
    ]


def sampled() -> list[Item]:
    def run(case: SampledCase, at: Context) -> Iterator[Record]:
        from benchmarks import _sampled_suite

        yield from _sampled_suite.measure(case, at.programs, at.ceilings, seed=at.seed)

    def lines(records: list[Record]) -> Iterator[str]:
        from benchmarks import _sampled_suite

        yield from _sampled_suite.lines(records)

    return [
        Item(
            f"sampled {case.name}",
            6,
            functools.partial(run, case),
            lines,
            functools.partial(sampled_cases.forecast, case),
        )
        for case in sampled_cases.on_gpu()
    ]


def attention() -> list[Item]:
    from benchmarks import _attention as suite

    def run(case: Any, at: Context) -> Iterator[Record]:
        yield from suite.measure(case, suite.WHAT, at.seed, None, 1.0)

    return [
        Item(
            f"attention {case.pattern} {case.sparsity:g}",
            25,
            functools.partial(run, case),
            lambda records: map(suite.line, records),
        )
        for case in suite.ON_GPU
    ]


def attention_peers() -> list[Item]:
    from benchmarks import _attention as suite
    from benchmarks import _attention_peers as peers

    def run(name: str, case: Any, at: Context) -> Iterator[Record]:
        yield from peers.measure(name, case, at.seed)

    return [
        Item(
            f"attention peer {name}, {case.pattern} {case.sparsity:g}",
            30,
            functools.partial(run, name, case),
            lambda records: map(suite.line, records),
        )
        for case in suite.ON_GPU
        for name in peers.PEERS
    ]


def conv() -> list[Item]:
    from benchmarks import _conv_cases as suite

    def run(case: Any, at: Context) -> Iterator[Record]:
        from benchmarks import conv

        yield from conv.measure(case, at.programs, seed=at.seed, budget=1.0, rounds=None)

    def lines(records: list[Record]) -> Iterator[str]:
        from benchmarks import conv

        yield from conv.lines(records)

    return [
        Item(f"conv {case.layer.name} {case.density:g}", 20, functools.partial(run, case), lines)
        for case in suite.on_gpu()
    ]


def lstm() -> list[Item]:
    def run(_: Context) -> Iterator[Record]:
        from benchmarks import lstm

        yield from lstm.measure(lstm.CASES["gpu"], rounds=5)

    def lines(records: list[Record]) -> Iterator[str]:
        from benchmarks import lstm

        for one in records:
            yield from lstm.table(one)

    return [Item("lstm 18432 wide", 60, run, lines)]


CHECKOUT = Path(__file__).parent.parent
FILES = tuple(
    f"tests/kernels/{name}.py"
    for name in ("test_gpu", "test_gpu_sampled", "test_gpu_attention", "test_gpu_conv")
)
TESTS = tuple(one for one in FILES if (CHECKOUT / one).exists())
MOST_VALUABLE = 14  # problems of the tuner
STEPS = [
    Step("ceilings", 10, ceilings),
    Step("quick tests", 20, tests=(*TESTS, "-m", "gpu and not slow"), seconds=90),
    Step("matmul", 30, functools.partial(suite, FIRST)),
    Step("attention", 32, attention),
    Step("conv", 34, conv),
    Step("sampled", 36, sampled),
    Step("lstm", 38, lstm),
    Step("tuner", 40, functools.partial(tuner, kernels.PROBLEMS[:MOST_VALUABLE])),
    Step("rest of matmul", 50, functools.partial(suite, REST)),
    Step("peers", 60, peers),
    Step("attention peers", 62, attention_peers),
    Step("slow tests", 70, tests=(*TESTS, "-m", "gpu and slow"), seconds=120),
    Step("rest of the tuner", 80, functools.partial(tuner, kernels.PROBLEMS[MOST_VALUABLE:])),
]


def register(step: Step) -> None:
    """For operations that come later."""
    STEPS.append(step)


def ordered() -> list[Step]:
    """By priority; steps of the same one in the order in which they came."""
    return sorted(STEPS, key=lambda step: step.priority)
