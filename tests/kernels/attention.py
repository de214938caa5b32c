"""Cases of the attention kernels: random blocks, and what NumPy says of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bsjax.ops import _attention_dropout as dropout
from pallas_kernels import attention, attention_config, attention_gradients, attention_lists
from pallas_kernels._scores import Dropout, Scores
from tests.helpers import normal
from tests.ops.attention import elements, kept, oracle


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
    masks: tuple[str, ...] = ()  # by slot, of "rows", "columns" or "all"
    numbers: bool = False  # a bias of each slot
    rate: float = 0.0  # of a dropout

    @property
    def lengths(self) -> tuple[int, int]:
        return self.blocks[0] * self.block[0], self.blocks[1] * self.block[1]

    @property
    def spec(self) -> Scores:
        given = {"arrays": len(self.masks), "numbers": self.numbers, **self.scores}
        if self.rate:
            hashed = functools.partial(dropout.kept, rate=self.rate)
            given["dropout"] = Dropout(hashed, self.rate)
        return Scores(scale=self.d**-0.5, **given)

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
        own, other = self.coordinates(mask)
        shape = (*lead, own.shape[1], *self.block)
        ends = {"rows": (*shape[:4], 1), "columns": (*shape[:3], 1, shape[4]), "all": shape}
        arrays = [rng.random(ends[kind]) < 0.8 for kind in self.masks]
        for one in arrays:
            seen = seen & self.everywhere(one, own, other)
        numbers = rng.normal(size=shape[:3]).astype(np.float32) if self.numbers else None
        bias, drop = np.zeros(seen.shape), np.float64(1)
        if numbers is not None:
            blocks = np.broadcast_to(numbers[..., None, None], shape)
            bias = self.everywhere(blocks, own, other)
        if (function := self.spec.bias) is not None:
            at = np.arange(q)[:, None], np.arange(k)[None]
            bias = bias + np.stack([np.asarray(function(jnp.int32(i), *at)) for i in range(h)])
        limits = [jnp.asarray(a, jnp.int32) for a in limits]
        both = [limits + [words(a.swapaxes(3, 4) if i else a) for a in arrays] for i in range(2)]
        for one in both:
            one.extend([jnp.asarray(numbers)] if self.numbers else [])
        if self.rate:
            seeds = dropout.seeds(jax.random.key(seed), self.n, h)
            of_queries = dropout.words(
                seeds[:, :, None], jnp.arange(q, dtype=jnp.int32)[None, None]
            )
            drop = kept(seeds, q, k, self.rate)
            for one in both:
                one.append(jnp.stack(of_queries))
        pairs = own, other
        return Inputs(q_, k_, v_, dy, mask, limits, both, sinks, seen, pairs, bias, drop)

    def coordinates(self, mask: Any) -> tuple[Any, Any]:
        """`[lists, e]`, in an order that is not that of the lists, with spare slots."""
        r, c = self.blocks
        each = [np.argwhere(one)[::-1] for one in mask.reshape(-1, r, c)]
        capacity = max(map(len, each)) + 2
        own, other = (np.full((len(each), capacity), size, np.int32) for size in (r, c))
        for i, found in enumerate(each):
            own[i, : len(found)], other[i, : len(found)] = found.T
        return own, other

    def everywhere(self, a: Any, own: Any, other: Any) -> Any:
        """An array by slot as `[#n, #h, q, k]`, zeros where nothing is stored."""
        (r, c), (br, bc), lead = self.blocks, self.block, a.shape[:2]
        a = np.broadcast_to(a, (*a.shape[:3], br, bc)).reshape(-1, a.shape[2], br, bc)
        whole = np.zeros((len(a), r + 1, br, c + 1, bc), a.dtype)
        for i, one in enumerate(a):
            whole[i, own[i], :, other[i]] = one
        return whole[:, :r, :, :c].reshape(*lead, r * br, c * bc)

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
    arrays: Any  # what scores depend on, for tiles of queries and of keys
    sinks: Any
    seen: Any
    pairs: Any  # own and other blocks of each slot
    bias: Any
    kept: Any


def words(mask: Any) -> Any:
    """A mask by slot as bits of 32 columns each."""
    if mask.shape[4] == 1:
        return jnp.asarray(-mask.astype(np.int32).swapaxes(3, 4))
    packed = np.packbits(mask, axis=-1, bitorder="little").view(np.int32)
    return jnp.asarray(packed.swapaxes(3, 4))


def configs(case: Case, workers: int, **changes: Any) -> tuple[Any, Any, Any]:
    """Of the three kernels, as the heuristic has it, but for the `changes`."""
    shared = case.heads[0] // case.heads[1] if case.lists == "one" else 1
    crowds = {"everywhere": case.spec.everywhere, "apart": case.spec.apart}
    chosen = (
        attention_config.for_forward(case.d, case.block, shared=shared, workers=workers),
        attention_config.for_dq(case.d, case.block, shared=shared, **crowds, workers=workers),
        attention_config.for_dkv(case.d, case.block, crowded=case.spec.crowded, workers=workers),
    )
    return tuple(dataclasses.replace(one, **changes) for one in chosen)  # pyright: ignore


def kernels(case: Case, workers: int, **changes: Any) -> Callable[..., tuple[Any, ...]]:
    """(q, k, v, dy, sinks, own, other, partial, arrays) to (y, lse, dq, dk, dv), and what the
    gradient of numbers by slot is the sum of."""
    forward, dq, dkv = configs(case, workers, **changes)
    (h, g), (r, c), block = case.heads, case.blocks, case.block

    order = functools.partial(attention_lists.order, n=case.n, queries=h)

    def run(q, k, v, dy, sinks, own, other, partial, arrays):
        slots, (limits, flipped) = case.spec.by_slot, arrays
        rows = attention_lists.of_pattern(own, other, partial, (r, c), slots=slots)
        columns = attention_lists.of_pattern(other, own, partial, (c, r), slots=slots)
        options = {"block": block}
        queries = order(rows, forward, heads=h, side=block[0])
        y, lse = attention.forward(
            q, k, v, rows, queries, forward, case.spec, *limits, sinks=sinks, **options
        )
        delta = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1).swapaxes(1, 2)
        saved = (q, k, v, dy, attention_gradients.exponent(lse), delta)
        queries = order(rows, dq, heads=h, side=block[0])
        keys = order(columns, dkv, heads=g, side=block[1])
        got, *sums = attention_gradients.dq(
            *saved, rows, queries, dq, case.spec, *limits, **options
        )
        both = attention_gradients.dkv(*saved, columns, keys, dkv, case.spec, *flipped, **options)
        return y, lse, got, *both, *sums

    return run


def arguments(case: Case, inputs: Inputs) -> tuple[Any, ...]:
    """Of what `kernels` returns."""
    r, c = case.blocks
    whole = case.visible(inputs.limits).reshape(-1, r, case.block[0], c, case.block[1])
    (own, other), full = inputs.pairs, whole.all((0, 2, 4)) & (not case.masks)
    partial = ~np.pad(full, ((0, 1), (0, 1)))[own, other]
    arrays = (inputs.q, inputs.k, inputs.v, inputs.dy, inputs.sinks, own, other, partial)
    return (*arrays, inputs.arrays)


def conforms(case: Case, inputs: Inputs, got: tuple[Any, ...]) -> None:
    """Compares what `kernels` returns with NumPy in float64.

    Weights and their gradients are rounded to the dtype of q before they are multiplied, which may
    change a sum by half its `eps` of the sum of absolute values, and so is each result. An error of
    y changes `delta`, and with it all gradients of scores of that query. The rest is float32.
    """
    q, k, v, dy = (np.asarray(a, np.float64) for a in (inputs.q, inputs.k, inputs.v, inputs.dy))
    options = {"scale": case.spec.scale, "softcap": case.spec.softcap}
    more = {"bias": inputs.bias, "kept": inputs.kept}
    want = oracle(q, k, v, dy, inputs.seen, sinks=inputs.sinks, **more, **options)
    half = float(jnp.finfo(inputs.q.dtype).eps) / 2
    least = 4 * float(jnp.finfo(jnp.float32).eps) * (case.d + case.lengths[1])
    group, (g, d) = case.heads[0] // case.heads[1], k.shape[2:]
    keys, values = (np.repeat(a, group, 2) for a in (k, v))
    weights, slope, lse = softmax(case, inputs, q, keys)
    thinned = weights * inputs.kept
    y = np.einsum("nhqk,nkhd->nqhd", thinned, np.abs(values))
    off = (np.abs(dy) * 2 * half * y).sum(3).swapaxes(1, 2)[..., None]
    gradient = inputs.kept * np.einsum("nqhd,nkhd->nhqk", dy, values)
    gradient = gradient - (weights * gradient).sum(3, keepdims=True)
    scores = weights * (half * np.abs(gradient) + off) * slope * abs(case.spec.scale)

    def shared(a: Any) -> Any:
        return a.reshape(*a.shape[:2], g, group, d).sum(3)

    allowed = (
        2 * half * y,
        np.zeros(lse.shape),
        np.einsum("nhqk,nkhd->nqhd", scores, np.abs(keys)) + half * np.abs(want.q),
        shared(np.einsum("nhqk,nqhd->nkhd", scores, np.abs(q))) + half * np.abs(want.k),
        shared(np.einsum("nhqk,nqhd->nkhd", half * thinned, np.abs(dy))) + half * np.abs(want.v),
    )
    names, wanted = ("y", "lse", "dq", "dk", "dv"), (want.out, lse, want.q, want.k, want.v)
    if case.numbers:
        spread = weights * (np.abs(gradient) + 1)
        sums = [by_slot(case, inputs, a) for a in (want.bias, weights * off, least * spread)]
        got = (*got[:-1], needed(inputs, got[-1]))
        names, wanted, allowed = (*names, "dnumbers"), (*wanted, sums[0]), (*allowed, sum(sums[1:]))
    for name, one, right, most in zip(names, got, wanted, allowed, strict=True):
        assert one.dtype == (jnp.float32 if name in ("lse", "dnumbers") else inputs.q.dtype)
        one = np.asarray(one, np.float64)
        same = one == right  # infinities
        off = np.where(same, 0, np.abs(np.where(same, 0, one) - np.where(same, 0, right)))
        assert not np.isnan(one).any(), name
        assert (off <= most + least).all(), (name, off.max(), (off / (most + least)).max())


def by_slot(case: Case, inputs: Inputs, scores: Any) -> Any:
    """Sums of `[n, h, q, k]` over the stored blocks: `[n, h, e]`, zeros in spare slots."""
    (r, c), (br, bc), (own, other) = case.blocks, case.block, inputs.pairs
    blocks = scores.reshape(*scores.shape[:2], r, br, c, bc).sum((3, 5))
    blocks = np.pad(blocks, ((0, 0), (0, 0), (0, 1), (0, 1)))
    n, h = blocks.shape[:2]
    at = {1: lambda i, j: 0, h: lambda i, j: j, n * h: lambda i, j: i * h + j}[len(own)]
    each = [[blocks[i, j][own[at(i, j)], other[at(i, j)]] for j in range(h)] for i in range(n)]
    return np.array(each)


def needed(inputs: Inputs, sums: Any) -> Any:
    """Those of stored blocks, added up: others are not written."""
    own, (n, h) = inputs.pairs[0], sums.shape[:2]
    stored = own < own.max()  # every list has a spare slot
    lead = {1: (1, 1), h: (1, h), n * h: (n, h)}[len(own)]
    stored = stored.reshape(*lead, -1)[..., None, None]
    return np.where(stored, np.asarray(sums), 0).sum((3, 4), dtype=np.float32)


def softmax(case: Case, inputs: Inputs, q: Any, keys: Any) -> tuple[Any, Any, Any]:
    """Weights, slopes of scores `[n, h, q, k]` and logarithms `[n, h, q]`, all at once."""
    cap, slope = case.spec.softcap, np.float64(1)
    s = np.einsum("nqhd,nkhd->nhqk", q, keys) * case.spec.scale
    if cap is not None:
        s = cap * np.tanh(s / cap)
        slope = 1 - (s / cap) ** 2
    s = np.where(inputs.seen, s + inputs.bias, -np.inf)
    sinks = -np.inf if inputs.sinks is None else inputs.sinks[:, None, None]
    both = np.concatenate([s, np.broadcast_to(sinks, (*s.shape[:3], 1))], axis=3)
    top = both.max(3, keepdims=True)
    top = np.where(top == -np.inf, 0, top)
    total = np.exp(both - top).sum(3, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    return np.exp(s - top) / np.where(total == 0, 1, total), slope, lse


@functools.cache
def compiled(case: Case, workers: int, **changes: Any) -> Callable[..., tuple[Any, ...]]:
    return jax.jit(kernels(case, workers, **changes))
