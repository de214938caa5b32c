"""Cases of the attention kernels: random blocks, and what NumPy says of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import attention, attention_config, attention_gradients, attention_lists
from pallas_kernels._scores import Scores
from tests.helpers import normal
from tests.ops.attention import elements, oracle

CAUSAL = {"mask": lambda head, q, k: q >= k}
BEFORE = lambda head, q, k: q > k  # noqa: E731  the first query has a block, and sees nothing
SEGMENTS = {"lengths": True, "segments": True}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """Sizes of an attention over random blocks, in whole blocks; the last block-row is empty."""

    n: int = 1
    heads: tuple[int, int] = (2, 2)  # of queries, and of keys
    blocks: tuple[int, int] = (3, 3)
    block: tuple[int, int] = (64, 64)
    d: int = 64
    lists: str = "one"  # or "head", or "element"
    density: float = 0.6
    sinks: bool = False
    scores: Any = dataclasses.field(default_factory=dict)  # of `Scores`, but for the scale

    @property
    def lengths(self) -> tuple[int, int]:
        return self.blocks[0] * self.block[0], self.blocks[1] * self.block[1]

    @property
    def spec(self) -> Scores:
        return Scores(scale=self.d**-0.5, **self.scores)

    def inputs(self, dtype: Any, seed: int = 0) -> "Inputs":
        rng = np.random.default_rng(seed)
        (h, g), (q, k) = self.heads, self.lengths
        shapes = [(self.n, q, h, self.d), *[(self.n, k, g, self.d)] * 2, (self.n, q, h, self.d)]
        q_, k_, v_, dy = (normal(rng, shape, dtype) for shape in shapes)
        lead = {"one": (1, 1), "head": (1, h), "element": (self.n, h)}[self.lists]
        mask = rng.random((*lead, *self.blocks)) < self.density
        mask[..., 0, 0], mask[..., -1, :] = True, False
        limits: list[Any] = []
        if self.spec.lengths:
            limits.append(rng.integers(k // 2, k, (self.n,)))
        if self.spec.segments:
            limits += [np.sort(rng.integers(0, 3, (self.n, one))) for one in (q, k)]
        sinks = rng.normal(size=h).astype(np.float32) if self.sinks else None
        seen = elements(mask, self.block, self.lengths) & self.visible(limits)
        limits = [jnp.asarray(a, jnp.int32) for a in limits]
        return Inputs(q_, k_, v_, dy, mask, limits, sinks, seen)

    def visible(self, limits: list[Any]) -> Any:
        """`[n or 1, h or 1, q, k]`"""
        spec, (q, k), limits = self.spec, map(np.arange, self.lengths), list(limits)
        seen = np.ones((1, 1, len(q), len(k)), bool)
        if spec.mask is not None:
            each = [spec.mask(i, q[:, None], k[None]) for i in range(self.heads[0])]
            seen = seen & np.stack([np.broadcast_to(one, seen.shape[2:]) for one in each])[None]
        if spec.keys is not None:
            seen = seen & (k < spec.keys)
        if spec.lengths:
            seen = seen & (k < np.asarray(limits.pop(0))[:, None])[:, None, None]
        if spec.segments:
            own, other = map(np.asarray, limits)
            seen = seen & (own[:, :, None] == other[:, None])[:, None]
        return seen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    q: Any
    k: Any
    v: Any
    dy: Any
    mask: Any
    limits: list[Any]
    sinks: Any
    seen: Any


def configs(case: Case, workers: int, **changes: Any) -> tuple[Any, Any, Any]:
    """Of the three kernels, as the heuristic has it, but for the `changes`."""
    shared = case.heads[0] // case.heads[1] if case.lists == "one" else 1
    chosen = (
        attention_config.for_forward(case.d, case.block, shared=shared, workers=workers),
        attention_config.for_dq(
            case.d, case.block, shared=shared, everywhere=case.spec.everywhere, workers=workers
        ),
        attention_config.for_dkv(case.d, case.block, crowded=case.spec.crowded, workers=workers),
    )
    return tuple(dataclasses.replace(one, **changes) for one in chosen)  # pyright: ignore


def kernels(case: Case, workers: int, **changes: Any) -> Callable[..., tuple[Any, ...]]:
    """(q, k, v, dy, sinks, own, other, partial, limits) to (y, lse, dq, dk, dv)."""
    forward, dq, dkv = configs(case, workers, **changes)
    (h, g), (r, c), block = case.heads, case.blocks, case.block

    order = functools.partial(attention_lists.order, n=case.n, queries=h)

    def run(q, k, v, dy, sinks, own, other, partial, limits):
        rows = attention_lists.of_pattern(own, other, partial, (r, c))
        columns = attention_lists.of_pattern(other, own, partial, (c, r))
        options = {"block": block}
        queries = order(rows, forward, heads=h, side=block[0])
        y, lse = attention.forward(
            q, k, v, rows, queries, forward, case.spec, *limits, sinks=sinks, **options
        )
        delta = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1).swapaxes(1, 2)
        saved = (q, k, v, dy, attention_gradients.exponent(lse), delta)
        queries = order(rows, dq, heads=h, side=block[0])
        keys = order(columns, dkv, heads=g, side=block[1])
        got = attention_gradients.dq(*saved, rows, queries, dq, case.spec, *limits, **options)
        both = attention_gradients.dkv(*saved, columns, keys, dkv, case.spec, *limits, **options)
        return y, lse, got, *both

    return run


def arguments(case: Case, inputs: Inputs) -> tuple[Any, ...]:
    """Of what `kernels` returns; the lists have spare slots."""
    r, c = case.blocks
    whole = case.visible(inputs.limits).reshape(-1, r, case.block[0], c, case.block[1])
    mask, full = inputs.mask.reshape(-1, r, c), whole.all((0, 2, 4))
    capacity = int(mask.sum((1, 2)).max()) + 2
    own, other = (np.full((len(mask), capacity), size, np.int32) for size in (r, c))
    for i, one in enumerate(mask):
        found = np.nonzero(one)
        own[i, : len(found[0])], other[i, : len(found[0])] = found
    partial = ~np.pad(full, ((0, 1), (0, 1)))[own, other]
    arrays = (inputs.q, inputs.k, inputs.v, inputs.dy, inputs.sinks, own, other, partial)
    return (*arrays, inputs.limits)


def conforms(case: Case, inputs: Inputs, got: tuple[Any, ...]) -> None:
    """Compares what `kernels` returns with NumPy in float64.

    Weights and their gradients are rounded to the dtype of q before they are multiplied, which may
    change a sum by half its `eps` of the sum of absolute values, and so is each result. An error of
    y changes `delta`, and with it all gradients of scores of that query. The rest is float32.
    """
    q, k, v, dy = (np.asarray(a, np.float64) for a in (inputs.q, inputs.k, inputs.v, inputs.dy))
    options = {"scale": case.spec.scale, "softcap": case.spec.softcap}
    want = oracle(q, k, v, dy, inputs.seen, sinks=inputs.sinks, **options)
    half = float(jnp.finfo(inputs.q.dtype).eps) / 2
    least = 4 * float(jnp.finfo(jnp.float32).eps) * (case.d + case.lengths[1])
    group, (g, d) = case.heads[0] // case.heads[1], k.shape[2:]
    keys, values = (np.repeat(a, group, 2) for a in (k, v))
    weights, slope, lse = softmax(case, inputs, q, keys)
    y = np.einsum("nhqk,nkhd->nqhd", weights, np.abs(values))
    off = (np.abs(dy) * 2 * half * y).sum(3).swapaxes(1, 2)[..., None]
    gradient = np.einsum("nqhd,nkhd->nhqk", dy, values)
    gradient = gradient - (weights * gradient).sum(3, keepdims=True)
    scores = weights * (half * np.abs(gradient) + off) * slope * abs(case.spec.scale)

    def shared(a: Any) -> Any:
        return a.reshape(*a.shape[:2], g, group, d).sum(3)

    allowed = (
        2 * half * y,
        np.zeros(lse.shape),
        np.einsum("nhqk,nkhd->nqhd", scores, np.abs(keys)) + half * np.abs(want.q),
        shared(np.einsum("nhqk,nqhd->nkhd", scores, np.abs(q))) + half * np.abs(want.k),
        shared(np.einsum("nhqk,nqhd->nkhd", half * weights, np.abs(dy))) + half * np.abs(want.v),
    )
    names, wanted = ("y", "lse", "dq", "dk", "dv"), (want.out, lse, want.q, want.k, want.v)
    for name, one, right, most in zip(names, got, wanted, allowed, strict=True):
        assert one.dtype == (jnp.float32 if name == "lse" else inputs.q.dtype)
        one = np.asarray(one, np.float64)
        same = one == right  # infinities
        off = np.where(same, 0, np.abs(np.where(same, 0, one) - np.where(same, 0, right)))
        assert not np.isnan(one).any(), name
        assert (off <= most + least).all(), (name, off.max(), (off / (most + least)).max())


def softmax(case: Case, inputs: Inputs, q: Any, keys: Any) -> tuple[Any, Any, Any]:
    """Weights, slopes of scores `[n, h, q, k]` and logarithms `[n, h, q]`, all at once."""
    cap, slope = case.spec.softcap, np.float64(1)
    s = np.einsum("nqhd,nkhd->nhqk", q, keys) * case.spec.scale
    if cap is not None:
        s = cap * np.tanh(s / cap)
        slope = 1 - (s / cap) ** 2
    s = np.where(inputs.seen, s, -np.inf)
    sinks = -np.inf if inputs.sinks is None else inputs.sinks[:, None, None]
    both = np.concatenate([s, np.broadcast_to(sinks, (*s.shape[:3], 1))], axis=3)
    top = both.max(3, keepdims=True)
    top = np.where(top == -np.inf, 0, top)
    total = np.exp(both - top).sum(3, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    return np.exp(s - top) / np.where(total == 0, 1, total), slope, lse


CASES = {
    "causal, shared heads": Case(heads=(2, 1), blocks=(3, 3), scores=CAUSAL, sinks=True),
    "large blocks, per head": Case(
        blocks=(2, 2), block=(128, 128), d=128, lists="head", scores={"softcap": 3.0}
    ),
    "segments, per element": Case(
        n=2, blocks=(2, 3), block=(64, 128), lists="element", scores=SEGMENTS
    ),
    "split, ragged keys": Case(
        heads=(2, 1), blocks=(2, 2), d=192, scores={"keys": 100, "mask": BEFORE}
    ),
}
MORE = {
    "heads of 32": Case(blocks=(2, 3), block=(128, 64), d=32, scores=CAUSAL),
    "heads of 96": Case(blocks=(3, 2), block=(64, 128), d=96, scores=CAUSAL, sinks=True),
    "heads of 256": Case(blocks=(2, 2), block=(128, 64), d=256, scores=CAUSAL),
    "blocks of 192 x 256": Case(blocks=(3, 2), block=(192, 256), scores=CAUSAL),
    "negative scale": Case(scores={"softcap": 2.0, "mask": lambda head, q, k: (q + k) % 3 != head}),
    "many batch elements": Case(n=3, heads=(6, 2), blocks=(4, 4), d=128, scores=SEGMENTS),
    "dense": Case(density=1.0, blocks=(4, 4)),
    "nothing but the first": Case(density=0.0, sinks=True),
}


@functools.cache
def compiled(case: Case, workers: int, **changes: Any) -> Callable[..., tuple[Any, ...]]:
    return jax.jit(kernels(case, workers, **changes))
