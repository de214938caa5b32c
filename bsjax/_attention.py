"""Attention inside a layer: what the modules of both Flax dialects share."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bsjax import ops
from bsjax._layers import as_pattern
from bsjax.masks import Mask
from bsjax.ops import Implementation
from bsjax.ops._reference import accumulator
from bsjax.pattern import BlockPattern
from bsjax.pattern._validate import pair

LAYER = "BlockAttention"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The static part of a layer of attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mask: Any
    block: tuple[int, int]
    rotary: bool
    rotary_base: float
    softcap: float | None
    persistent: int
    dropout_rate: float
    implementation: Implementation


class Memory(NamedTuple):
    """Keys and values that every query sees, as parameters. After Sukhbaatar et al. 2019."""

    key: Float[Array, "n g d"]
    value: Float[Array, "n g d"]


def options(
    *,
    num_heads: int,
    num_kv_heads: int | None,
    qkv_features: int,
    mask: Any,
    pattern: Any,
    block: Any,
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
    sinks: Any = None,
    memory: Memory | None = None,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    kv_lengths: Any = None,
    key: Any = None,
) -> Float[Array, "*n q hd"]:
    """Attention of whole sequences, `q[..., q, h, d]` and `k[..., s, g, d]`: keys that are made of
    the queries' `own` inputs have their positions, and their segments unless given."""
    q, k = positioned(o, q, k, positions, own)
    if own and kv_segment_ids is None:
        kv_segment_ids = q_segment_ids
    p, full, lengths = pattern, None, (q.shape[-3], k.shape[-3])
    if p is None and o.mask is None:
        grid = tuple(math.ceil(size / side) for size, side in zip(lengths, o.block, strict=True))
        p = BlockPattern.from_mask(np.ones(grid, bool), o.block)
    elif p is None:
        p, full = o.mask.pattern(lengths, o.block)
    segments = {"q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids}
    return run(
        o, q, k, v, p, o.mask, (),
        full=full, sinks=sinks, memory=memory, kv_lengths=kv_lengths, key=key, **segments,
    )  # fmt: skip


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
    sinks: Any = None,
    memory: Memory | None = None,
    kv_lengths: Any = None,
    key: Any = None,
    **segments: Any,
) -> Float[Array, "*n q hd"]:
    """`bsjax.attention` with a mask of indices, masks `chosen[*h, e, br, 1]` of slots, and
    persistent memory in front of the keys."""
    if memory is not None:
        if any(ids is not None for ids in segments.values()):
            raise ValueError(
                f"{LAYER}: segments do not go with `persistent` memory, which has none: pack "
                "documents of equal layout with `mask=bsjax.masks.documents(ids)`."
            )
        width = -(-memory.key.shape[0] // p.block[1]) * p.block[1]
        k, v = _joined(memory, k, v, width)
        mask = _behind(mask, memory.key.shape[0], width)
        p, full, chosen = _in_front(p, full, chosen, width // p.block[1])
        kv_lengths = None if kv_lengths is None else jnp.asarray(kv_lengths) + width
    many = (*(() if mask is None else (mask,)), *chosen)
    y = ops.attention(
        q,
        k.astype(q.dtype),
        v.astype(q.dtype),
        p,
        mask=many or None,
        full=full,
        sinks=sinks,
        softcap=o.softcap,
        kv_lengths=kv_lengths,
        dropout_rate=0.0 if key is None else o.dropout_rate,
        key=key,
        implementation=o.implementation,
        **segments,
    )
    return y.reshape(*y.shape[:-2], -1)


def _joined(memory: Memory, k: Array, v: Array, width: int) -> tuple[Array, Array]:
    """Persistent keys and values, scaled and padded, before the others.

    They are kept small, keys of variance 1 / d and values of variance 1 / N, and used large: so
    they learn as fast as weights do (Sukhbaatar et al. 2019).
    """
    n, _, d = memory.key.shape

    def join(a: Array, scale: float, b: Array) -> Array:
        a = jnp.pad(
            a.astype(b.dtype) * jnp.asarray(scale, b.dtype), ((0, width - n), (0, 0), (0, 0))
        )
        return jnp.concatenate([jnp.broadcast_to(a, (*b.shape[:-3], *a.shape)), b], axis=-3)

    # keys of a gathered cache may have more heads than parameters have
    share = k.shape[-2] // memory.key.shape[1]
    key, value = (jnp.repeat(a, share, axis=1) for a in memory)
    return join(key, d**0.5, k), join(value, n**0.5, v)


def _behind(mask: Any, count: int, width: int) -> Any:
    """`mask` of keys that begin at `width`; the first `count` keys are seen by all."""

    def see(head: Any, q: Any, k: Any) -> Any:
        seen = k >= width
        if mask is not None:
            seen = seen & mask(head, q, jnp.maximum(k - width, 0))
        return (k < count) | seen

    return see


def _in_front(p: BlockPattern, full: Any, chosen: Any, columns: int) -> tuple[Any, Any, Any]:
    """Block-columns that every block-row stores before those of `p`, and their slots first."""
    (r, c), lead = p.grid, p.row.shape[:-1]
    rows, cols = np.tile(np.arange(r, dtype=np.int32), columns), np.arange(columns, dtype=np.int32)
    first = (np.broadcast_to(a, (*lead, r * columns)) for a in (rows, np.repeat(cols, r)))
    row, col = (
        jnp.concatenate(pair, axis=-1) for pair in zip(first, (p.row, p.col + columns), strict=True)
    )
    if full is not None:
        full = jnp.concatenate([jnp.zeros((*full.shape[:-1], r * columns), bool), full], axis=-1)

    def with_front(a: Array) -> Array:
        front = [(0, 0)] * (a.ndim - 3) + [(r * columns, 0), (0, 0), (0, 0)]
        return jnp.pad(a, front, constant_values=True)

    return BlockPattern(row, col, (r, c + columns), p.block), full, tuple(map(with_front, chosen))


def memory_inits(o: Options) -> tuple[Any, Any]:
    """Of persistent keys, of variance 1 / d, and values, of variance 1 / N."""
    normal = jax.nn.initializers.normal
    return normal(o.head_dim**-0.5), normal(o.persistent**-0.5)


def positioned(o: Options, q: Array, k: Array, positions: Any, own: bool) -> tuple[Array, Array]:
    """Queries and keys, turned where positions are rotary: keys have those of the queries if they
    come from the same inputs."""
    if not o.rotary:
        return q, k
    here = np.arange(q.shape[-3]) if positions is None else positions
    there = here if own else np.arange(k.shape[-3])
    return rotate(q, here, o.rotary_base), rotate(k, there, o.rotary_base)
