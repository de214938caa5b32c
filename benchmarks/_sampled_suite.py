"""Measures a sampled layer beside the dense one: y, dx and dw, scores and sampling included.

A wrong result has no speed: every program that is timed is first run on numbers of which the
reference certainly draws the same sample, and compared with it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bsjax
from benchmarks import _gpu_cases as gpu_cases
from benchmarks import _gpu_kernels as kernels
from benchmarks import _gpu_suite as suite
from benchmarks import _products as products
from benchmarks import _sampled_cases as cases
from benchmarks._gpu_clock import Times, measured
from benchmarks._gpu_floor import Ceilings
from benchmarks._products import DENSE, Inputs, Programs, Record, Runner
from benchmarks._sampled_cases import SampledCase
from benchmarks._timing import race

KEYS = 8  # that rotate
CORNER = 8  # tokens and features of the product that only shows what was sampled
RESULTS = {"layer": ("y", "dx", "dw"), "forward": ("y",), "dx": ("dx",), "dw": ("dw",)}
BACKWARD = ("dx", "dw")
CANNOT = "cannot run here"  # how an implementation says so


def _product(x: Any, w: Any, key: Any, case: SampledCase) -> jax.Array:
    return bsjax.sampled_matmul(x, w, key=key, **case.options)


def _layer(x, dy, w, key, case):
    y, pull = jax.vjp(lambda x, w: _product(x, w, key, case), x, w)
    return y, *pull(dy)


def _forward(x, dy, w, key, case):
    return (_product(x, w, key, case),)


def _pull(x, dy, w, key, case):
    """What the forward pass keeps for the backward pass."""
    return jax.vjp(lambda x, w: _product(x, w, key, case), x, w)[1]


def _sampler(x, dy, w, key, case):
    """Scores and a sample by them, with a product so small that it does not count."""
    scores = None
    if case.sampler != "uniform":

        def norms(squares: jax.Array) -> jax.Array:
            return jnp.sqrt(squares.reshape(-1, case.block).sum(1))

        rows = jnp.square(w.astype(jnp.float32)).sum(1)
        z = norms(jnp.square(x.astype(jnp.float32)).sum(0)) * norms(rows)
        # the norm of a group is that of its first feature, to the last bit
        scores = jnp.zeros((len(z), case.block)).at[:, 0].set(z).ravel()
    options = case.options | {"implementation": "auto", "scores": scores}
    return (bsjax.sampled_matmul(x[:CORNER], w[:, :CORNER], key=key, **options),)


def _gather(x, index, w, case):
    """Copies of groups of features of x and rows of w."""
    n, m = len(x), w.shape[1]
    columns = x.reshape(n, -1, case.block)[:, index].reshape(n, -1)
    return columns, w.reshape(-1, case.block * m)[index].reshape(-1, m)


def _dense(x, dy, w):
    return x @ w, dy @ w.T, x.T @ dy


FULL: dict[str, Callable[..., Any]] = {
    "layer": _dense,
    "forward": products.FULL["forward"],
    "dx": products.FULL["dx"],
    "dw": products.FULL["dvalues"],
}


def measure(
    case: SampledCase,
    programs: Programs,
    ceilings: Ceilings,
    *,
    parts: Sequence[str] = cases.PARTS,
    seed: int = 0,
    clock: Callable[..., dict[str, Times]] = measured,
) -> Iterator[Record]:
    """A record for each part that is asked for and that the case has."""
    parts = [part for part in case.parts if part in parts]
    refused, ready = prepared(case, programs, parts, seed)
    for part in parts:
        record = describe(case, part) | cases.predicted(case, part, ceilings)
        reason = refused.get(part)
        if reason:
            name = "skipped" if CANNOT in reason else "refused"
            yield record | {name: reason}
            continue
        record |= suite.timing(clock(ready[part]), case.implementation, record["ideal"])
        if part in ("sampler", "gather"):  # `ratio` is the share of the dense layer's time
            record |= {"efficiency": None, "speedup": None}
        record["of_floor"] = record["floor_ms"] / record["ms"] if record["floor_ms"] else None
        wanted = cases.goal(case, part)
        yield record | {"goal": wanted, "met": gpu_cases.met(wanted, record)}


def raced(runs: Any, *, rounds: int) -> dict[str, Times]:
    """The clock of a CPU: pairs of runs, each until its result is there."""
    times = race(runs, rounds=rounds)
    return {name: Times("wall", one, one, None, "a CPU") for name, one in times.items()}


def describe(case: SampledCase, part: str) -> Record:
    """What a record is about."""
    return {
        "benchmark": "sampled",
        "case": case.name,
        "part": part,
        **case.options,
        "tokens": case.tokens,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "refused": None,
        "skipped": None,
    }


class Tried(NamedTuple):
    """Programs by their part: ready to be timed, with their results of the check, or broken."""

    ready: dict[str, Callable[[int], Any]]
    results: dict[str, Any]
    broken: dict[str, str]


def prepared(
    case: SampledCase, programs: Programs, parts: Sequence[str], seed: int
) -> tuple[dict[str, str], dict[str, dict[str, Callable[[int], Any]]]]:
    """Of each part why it is not timed, or what is: the part and its dense counterpart."""
    inputs = suite.draws(case, seed)
    keys = jax.random.split(jax.random.key(seed), KEYS + 1)
    check = (*check_inputs(case, seed), keys[0])
    try:
        jax.eval_shape(functools.partial(_layer, case=case), *check)
    except Exception as error:
        return dict.fromkeys(parts, kernels.said(error)), {}
    args = [(*inputs[i % len(inputs)], key) for i, key in enumerate(keys[1:])]
    ours = _tried(case, programs, parts, check, args)
    refused = dict(ours.broken)
    want = wanted(case, programs, check)
    if why := wrong_without_key(case, programs, check, want):
        refused |= dict.fromkeys(parts, why)
    refused |= {part: why for part, got in ours.results.items() if (why := wrong(part, got, want))}
    ready = ours.ready
    if "gather" in parts:
        ready["gather"] = _gathers(case, programs, inputs, seed)
    full = {name: (f, inputs[0]) for name, f in FULL.items()}
    dense = {name: Runner(one, inputs) for name, one in programs.compile(full).items()}
    return refused, {
        part: {case.implementation: run, DENSE: dense.get(part, dense["layer"])}
        for part, run in ready.items()
    }


def _tried(
    case: SampledCase, programs: Programs, parts: Sequence[str], check: Any, args: Sequence[Any]
) -> Tried:
    named = {"layer": _layer, "forward": _forward, "sampler": _sampler}
    jobs = {
        name: (functools.partial(f, case=case), check) for name, f in named.items() if name in parts
    }
    compiled, broken = suite.compile_each(programs, jobs)
    ready = {name: Runner(program, args) for name, program in compiled.items()}
    results = {name: compiled[name](*check) for name in RESULTS if name in compiled}
    if back := [name for name in BACKWARD if name in parts]:
        try:
            backward, kept = _backward(case, back, [check, *args[:2]])
        except Exception as error:
            broken |= dict.fromkeys(back, kernels.said(error))
        else:
            ready |= {name: Runner(program, kept[1:]) for name, program in backward.items()}
            results |= {name: program(*kept[0]) for name, program in backward.items()}
    return Tried(ready, results, broken)


def _backward(
    case: SampledCase, parts: Sequence[str], calls: Sequence[Any]
) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """The programs of dx and dw, and what they take for each of the calls: what the forward pass
    keeps, and dy."""
    programs = Programs()  # its own: what is kept has a structure that its text does not show
    pull = programs.compile({"": (functools.partial(_pull, case=case), calls[0])})[""]
    args = [(pull(*call), call[1]) for call in calls]

    def back(pull: Any, dy: Any, i: int) -> Any:
        return (pull(dy)[i],)

    jobs = {name: (functools.partial(back, i=BACKWARD.index(name)), args[0]) for name in parts}
    return programs.compile(jobs), args


def _gathers(case: SampledCase, programs: Programs, inputs: Sequence[Inputs], seed: int) -> Runner:
    k, rng = case.shape[0], np.random.default_rng(seed)
    groups, taken = k // case.block, case.sampled(k) // case.block
    index = [np.sort(rng.permutation(groups)[:taken]) for _ in inputs]
    args = [(d.x, jnp.asarray(i, jnp.int32), d.w) for d, i in zip(inputs, index, strict=True)]
    gather = functools.partial(_gather, case=case)
    return Runner(programs.compile({"": (gather, args[0])})[""], args)


def check_inputs(case: SampledCase, seed: int) -> Inputs:
    """Signs times powers of two: 1 or 2 by the row, times 1 or 2 by the column. Sums of their
    squares are not rounded, in whatever order, so that a program and its reference see the same
    scores and draw the same sample, however they are compiled."""
    (k, m), n = case.shape, case.tokens
    keys = jax.random.split(jax.random.key(seed + 1), 3)
    return Inputs(
        *(
            _signed_powers(key, sides, case.dtype)
            for key, sides in zip(keys, ((n, k), (n, m), (k, m)), strict=True)
        )
    )


@functools.partial(jax.jit, static_argnames=("sides", "dtype"))
def _signed_powers(key: Any, sides: tuple[int, int], dtype: str) -> jax.Array:
    for_signs, *for_sides = jax.random.split(key, 3)
    rows, columns = (
        1 + jax.random.bernoulli(one, shape=(side,)).astype(dtype)
        for one, side in zip(for_sides, sides, strict=True)
    )
    return jax.random.rademacher(for_signs, sides, dtype) * rows[:, None] * columns[None, :]


def wanted(case: SampledCase, programs: Programs, check: Any) -> dict[str, jax.Array]:
    """y, dx and dw of the reference, in float32 from the same numbers and key; and the exact y."""
    x, dy, w, key = check
    x, dy, w = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (x, dy, w))
    other = dataclasses.replace(case, implementation="reference")

    def reference(x, dy, w, key):
        exact = jnp.matmul(x, w, precision="highest")
        return *_layer(x, dy, w, key, other), exact

    found = programs.compile({"": (reference, (x, dy, w, key))})[""](x, dy, w, key)
    return dict(zip(("y", "dx", "dw", "exact"), found, strict=True))


def wrong(part: str, got: Any, want: dict[str, jax.Array]) -> str | None:
    """How the results of a part differ from the reference by more than rounding."""
    for name, one in zip(RESULTS[part], got, strict=True):
        if why := kernels.wrong(one, want[name]):
            return f"{name} is {why}"
    return None


def wrong_without_key(
    case: SampledCase, programs: Programs, check: Any, want: dict[str, jax.Array]
) -> str | None:
    """Whether the product is not exact where nothing is sampled."""
    x, dy, w, _ = check
    job = (lambda x, dy, w: _product(x, w, None, case), (x, dy, w))
    compiled, broken = suite.compile_each(programs, {"": job})
    if broken:
        return f"without a key: {broken['']}"
    why = kernels.wrong(compiled[""](x, dy, w), want["exact"])
    return why and f"without a key y is {why}"


def lines(records: list[Record]) -> Iterator[str]:
    """For people: a line for each part."""
    for one in records:
        start = f"{one['case']:64} {one['part']:8}"
        if one["refused"] or one["skipped"]:
            name = "REFUSED" if one["refused"] else "not measured"
            yield f"{start} {name}: {one['refused'] or one['skipped']}"
            continue
        speed = f"speed-up {one['speedup']:.2f}" if one["speedup"] else f"share {one['ratio']:.3f}"
        goals = "".join(
            f"; {name} {one[name]:.2f} of {value:g} {'met' if one['met'][name] else 'MISSED'}"
            for name, value in one["goal"].items()
        )
        yield (
            f"{start} {one['ms']:9.4f} ms ({one['clock']}), floor {one['floor_ms']:.4f}, "
            f"dense {one['dense_ms']:.4f}, {speed}{goals}"
        )
