"""Measures one case: checks the three products against the reference, then races them with dense.

A wrong kernel has no speed: what differs from the reference is reported, and never timed.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bsjax
from benchmarks._cases import Case, goal
from benchmarks._record import cores
from benchmarks._timing import beside, quartiles, race
from bsjax import patterns
from tests.helpers import tolerance

type Record = dict[str, Any]
type Runs = Mapping[str, Callable[[int], Any]]

CACHE = 128e6  # inputs rotate through more bytes than a cache holds, as the layers of a model do
DENSE, RANDOM = "stored dense", "random pattern"


class Inputs(NamedTuple):
    """x (or images), dy and the dense weight (or kernel) w, standard normal."""

    x: jax.Array
    dy: jax.Array
    w: jax.Array


def draws(shape: tuple[int, int], tokens: int, dtype: str, seed: int) -> list[Inputs]:
    """Several draws of the inputs of a product."""
    k, m = shape
    return drawn(((tokens, k), (tokens, m), (k, m)), dtype, seed)


@functools.lru_cache(maxsize=1)
def drawn(sizes: tuple[tuple[int, ...], ...], dtype: str, seed: int) -> list[Inputs]:
    """Several draws of inputs of these sizes, shared by the cases that have them."""
    rng = np.random.default_rng(seed)
    size = sum(map(math.prod, sizes)) * jnp.dtype(dtype).itemsize
    count = int(np.clip(np.ceil(CACHE / size), 2, 8))
    normal = functools.partial(rng.standard_normal, dtype=np.float32)
    return [Inputs(*(jnp.asarray(normal(s), dtype) for s in sizes)) for _ in range(count)]


def stored(w: jax.Array, p: bsjax.BlockPattern) -> jax.Array:
    """The values of the pattern, cut out of a dense weight."""
    (r, c), (br, bc) = p.grid, p.block
    blocks = np.asarray(w).reshape(r, br, c, bc).swapaxes(1, 2)
    return jnp.asarray(blocks[np.asarray(p.row), np.asarray(p.col)])


def _forward(x, dy, values, p, implementation):
    return bsjax.matmul(x, values, p, implementation=implementation)


def _dx(x, dy, values, p, implementation):
    return jax.vjp(lambda x: _forward(x, dy, values, p, implementation), x)[1](dy)[0]


def _dvalues(x, dy, values, p, implementation):
    return jax.vjp(lambda values: _forward(x, dy, values, p, implementation), values)[1](dy)[0]


# What training runs: the gradients are those of `matmul` itself. That they do not run the forward
# product, too, is up to the compiler, and tested.
SPARSE = {"forward": _forward, "dx": _dx, "dvalues": _dvalues}
FULL: dict[str, Callable[..., jax.Array]] = {
    "forward": lambda x, dy, w: x @ w,
    "dx": lambda x, dy, w: dy @ w.T,
    "dvalues": lambda x, dy, w: x.T @ dy,
}
PRODUCTS = tuple(SPARSE)


class Programs:
    """Compiled programs by their text, so that the cases of one size share what they can."""

    def __init__(self) -> None:
        self._compiled: dict[str, Any] = {}

    def compile[K](self, jobs: Mapping[K, tuple[Callable, tuple[Any, ...]]]) -> dict[K, Any]:
        """`{name: (f, args)} -> {name: program}`, on all cores."""
        lowered = {name: jax.jit(f).lower(*args) for name, (f, args) in jobs.items()}
        texts = {name: low.as_text() for name, low in lowered.items()}
        if len(self._compiled) > 100:
            self._compiled.clear()
        new = {text: lowered[name] for name, text in texts.items() if text not in self._compiled}
        with ThreadPoolExecutor(cores()) as pool:
            programs = pool.map(lambda low: low.compile(), new.values())
            self._compiled |= zip(new, programs, strict=True)
        return {name: self._compiled[text] for name, text in texts.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Runner:
    """A compiled program on inputs that rotate."""

    program: Any
    args: Sequence[tuple[Any, ...]]

    def __call__(self, i: int) -> jax.Array:
        return self.program(*self.args[i % len(self.args)])


def measure(
    case: Case, programs: Programs, *, seed: int, budget: float, rounds: int | None
) -> Iterator[Record]:
    """A record for each product and implementation."""
    inputs = draws(case.shape, case.tokens, case.dtype, seed)
    sparse = [(d.x, d.dy, stored(d.w, case.p), case.p) for d in inputs]
    names = dict.fromkeys(case.implementations)
    if "auto" in names:  # what it chose is found by comparing
        names |= {"xla": None, "dense": None}
    jobs = {
        (product, name): (functools.partial(SPARSE[product], implementation=name), sparse[0])
        for product in PRODUCTS
        for name in names
    }
    jobs |= {(product, DENSE): (FULL[product], inputs[0]) for product in PRODUCTS}
    compiled = programs.compile(jobs)
    want = reference(programs, *sparse[0])
    others = twins(case, inputs) if case.pattern == "barabasi_albert" else []
    options = {"describe": describe, "terms": terms, "goal": goal, "others": others}

    def clock(runs: Runs) -> tuple[str, dict[str, np.ndarray]]:
        return "wall", race(runs, budget=budget, rounds=rounds)

    for product in PRODUCTS:
        ready = {name: compiled[product, name] for name in (*names, DENSE)}
        given = (ready, sparse, inputs, want[product])
        yield from outcomes(case, product, *given, clock=clock, **options)


def outcomes(
    case: Any,
    product: str,
    programs: Mapping[str, Any],
    sparse: Sequence[tuple[Any, ...]],
    full: Sequence[tuple[Any, ...]],
    want: jax.Array,
    *,
    describe: Callable[[Any, str, str], Record],
    terms: Callable[[Any, str], int],
    goal: Callable[[Any, str], float | None],
    clock: Callable[[Runs], tuple[str, dict[str, np.ndarray]]],
    others: Sequence[tuple[Any, ...]] = (),
) -> Iterator[Record]:
    """A record of one product for each implementation: what is right is timed beside dense.

    `sparse` and `full` are inputs that rotate, `others` those of a random pattern.
    """
    ran = {name: what_ran(name, programs) for name in case.implementations}
    wrong = {
        name: differs(programs[name](*sparse[0]), want, case.dtype, terms(case, product))
        for name in set(ran.values())
    }
    runs = {name: Runner(programs[name], sparse) for name in wrong if not wrong[name]}
    if others and "xla" in runs:
        runs[RANDOM] = Runner(programs["xla"], others)
    by, times = clock(runs | {DENSE: Runner(programs[DENSE], full)})
    for name in case.implementations:
        temporary = temporary_bytes(programs[name])
        yield {
            **describe(case, product, name),
            "program": ran[name],
            "temporary_bytes": temporary,
            "temporary_ratio": ratio_to_arguments(temporary, sparse[0]),
            "refused": wrong[ran[name]],
            **({} if wrong[ran[name]] else timing(times, ran[name], goal(case, name), by)),
        }


def what_ran(name: str, programs: Mapping[str, Any]) -> str:
    """The implementation that `auto` chose, if the machine code is that of another. Then they are
    timed once, for both."""
    if name == "auto":
        for other in ("xla", "dense"):
            if canonical(programs[other]) == canonical(programs["auto"]):
                return other
    return name


def canonical(program: Any) -> str:
    """The text of a compiled program, without the names that its source happened to have."""
    text = re.sub(r"(?s)\A.*?\n(?=%|ENTRY)", "", program.as_text())
    text = re.sub(r", metadata=\{[^}]*\}|[\w.\-]+: ", "", text)
    names: dict[str, str] = {}
    return re.sub(r"%[\w.\-]+", lambda name: names.setdefault(name[0], f"%{len(names)}"), text)


def twins(case: Case, inputs: Sequence[Inputs]) -> list[tuple[Any, ...]]:
    """The same inputs with a random pattern of equally many blocks: the same program runs both."""
    r, c = case.p.grid
    mask = patterns.random((r, c), case.p.nnz / (r * c), seed=1)
    p = bsjax.BlockPattern.from_mask(mask, case.p.block)
    return [(d.x, d.dy, stored(d.w, p), p) for d in inputs]


def describe(case: Case, product: str, implementation: str) -> Record:
    """What a record is about."""
    return {
        "benchmark": "matmul",
        "product": product,
        "shape": list(case.shape),
        "tokens": case.tokens,
        "dtype": case.dtype,
        "pattern": case.pattern,
        "block": list(case.p.block),
        "density": round(case.p.density, 6),
        "density_asked": case.density,
        "stored_blocks": case.p.nnz,
        "implementation": implementation,
        "peer": False,
        "refused": None,
        "skipped": None,
    }


def timing(times: dict[str, np.ndarray], name: str, wanted: float | None, clock: str) -> Record:
    """Medians and quartiles of one run, and of its pairs with the stored dense weight."""
    record: Record = {"clock": clock} | beside(times[name], times[DENSE])
    if RANDOM in times and name == "xla":
        record |= quartiles({"over_random": times[name] / times[RANDOM]})
    return record | {"goal": wanted, "met": None if wanted is None else record["ratio"] <= wanted}


def reference(programs: Programs, x: Any, dy: Any, values: Any, p: Any) -> dict[str, jax.Array]:
    """y, dx and dvalues by the reference's own autodiff, in float32 from the same inputs."""

    def products(x, dy, values, p):
        def forward(x, values):
            return bsjax.matmul(x, values, p, implementation="reference")

        y, backward = jax.vjp(forward, x, values)
        return dict(zip(PRODUCTS, (y, *backward(dy)), strict=True))

    x, dy, values = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (x, dy, values))
    args = (x, dy, values, p)
    return programs.compile({"reference": (products, args)})["reference"](*args)


def terms(case: Case, product: str) -> int:
    """The most products that one number of the result sums."""
    mask, (br, bc) = np.asarray(case.p.mask()), case.p.block
    most = {
        "forward": br * mask.sum(0).max(initial=0),
        "dx": bc * mask.sum(1).max(initial=0),
        "dvalues": case.tokens,
    }
    return max(1, int(most[product]))


def differs(got: Any, want: Any, dtype: str, terms: int) -> str | None:
    """How `got` differs from the reference by more than rounding, or None if it does not."""
    allowed = tolerance(dtype, terms)
    bad, worst = _misfits(jnp.asarray(got), jnp.asarray(want), **allowed)
    if not bad:
        return None
    return (
        f"{bad} of {np.size(want)} numbers differ from the reference, by up to {worst:.3g} "
        f"where rounding explains {allowed['atol']:.3g}"
    )


@jax.jit
def _misfits(got: jax.Array, want: jax.Array, rtol: Any, atol: Any) -> tuple[jax.Array, jax.Array]:
    """How many numbers are not close, and the largest error among them."""
    error = jnp.abs(got.astype(want.dtype) - want)
    bad = ~(error <= atol + rtol * jnp.abs(want))  # `not <=`, because NaN is no small number
    return bad.sum(), jnp.where(bad, jnp.nan_to_num(error, nan=jnp.inf), 0).max(initial=0)


def temporary_bytes(program: Any) -> int | None:
    """What the compiled program takes beside its arguments and its result."""
    analysis = program.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def ratio_to_arguments(temporary: int | None, args: tuple[Any, ...]) -> float | None:
    """Temporary bytes over those of x, y and values: the three that every product touches."""
    x, dy, values, _ = args
    return (
        None if temporary is None else round(temporary / (x.nbytes + dy.nbytes + values.nbytes), 4)
    )
