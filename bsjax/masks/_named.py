"""Masks by name: those that others are made of, then those of the literature."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from bsjax.masks._mask import Mask, Spans
from bsjax.pattern import is_concrete
from bsjax.pattern._validate import size


def causal(offset: int = 0) -> Mask:
    """Keys up to the query: `k <= q + offset`.

    `offset` is the position of the first query among the keys, where there are more keys than
    queries: `s - q` if the last query is at the last key.
    """
    offset = _number("causal", "offset", offset)

    def blocks(at: Spans) -> tuple[Any, Any]:
        return at.most + offset >= 0, at.least + offset >= 0

    return Mask(lambda h, q, k: k <= q + offset, blocks, f"causal({offset or ''})")


def window(before: int, after: int = 0) -> Mask:
    """The keys from `before` positions before the query to `after` positions after it.

    A causal sliding window of w keys is `window(w - 1)`.
    """
    before, after = size("window", "before", before), size("window", "after", after)

    def blocks(at: Spans) -> tuple[Any, Any]:
        some = (at.most >= -after) & (at.least <= before)
        return some, (at.least >= -after) & (at.most <= before)

    return Mask(
        lambda h, q, k: (k >= q - before) & (k <= q + after), blocks, f"window({before}, {after})"
    )


def prefix(count: int) -> Mask:
    """The first `count` keys, for every query: attention sinks, or a prefix."""
    count = size("prefix", "count", count)

    def blocks(at: Spans) -> tuple[Any, Any]:
        return (at.k0 < count) & (at.q0 >= 0), (at.k1 < count) & (at.q0 >= 0)

    return Mask(lambda h, q, k: (k < count) & (q >= 0), blocks, f"prefix({count})")


def every(stride: int) -> Mask:
    """Keys whose distance from the query is a multiple of `stride`."""
    stride = size("every", "stride", stride, least=1)

    def blocks(at: Spans) -> tuple[Any, Any]:
        some = at.most // stride >= -(-at.least // stride)
        return some, some & ((at.most == at.least) | (stride == 1))

    return Mask(lambda h, q, k: (q - k) % stride == 0, blocks, f"every({stride})")


def chunks(length: int) -> Mask:
    """Keys of the query's own chunk of `length` positions: block-diagonal."""
    length = size("chunks", "length", length, least=1)

    def blocks(at: Spans) -> tuple[Any, Any]:
        q0, q1, k0, k1 = (i // length for i in at)
        return (q0 <= k1) & (k0 <= q1), (q0 == k1) & (k0 == q1)

    return Mask(lambda h, q, k: q // length == k // length, blocks, f"chunks({length})")


def summary(length: int, count: int, at: int = 0) -> Mask:
    """`count` columns of each chunk of `length` keys, for every query: its last ones, or with `at`
    the group of so many columns before them."""
    length = size("summary", "length", length, least=1)
    count, at = size("summary", "count", count, least=1), size("summary", "at", at)
    last = length - at * count
    first = last - count
    if first < 0:
        raise ValueError(
            f"summary: group {at} of {count} columns does not fit into a chunk of {length}: "
            f"lower `at` or `count`."
        )

    def before(k: Any) -> Any:
        """How many of the keys before k are in the summary."""
        return k // length * count + np.clip(k % length - first, 0, count)

    def blocks(at: Spans) -> tuple[Any, Any]:
        inside = before(at.k1 + 1) - before(at.k0)
        rows = at.q0 >= 0
        return rows & (inside > 0), rows & (inside == at.k1 + 1 - at.k0)

    def see(h: Any, q: Any, k: Any) -> Any:
        return (k % length >= first) & (k % length < last) & (q >= 0)

    return Mask(see, blocks, f"summary({length}, {count}, {at})")


def documents(q_ids: Any, kv_ids: Any = None) -> Mask:
    """Keys of the query's own document: `q_ids[q] == kv_ids[k]`, whole numbers.

    `kv_ids` are those of the queries, if not given. Documents that lie one after another, with
    rising numbers, give the blocks that are needed and no other. The numbers may be traced; another
    layout of as many tokens compiles nothing.
    """
    q_ids = _ids("q_ids", q_ids)
    kv_ids = q_ids if kv_ids is None else _ids("kv_ids", kv_ids)

    def blocks(at: Spans) -> tuple[Any, Any]:
        q_low, q_high = _extremes(q_ids, at.q0[:, 0], at.q1[:, 0])
        k_low, k_high = _extremes(kv_ids, at.k0[0], at.k1[0])
        q_low, q_high = q_low[:, None], q_high[:, None]
        some = (q_low <= k_high[None]) & (k_low[None] <= q_high)
        return some, (q_low == k_high[None]) & (k_low[None] == q_high)

    def see(h: Any, q: Any, k: Any) -> Any:
        q = jnp.asarray(q_ids).at[q].get(mode="clip")
        return q == jnp.asarray(kv_ids).at[k].get(mode="clip")

    return Mask(see, blocks, "documents(...)")


def _ids(name: str, ids: Any) -> Any:
    ids = np.asarray(ids) if is_concrete(ids) else ids
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(
            f"documents: `{name}` must be whole numbers of shape (positions,), got {ids.dtype} of "
            f"shape {ids.shape}: use jax.vmap for several."
        )
    return ids


def _extremes(ids: Any, first: Any, last: Any) -> tuple[Any, Any]:
    """The least and the largest number of each block of neighbours."""
    if ids.shape[0] != (last[-1] + 1 if len(last) else 0):
        raise ValueError(
            f"documents: {ids.shape[0]} positions have a number, but the pattern has "
            f"{last[-1] + 1 if len(last) else 0}: give one for each."
        )
    if not len(first):
        return ids, ids
    if is_concrete(ids):
        return np.minimum.reduceat(ids, first), np.maximum.reduceat(ids, first)
    block = int(last[0] + 1)
    padded = jnp.pad(ids, (0, len(first) * block - ids.shape[0]), mode="edge")
    return padded.reshape(-1, block).min(1), padded.reshape(-1, block).max(1)


def streaming(width: int, sinks: int) -> Mask:
    """A causal window of `width` keys, and the first `sinks` keys.

    After Xiao, Tian, Chen, Han and Lewis 2023, "Efficient Streaming Language Models with Attention
    Sinks". (Sinks that are learned logits are the argument `sinks` of `bsjax.attention`.)
    """
    width = size("streaming", "width", width, least=1)
    return causal() & (window(width - 1) | prefix(size("streaming", "sinks", sinks)))


def prefix_lm(count: int) -> Mask:
    """Causal, but the first `count` keys are seen by all. After Raffel et al. 2020."""
    return causal() | prefix(count)


def longformer(side: int, global_tokens: int = 0) -> Mask:
    """`side` keys on either side; the first `global_tokens` see all and are seen by all.

    After Beltagy, Peters and Cohan 2020, "Longformer: The Long-Document Transformer".
    """
    near = window(size("longformer", "side", side), side)
    count = size("longformer", "global_tokens", global_tokens)

    def blocks(at: Spans) -> tuple[Any, Any]:
        return (at.q0 < count) & (at.k0 >= 0), (at.q1 < count) & (at.k0 >= 0)

    rows = Mask(lambda h, q, k: (q < count) & (k >= 0), blocks, f"rows({count})")
    return near | prefix(count) | rows


def dilated(reach: int, dilation: int) -> Mask:
    """Every `dilation`-th key of the `reach` before and after the query (Longformer)."""
    reach = size("dilated", "reach", reach)
    return window(reach, reach) & every(dilation)


def strided(stride: int) -> Mask:
    """The last `stride` keys, and every `stride`-th one before: causal.

    Two steps reach all that is before. After Child, Gray, Radford and Sutskever 2019, "Generating
    Long Sequences with Sparse Transformers", who give the two parts to two heads:
    `per_head([causal() & window(stride - 1), causal() & every(stride)])`.
    """
    stride = size("strided", "stride", stride, least=1)
    return causal() & (window(stride - 1) | every(stride))


def fixed(length: int, count: int, at: int = 0) -> Mask:
    """The query's own chunk of `length` keys, and `count` summary columns of each: causal.

    Child et al. 2019; their heads take different columns, `at=0, 1, ...`.
    """
    return causal() & (chunks(length) | summary(length, count, at))


def _number(where: str, name: str, value: Any) -> int:
    return size(where, name, value, least=-(2**31))
