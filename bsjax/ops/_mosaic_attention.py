"""The door to the attention kernels: what they can run, and the lists that they walk."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from bsjax.ops import _attention_dropout as dropout
from bsjax.ops import _elementwise, _mesh, _mosaic
from bsjax.ops._attention_tile import Fixed, Operands, Spec, sizes
from pallas_kernels import attention_config as config


def why_not(spec: Spec, x: Operands, p: Fixed) -> str | None:
    """The reason why no kernel can run an attention, or None if one can."""
    d, f = x.q.shape[3], x.v.shape[3]
    if reason := config.why_not(x.q.dtype.name, d, spec.block):
        return reason
    if d != f:
        return f"kernels want values as wide as keys, and these are {f} and {d} wide"
    if x.bias is not None and x.bias.shape[3:] != (1, 1):
        return (
            "kernels have an array `bias` only as one number for each slot, [..., h, e, 1, 1], and "
            f"this one ends in {x.bias.shape[2:]}: write it as a function of indices"
        )
    if spec.bias is not None and (reason := _elementwise.why_not("bias", spec.bias)):
        return reason
    for function in spec.masks:
        if reason := _elementwise.why_not("mask", function):
            return reason
    return _mosaic.no_gpu()


def forward(spec: Spec, x: Operands, p: Fixed) -> tuple[Array, Array]:
    """`(out[n, q, h, d], lse[n, h, q])`, in the dtype of q and in float32."""
    from pallas_kernels import attention
    from pallas_kernels import attention_lists as lists

    n, h, _ = sizes(spec, x)
    sinks = None if x.sinks is None else x.sinks.astype(jnp.float32)
    if not x.q.size * x.k.size * p.row.size:
        empty = jnp.full(h, -jnp.inf) if sinks is None else sinks
        empty = jnp.broadcast_to(empty[None, :, None], (n, h, x.q.shape[1]))
        return jnp.zeros(x.q.shape, x.q.dtype), _like(empty.astype(jnp.float32), x, p)
    x, p, sinks = _mosaic.alike(x, p, sinks)
    own, other, partial = _needed(spec, x, p)
    scores = _scores(spec, x, p)
    rows = lists.of_pattern(own, other, partial, spec.grid, slots=scores.by_slot)
    shared = _shared(spec, x, rows)
    chosen = config.for_forward(
        x.q.shape[3], spec.block, shared=shared, workers=_mosaic.multiprocessors()
    )
    out, lse = attention.forward(
        x.q,
        x.k,
        x.v,
        rows,
        lists.order(rows, chosen, n, h, h, spec.block[0]),
        chosen,
        scores,
        *_limits(spec, x, p),
        block=spec.block,
        sinks=sinks,
    )
    return _like(out, x, p), _like(lse, x, p)


def backward(
    spec: Spec,
    x: Operands,
    p: Fixed,
    out: Float[Array, "n q h d"],
    lse: Float[Array, "n h q"],
    dout: Float[Array, "n q h d"],
) -> Operands:
    """The gradient of every operand."""
    from pallas_kernels import attention_gradients as kernels
    from pallas_kernels import attention_lists as lists

    n, h, group = sizes(spec, x)
    delta = jnp.sum(dout * out.astype(jnp.float32), axis=3).swapaxes(1, 2)
    dsinks = None
    if x.sinks is not None:
        sinks = x.sinks.astype(jnp.float32)[None, :, None]
        share = jnp.exp(sinks - jnp.where(lse == -jnp.inf, 0, lse))
        dsinks = -jnp.sum(share * delta, axis=(0, 2))
    if not x.q.size * x.k.size * p.row.size:
        return jax.tree.map(jnp.zeros_like, x)._replace(sinks=dsinks)
    dy, log2 = dout.astype(x.q.dtype), kernels.exponent(lse)
    x, p, dy, log2, delta = _mosaic.alike(x, p, dy, log2, delta)
    own, other, partial = _needed(spec, x, p)
    (br, bc), (r, c) = spec.block, spec.grid
    saved, scores = (x.q, x.k, x.v, dy, log2, delta), _scores(spec, x, p)
    rows = lists.of_pattern(own, other, partial, (r, c), slots=scores.by_slot)
    columns = lists.of_pattern(other, own, partial, (c, r), slots=scores.by_slot)
    d, workers, shared = x.q.shape[3], _mosaic.multiprocessors(), _shared(spec, x, rows)
    crowds = {"everywhere": scores.everywhere, "apart": scores.apart}
    for_queries = config.for_dq(d, spec.block, shared=shared, **crowds, workers=workers)
    for_keys = config.for_dkv(d, spec.block, crowded=scores.crowded, workers=workers)
    order = lists.order(rows, for_queries, n, h, h, br)
    limits = _limits(spec, x, p)
    dq, *parts = kernels.dq(*saved, rows, order, for_queries, scores, *limits, block=spec.block)
    dbias = _of_slots(parts[0], own < r, x.bias) if parts and x.bias is not None else None
    order = lists.order(columns, for_keys, n, h // group, h, bc)
    limits = _limits(spec, x, p, flipped=True)
    dk, dv = kernels.dkv(*saved, columns, order, for_keys, scores, *limits, block=spec.block)
    dq, dk, dv, dbias = (a if a is None else _like(a, x, p) for a in (dq, dk, dv, dbias))
    return Operands(dq, dk, dv, dbias, [], dsinks)


def _scores(spec: Spec, x: Operands, p: Fixed) -> Any:
    from pallas_kernels._scores import Dropout, Scores

    def mask(head: Any, queries: Any, keys: Any) -> Any:
        found = None
        for function in spec.masks:
            one = _elementwise.evaluate(function, head, queries, keys)
            found = one if found is None else found & one
        return found

    def bias(head: Any, queries: Any, keys: Any) -> Any:
        return _elementwise.evaluate(spec.bias, head, queries, keys)  # pyright: ignore

    rate, dropped = spec.dropout_rate, None
    if p.seeds is not None:
        kept = functools.partial(dropout.kept, rate=rate)
        dropped = Dropout(kept, rate)
    keys = spec.lengths[1]
    return Scores(
        scale=spec.scale,
        softcap=spec.softcap,
        mask=mask if spec.masks else None,
        keys=keys if keys % spec.block[1] else None,
        lengths=p.kv_lengths is not None,
        segments=p.q_segments is not None,
        arrays=len(p.masks),
        bias=None if spec.bias is None else bias,
        numbers=x.bias is not None,
        dropout=dropped,
    )


def _limits(spec: Spec, x: Operands, p: Fixed, flipped: bool = False) -> list[Array]:
    """The arrays that scores depend on; `flipped` for tiles of keys."""
    found = [a for a in (p.kv_lengths, p.q_segments, p.kv_segments) if a is not None]
    found += [packed(a.swapaxes(3, 4) if flipped else a) for a in p.masks]
    if x.bias is not None:
        found.append(x.bias[..., 0, 0].astype(jnp.float32))
    if p.seeds is not None:
        queries = jnp.arange(x.q.shape[1], dtype=jnp.int32)[None, None]
        found.append(jnp.stack(dropout.words(p.seeds[:, :, None], queries)))
    return found


def packed(mask: Bool[Array, "n h e rows columns"]) -> Int32[Array, "n h e parts #rows"]:
    """Columns as bits of words, 32 of each; a single column, for all, sets none or all."""
    *lead, columns = mask.shape
    if columns == 1:
        return jnp.where(mask, jnp.int32(-1), 0).swapaxes(3, 4)
    bits = mask.reshape(*lead, columns // 32, 32).astype(jnp.uint32)
    weights = jnp.left_shift(jnp.uint32(1), jnp.arange(32, dtype=jnp.uint32))
    words = jnp.sum(bits * weights.reshape(*(1,) * (bits.ndim - 1), 32), axis=-1, dtype=jnp.uint32)
    return lax.bitcast_convert_type(words, jnp.int32).swapaxes(3, 4)


def _of_slots(
    parts: Float[Array, "n h e steps br"], needed: Bool[Array, "l e"], bias: Array
) -> Float[Array, "#n #h #e 1 1"]:
    """The gradient of a number for each slot, from those of scores; others are not written."""
    n, h, e = parts.shape[:3]
    needed = needed.reshape(*((1, 1) if needed.shape[0] == 1 else (n, h)), e)
    sums = jnp.sum(jnp.where(needed[..., None, None], parts, 0), axis=(3, 4))
    shared = tuple(i for i, size in enumerate(bias.shape[:3]) if size < sums.shape[i])
    return jnp.sum(sums, axis=shared, keepdims=True)[..., None, None]


def _needed(
    spec: Spec, x: Operands, p: Fixed
) -> tuple[Int32[Array, "l e"], Int32[Array, "l e"], Bool[Array, "l e"]]:
    """Block-rows, block-columns, and whether any element is masked, of each slot that is needed;
    the others become spare. One list, one for each head, or for each batch element and head."""
    (br, bc), (r, c), (n, h, _) = spec.block, spec.grid, sizes(spec, x)
    row, col = p.row, p.col
    spare = (row >= r) | (col >= c)
    partial = jnp.zeros(row.shape, bool)
    if spec.masks or p.masks:
        partial = ~p.full if p.full is not None else ~partial
    if spec.lengths[1] % bc:
        partial = partial | (col == c - 1)
    if p.kv_lengths is not None:
        lengths = p.kv_lengths[:, None, None]
        spare, partial = spare | (col * bc >= lengths), partial | ((col + 1) * bc > lengths)
    if p.q_segments is not None and p.kv_segments is not None:
        q_least, q_most = _range(p.q_segments, br, row)
        k_least, k_most = _range(p.kv_segments, bc, col)
        spare = spare | (q_most < k_least) | (k_most < q_least)
        partial = partial | (q_least != k_most) | (q_most != k_least)
    lists = (1, spare.shape[1]) if spare.shape[0] == 1 else (n, h)
    whole = (*lists, row.shape[2])
    row, col, partial = (jnp.broadcast_to(a, whole) for a in (row, col, partial))
    flat = (lists[0] * lists[1], row.shape[2])
    return (
        jnp.where(spare, r, row).reshape(flat),
        jnp.where(spare, c, col).reshape(flat),
        partial.reshape(flat),
    )


def _range(ids: Array, side: int, block: Array) -> tuple[Array, Array]:
    """The least and the largest number in a block of each slot: `[n, #h, e]`."""
    ids = ids.reshape(ids.shape[0], 1, -1, side)
    at = jnp.broadcast_to(block, (ids.shape[0], *block.shape[1:]))
    ends = (jnp.min(ids, axis=3), jnp.max(ids, axis=3))
    least, most = (
        jnp.take_along_axis(jnp.broadcast_to(a, (*at.shape[:2], a.shape[2])), at, 2, mode="clip")
        for a in ends
    )
    return least, most


def _shared(spec: Spec, x: Operands, lists: Any) -> int:
    """How many query heads have the same keys and list."""
    return sizes(spec, x)[2] if lists.ptr.shape[0] == 1 else 1


def _like(a: Array, x: Operands, p: Fixed) -> Array:
    """What a kernel returns, varying over the mesh axes that its operands vary over."""
    return _mesh.vary(a, _mesh.varying(*jax.tree.leaves((x, p))))
