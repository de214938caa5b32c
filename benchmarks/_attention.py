"""Measures attention beside the dense one. A wrong result has no speed: it is checked first."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bsjax
from benchmarks._timing import beside, clocked
from bsjax import masks

type Record = dict[str, Any]

FORWARD, BOTH = WHAT = ("forward", "forward and backward")
GOAL = 0.25  # of dense time, in the case that GOAL_CASE names
GOAL_CASE = {"tokens": 4096, "head_dim": 64, "dtype": "float32", "sparsity": 0.9}
MOST_SCORES = 2**29  # of the dense peer: more do not fit the memory of a laptop
CHECKED = 32  # queries that are compared


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One attention."""

    tokens: int
    heads: int
    head_dim: int
    block: int
    dtype: str
    pattern: str
    sparsity: float
    implementation: str


class Made(NamedTuple):
    """Blocks, flags of full ones, and the causal window inside them if there is one."""

    p: bsjax.BlockPattern
    full: Any = None
    window: int | None = None

    @property
    def causal(self) -> bool:
        return self.window is not None

    @property
    def mask(self) -> Any:
        """Of elements."""
        return None if self.window is None else masks.causal() & masks.window(self.window)


def _random(case: Case, seed: int) -> Made:
    side = -(-case.tokens // case.block)
    mask = bsjax.patterns.random((side, side), 1 - case.sparsity, seed=seed)
    return Made(bsjax.BlockPattern.from_mask(mask, case.block))


def _window(case: Case, seed: int) -> Made:
    """A causal window that stores about the share that is asked for."""
    side = -(-case.tokens // case.block)
    blocks = np.arange(1, side + 1)  # stored on average, of a band so many blocks wide
    stored = (blocks * side - blocks * (blocks - 1) / 2) / side**2
    width = int(blocks[np.abs(stored - (1 - case.sparsity)).argmin()]) - 1
    return window(case, width * case.block)


def window(case: Case, width: int) -> Made:
    """A causal window of that width. The longest is causal attention."""
    mask = masks.causal() & masks.window(width)
    p, full = mask.pattern((case.tokens, case.tokens), case.block)
    return Made(p, full, width)


PATTERNS = {"random": _random, "window": _window}
# wanted of the first, over the FLOP/s of cuDNN: 0.80 forward, 0.65 backward
ON_GPU = tuple(
    Case(16384, 8, 128, 128, "bfloat16", pattern, sparsity, "mosaic")
    for pattern, sparsity in (("window", 0.9), ("random", 0.9), ("random", 0.5))
)


def measure(
    case: Case, what: Sequence[str], seed: int, rounds: int | None, budget: float
) -> Iterator[Record]:
    """A record for the forward pass, and one with the gradients."""
    made = PATTERNS[case.pattern](case, seed)
    about = {"benchmark": "attention"} | describe(case, made)
    about["goal"] = GOAL if all(getattr(case, k) == v for k, v in GOAL_CASE.items()) else None
    library = peer(case.dtype)
    if library == "xla" and case.heads * case.tokens**2 > MOST_SCORES:
        about["skipped"] = "dense attention would need too much memory"
    args, ours, theirs = draws(case, seed), sparse(made, case.implementation), dense(made, library)
    pairs = {
        FORWARD: (jax.jit(ours), jax.jit(theirs)),
        BOTH: (with_gradients(ours), with_gradients(theirs)),
    }
    try:
        if not about["skipped"]:
            both, kernels = pairs[BOTH][0], case.implementation == "mosaic"
            about["refused"] = wrong(made, both, args, seed, rounds_probabilities=kernels)
    except ValueError as error:
        if "cannot run here" not in str(error):
            raise
        about["skipped"] = str(error)
    for name in what:
        record = about | {"what": name, "peer": library}
        if not (record["refused"] or record["skipped"]):
            given = args if name != FORWARD else args[:3]
            record |= _timed(pairs[name], given, made, rounds, budget)
            # FLOP/s of stored blocks over those that the dense peer needs
            needed = 0.5 if made.causal and library == "cudnn" else 1.0
            record["efficiency"] = made.p.density / needed / record["ratio"]
            record["met"] = record["goal"] and record["ratio"] <= record["goal"]
        yield record


def describe(case: Case, made: Made) -> Record:
    """What a record says of a case, timed or not."""
    more = {"stored": made.p.density, "refused": None, "skipped": None}
    return dataclasses.asdict(case) | more


def draws(case: Case, seed: int) -> tuple[jax.Array, ...]:
    """q, k, v, and a cotangent of the result."""
    rng = np.random.default_rng(seed)
    shape = (1, case.tokens, case.heads, case.head_dim)
    return tuple(jnp.asarray(rng.normal(size=shape)).astype(case.dtype) for _ in range(4))


def sparse(made: Made, implementation: Any) -> Callable[..., Any]:
    """`f(q, k, v, blocks, full)` of this library."""

    def attend(q: Any, k: Any, v: Any, p: Any, full: Any) -> Any:
        return bsjax.attention(q, k, v, p, mask=made.mask, full=full, implementation=implementation)

    return attend


def dense(made: Made, library: Any) -> Callable[..., Any]:
    """`f(q, k, v)` of JAX."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=made.causal, implementation=library)

    return attend


def peer(dtype: Any) -> str:
    """What JAX calls the fastest dense attention here."""
    fused = jax.default_backend() == "gpu" and jnp.dtype(dtype).itemsize == 2
    return "cudnn" if fused else "xla"


def with_gradients(f: Callable[..., Any]) -> Callable[..., Any]:
    """`(y, dq, dk, dv)` of `(q, k, v, dout, ...)`, compiled."""

    def run(q: Any, k: Any, v: Any, dout: Any, *rest: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: f(q, k, v, *rest), q, k, v)
        return out, *pull(dout)

    return jax.jit(run)


def _timed(pair: Any, args: Any, made: Made, rounds: int | None, budget: float) -> Record:
    ours, dense = pair
    runs = {
        "ours": lambda i: ours(*args, made.p, made.full),
        "dense": lambda i: dense(*args),
    }
    clock, times = clocked(runs, rounds=rounds, budget=budget)
    return {"clock": clock} | beside(**times)


def wrong(
    made: Made,
    run: Callable[..., Any],
    args: Any,
    seed: int,
    *,
    rounds_probabilities: bool = False,
) -> str | None:
    """What is wrong with a result or a gradient, by dense attention of a few queries: the cotangent
    of all others is zero. Kernels multiply values by probabilities in 16 bits."""
    q, k, v, dout = args
    tokens, (br, bc) = q.shape[1], made.p.block
    rows = np.sort(np.random.default_rng(seed).choice(tokens, min(CHECKED, tokens), replace=False))
    only = jnp.zeros(tokens, q.dtype).at[rows].set(1)
    got = run(q, k, v, dout * only[None, :, None, None], made.p, made.full)
    seen = np.repeat(np.asarray(made.p.mask())[rows // br], bc, 1)[:, :tokens]
    if made.mask is not None:
        seen = seen & np.asarray(made.mask(0, rows[:, None], np.arange(tokens)[None]))
    some = jnp.asarray(seen.any(1))[None, :, None, None]  # a query without keys gives zeros

    def few(q: Any, k: Any, v: Any) -> Any:
        out = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(seen)[None, None])
        return jnp.where(some, out, 0)

    q, k, v, dout = (a.astype(jnp.float32) for a in args)
    with jax.default_matmul_precision("highest"):
        want, pull = jax.vjp(few, q[:, rows], k, v)
        want = want, *pull(dout[:, rows])
    # a score sums d products, its gradient twice as many, and a row as many as it sees
    terms = 3 * q.shape[3] + int(seen.sum(1).max())
    eps, eps32 = (float(jnp.finfo(d).eps) for d in (args[0].dtype, jnp.float32))
    for name, a, b in zip(("y", "dq", "dk", "dv"), got, want, strict=True):
        a = np.asarray(a[:, rows] if name in ("y", "dq") else a).astype(np.float32)
        if rounds_probabilities:  # half a unit of each, and half a unit of the result
            off = float(np.linalg.norm(a - np.asarray(b)) / np.linalg.norm(np.asarray(b)))
            if not off <= eps:
                return f"{name} is off by {off:.2g} of its norm"
            continue
        error = np.abs(a - np.asarray(b)) - eps / 2 * np.abs(np.asarray(b))
        if not error.max() <= 4 * eps32 * terms:
            return f"{name} is off by {error.max():.2g}"
    return None


def line(one: Record) -> str:
    """A record for people."""
    where = f"{one['tokens']} tokens {one['pattern']} b={one['block']} {one['stored']:.3f}"
    where += "" if one["dtype"] == "float32" else f" {one['dtype']}"
    text = f"{where} {one['implementation']} {one['what']}: "
    if one["refused"]:
        return f"{text}WRONG, not timed: {one['refused']}"
    if one["skipped"]:
        return f"{text}skipped ({one['skipped']})"
    text += f"{1 / one['ratio']:.1f}x ({1 / one['ratio_high']:.1f}-{1 / one['ratio_low']:.1f}) "
    if one.get("peer") == "cudnn":
        return f"{text}as fast as cuDNN, {one['ms']:.3f} ms, efficiency {one['efficiency']:.2f}"
    return f"{text}as fast as dense, {one['ms']:.1f} ms"


def summary(records: Sequence[Record]) -> Iterator[str]:
    """Goals, and where dense was faster."""
    wanted = [one for one in records if one.get("met") is not None]
    if wanted:
        met = sum(bool(one["met"]) for one in wanted)
        yield f"goals ({1 / GOAL:.0f} times as fast as dense) met: {met} of {len(wanted)}"
        yield from (f"  missed: {line(one)}" for one in wanted if not one["met"])
    slow = [one for one in records if one.get("ratio", 0) > 1]
    yield from (f"slower than dense: {line(one)}" for one in slow)
