"""Attention inside a layer: what the modules of both Flax dialects share."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bsjax import _memory, ops
from bsjax._layers import as_pattern
from bsjax._memory import Memory
from bsjax.masks import Mask
from bsjax.ops import Implementation
from bsjax.ops._attention_validate import whole
from bsjax.ops._reference import accumulator
from bsjax.pattern import BlockPattern
from bsjax.pattern._validate import pair, size

LAYER = "BlockAttention"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The static part of a layer of attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mask: Any
    block: tuple[int, int]
    top_blocks: int | None
    rotary: bool
    rotary_base: float
    softcap: float | None
    persistent: int
    dropout_rate: float
    implementation: Implementation


def options(
    *,
    num_heads: int,
    num_kv_heads: int | None,
    qkv_features: int,
    mask: Any,
    pattern: Any,
    block: Any,
    top_blocks: int | None,
    rotary: bool,
    persistent: int,
    **others: Any,
) -> tuple[Options, BlockPattern | None]:
    """Checked, and the pattern if one is given."""
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads < 1 or qkv_features % num_heads:
        raise ValueError(
            f"{LAYER}: `num_heads={num_heads}` does not divide qkv_features={qkv_features}: every "
            "head has equally many features."
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"{LAYER}: `num_kv_heads={num_kv_heads}` does not divide num_heads={num_heads}: each "
            "head of keys serves a group of equally many heads of queries."
        )
    if rotary and (qkv_features // num_heads) % 2:
        raise ValueError(
            f"{LAYER}: `rotary` turns pairs of features, but a head has "
            f"{qkv_features // num_heads}: choose an even number for each head."
        )
    if persistent < 0:
        raise ValueError(f"{LAYER}: `persistent` must be at least 0, got {persistent}.")
    if top_blocks is not None:
        top_blocks = size(LAYER, "top_blocks", top_blocks, least=1)
    if pattern is not None:
        pattern = as_pattern(LAYER, pattern, block)
        block = pattern.block
        if pattern.row.ndim > 2:
            raise ValueError(
                f"{LAYER}: `pattern` has leaves of shape {pattern.row.shape}: give one pattern, "
                "with leaves [e], or one for each head, with leaves [h, e]."
            )
    elif mask is not None and not isinstance(mask, Mask):
        raise TypeError(
            f"{LAYER}: `mask` is a {type(mask).__name__}, which does not say what blocks it needs: "
            "take one of bsjax.masks, or give a `pattern` too."
        )
    block = pair(LAYER, "block", 64 if block is None else block)
    static = Options(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=qkv_features // num_heads,
        mask=mask,
        block=block,
        top_blocks=top_blocks,
        rotary=rotary,
        persistent=persistent,
        **others,
    )
    return static, pattern


def inputs(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """Keys are those of the queries, and values those of the keys, unless given."""
    if k is None and v is not None:
        raise ValueError(
            f"{LAYER}: `inputs_v` is given but `inputs_k` is not: for keys and values of one input "
            "pass it as `inputs_k`."
        )
    k = q if k is None else k
    return q, k, k if v is None else v


def heads(x: Array, count: int) -> Float[Array, "*n l h d"]:
    """Features of heads that lie beside each other, as an axis of heads."""
    return x.reshape(*x.shape[:-1], count, x.shape[-1] // count)


def rotate(x: Array, positions: Any, base: float) -> Float[Array, "*n l h d"]:
    """Rotary positions: pairs of features of `x[..., l, h, d]`, half of them apart, turn with
    `positions[l]` or `[..., l]`. After Su et al. 2021, "RoFormer"."""
    half, dtype = x.shape[-1] // 2, accumulator(x)
    turns = base ** -(np.arange(half) / half)
    positions = jnp.asarray(positions, dtype)
    positions = positions.reshape((1,) * (x.ndim - 2 - positions.ndim) + (*positions.shape, 1, 1))
    angle = positions * jnp.asarray(turns, dtype).reshape((1,) * (x.ndim - 1) + (half,))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(
    o: Options,
    q: Array,
    k: Array,
    v: Array,
    positions: Any,
    own: bool,
    *,
    pattern: BlockPattern | None,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    **others: Any,
) -> Float[Array, "*n q hd"]:
    """Attention of whole sequences, `q[..., q, h, d]` and `k[..., s, g, d]`: keys that are made of
    the queries' `own` inputs have their positions, and their segments unless given."""
    q, k = positioned(o, q, k, positions, own)
    if own and kv_segment_ids is None:
        kv_segment_ids = q_segment_ids
    others |= {"q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids}
    p, lengths = pattern, (q.shape[-3], k.shape[-3])
    if o.top_blocks is not None:
        if not own:
            raise ValueError(
                f"{LAYER}: `top_blocks` chooses between the blocks behind a query, and `inputs_k` "
                "have no positions among the queries: leave it out of attention to other inputs."
            )
        among = _choice(o, pattern, q.shape[:-2], q_segment_ids, kv_segment_ids)
        p, chosen = ops.top_blocks(q, k, block=o.block, count=o.top_blocks, among=among)
        return run(o, q, k, v, p, seen_from(o, 0), (chosen,), **others)
    full = None
    if p is None and o.mask is None:
        p = BlockPattern.from_mask(grid(o, None, lengths), o.block)
    elif p is None:
        p, full = o.mask.pattern(lengths, o.block)
    return run(o, q, k, v, p, o.mask, (), full=full, **others)


def grid(o: Options, pattern: BlockPattern | None, lengths: tuple[int, int]) -> Any:
    """`[*h, r, c]`: which blocks are stored for sequences of these lengths."""
    shape = tuple(math.ceil(count / side) for count, side in zip(lengths, o.block, strict=True))
    if pattern is None:
        return np.ones(shape, bool) if o.mask is None else o.mask.blocks(lengths, o.block)[0]
    if pattern.grid != shape:
        raise ValueError(
            f"{LAYER}: {lengths[1]} positions in blocks of {o.block} are a grid of {shape}, but "
            f"`pattern` has {pattern.grid}: the inputs, or the cache of a decoder, must be as long "
            "as the sequences that the pattern is for."
        )
    return pattern.mask()


def seen_from(o: Options, start: Any) -> Any:
    """The mask at positions that begin at `start`; nothing behind a query."""

    def see(head: Any, q: Any, k: Any) -> Any:
        past = k <= start + q
        return past if o.mask is None else past & o.mask(head, start + q, k)

    return see


def _choice(
    o: Options, pattern: BlockPattern | None, shape: tuple[int, ...], q_ids: Any, kv_ids: Any
) -> Any:
    """A function of query indices `[rows]` that gives `[..., *h, rows, c]`: which blocks are stored
    for a query and may have keys of its segment; or None: all. `shape` is that of the sequences,
    `(..., positions)`."""
    (*lead, length), (br, bc) = shape, o.block
    stored = same = None
    if pattern is not None or o.mask is not None:
        stored = jnp.asarray(grid(o, pattern, (length, length)))
    if q_ids is not None and kv_ids is not None:
        ours = whole("q_segment_ids", q_ids, tuple(lead), (length,)).reshape(*lead, 1, length, 1)
        ids = whole("kv_segment_ids", kv_ids, tuple(lead), (length,))
        ids = jnp.pad(ids, ((0, 0), (0, -length % bc)), mode="edge")
        ids = ids.reshape(*lead, 1, 1, math.ceil(length / bc), bc)
        same = ours, ids.min(-1), ids.max(-1)

    def among(at: Any) -> Bool[Array, "..."]:
        found = None if stored is None else stored.at[..., at // br, :].get(mode="clip")
        if same is None:
            assert found is not None
            return found
        here, least, most = same[0].at[..., at, :].get(mode="clip"), *same[1:]
        inside = (least <= here) & (here <= most)
        if found is None:
            return inside
        return inside & found.reshape((1,) * (inside.ndim - found.ndim) + found.shape)

    return None if stored is None and same is None else among


def run(
    o: Options,
    q: Array,
    k: Array,
    v: Array,
    p: BlockPattern,
    mask: Any,
    chosen: tuple[Any, ...],
    *,
    full: Any = None,
    bias: Any = None,
    sinks: Any = None,
    memory: Memory | None = None,
    kv_lengths: Any = None,
    key: Any = None,
    **segments: Any,
) -> Float[Array, "*n q hd"]:
    """`bsjax.attention` with a mask of indices, masks `chosen[*h, e, br, 1]` of slots, and
    persistent memory in front of the keys."""
    if bias is not None and not callable(bias):
        raise TypeError(
            f"{LAYER}: `bias` must be a function of (head, q_index, k_index), got "
            f"{type(bias).__name__}: blocks are numbered inside the layer, so read an array in a "
            "function, for example `lambda head, q, k: table[head, q - k]`."
        )
    if memory is not None:
        if any(ids is not None for ids in segments.values()):
            raise ValueError(
                f"{LAYER}: segments do not go with `persistent` memory, which has none: pack "
                "documents of equal layout with `mask=bsjax.masks.documents(ids)`."
            )
        width = -(-memory.key.shape[0] // p.block[1]) * p.block[1]
        k, v = _memory.joined(memory, k, v, width)
        mask = _memory.behind(mask, memory.key.shape[0], width)
        bias = None if bias is None else _memory.zero_on(bias, width)
        p, full, chosen = _memory.in_front(p, full, chosen, width // p.block[1])
        kv_lengths = None if kv_lengths is None else jnp.asarray(kv_lengths) + width
    many = (*(() if mask is None else (mask,)), *chosen)
    y = ops.attention(
        q,
        k.astype(q.dtype),
        v.astype(q.dtype),
        p,
        mask=many or None,
        full=full,
        bias=bias,
        sinks=sinks,
        softcap=o.softcap,
        kv_lengths=kv_lengths,
        dropout_rate=0.0 if key is None else o.dropout_rate,
        key=key,
        implementation=o.implementation,
        **segments,
    )
    return y.reshape(*y.shape[:-2], -1)


def positioned(o: Options, q: Array, k: Array, positions: Any, own: bool) -> tuple[Array, Array]:
    """Queries and keys, turned where positions are rotary: keys have those of the queries if they
    come from the same inputs."""
    if not o.rotary:
        return q, k
    here = np.arange(q.shape[-3]) if positions is None else positions
    there = here if own else np.arange(k.shape[-3])
    return rotate(q, here, o.rotary_base), rotate(k, there, o.rotary_base)
