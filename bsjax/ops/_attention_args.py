"""The arguments of `attention` as arrays of one form: what is differentiated, and what is not."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bsjax.ops import _attention_validate as validate
from bsjax.ops import _validate
from bsjax.ops._attention_tile import Fixed
from bsjax.ops._hoist import Hoisted, hoisted
from bsjax.pattern import BlockPattern


def blocks_of(a: Array, axes: int, block: int) -> Array:
    """`a[..., positions, *others]`, `axes` of them, as `[n, whole blocks, *others]`."""
    lead, own = a.shape[:-axes], a.shape[-axes:]
    a = a.reshape(math.prod(lead), *own)
    short = -own[0] % block
    return jnp.pad(a, ((0, 0), (0, short), *((0, 0),) * (axes - 1))) if short else a


def fixed(
    q: Array, s: int, p: BlockPattern, full: Any, q_ids: Any, kv_ids: Any, kv_lengths: Any
) -> Fixed:
    """The pattern, segments and lengths; neither masks nor a dropout yet."""
    *lead, length, h, _ = q.shape
    n, e = math.prod(lead), p.capacity
    own = {1: (1, 1), 2: (1, h)}.get(p.row.ndim, (n, h))
    if full is not None:
        full = validate.boolean("full", full)
        if full.shape not in ((e,), p.row.shape):
            raise ValueError(
                f"attention: `full` of shape {full.shape} must have shape {p.row.shape}, one flag "
                "for each slot of the pattern."
            )
        full = jnp.broadcast_to(full, p.row.shape).reshape(*own, e)
    q_segments = kv_segments = None
    if q_ids is not None or kv_ids is not None:
        q_segments = _segments("q_segment_ids", q_ids, tuple(lead), length, p.block[0])
        kv_segments = _segments("kv_segment_ids", kv_ids, tuple(lead), s, p.block[1])
    if kv_lengths is not None:
        kv_lengths = validate.whole("kv_lengths", kv_lengths, tuple(lead), ())
    row, col = p.row.reshape(*own, e), p.col.reshape(*own, e)
    return Fixed(row, col, full, [], [], [], q_segments, kv_segments, kv_lengths, None)


def _segments(name: str, ids: Any, lead: tuple[int, ...], size: int, block: int) -> Array:
    if ids is None:
        raise ValueError(f"attention: `{name}` is missing: give the segments of both sides.")
    return blocks_of(validate.whole(name, ids, lead, (size,)), 1, block)


def masks(
    mask: Any, q: Array, p: BlockPattern
) -> tuple[tuple[Hoisted, ...], list[Any], list[Array]]:
    """The functions of `mask`, what each of them closes over, and its arrays per slot."""
    functions, consts, arrays = [], [], []
    many = mask if isinstance(mask, tuple | list) else () if mask is None else (mask,)
    for one in many:
        if callable(one):
            function, closed = _traced("mask", one, p)
            functions.append(function)
            consts.append([jnp.asarray(c) for c in closed])
        else:
            arrays.append(validate.per_slot("mask", validate.boolean("mask", one), q, p))
    return tuple(functions), consts, arrays


def bias_of(
    bias: Any, q: Array, p: BlockPattern
) -> tuple[Hoisted | None, Array | None, list[Array], list[Any]]:
    """A function, an array per slot, and what the function closes over: floats, and all others."""
    if bias is None or not callable(bias):
        if bias is not None:
            bias = _validate.array("attention", "bias", bias)
            bias = validate.per_slot("bias", bias, q, p)
        return None, bias, [], []
    function, closed = _traced("bias", bias, p)
    closed = [jnp.asarray(c) for c in closed]
    floats = [jnp.issubdtype(c.dtype, jnp.floating) for c in closed]
    others = [None if yes else c for c, yes in zip(closed, floats, strict=True)]
    return function, None, [c for c, yes in zip(closed, floats, strict=True) if yes], others


def _traced(name: str, f: Callable[..., Any], p: BlockPattern) -> tuple[Hoisted, list[Any]]:
    """A function of a head, queries and keys as a program, and what it closes over."""
    br, bc = p.block
    at = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (br, 1), (1, bc))]
    program, consts = hoisted(lambda *at: jnp.asarray(f(*at)), *at)
    out = program.jaxpr.outvars[0].aval
    kind, words = (jnp.bool_, "bool") if name == "mask" else (jnp.floating, "floating point")
    if not jnp.issubdtype(out.dtype, kind):
        raise TypeError(
            f"attention: the function `{name}` must return {words}, got {out.dtype}: compare or "
            "cast inside."
        )
    fits = len(out.shape) <= 2 and all(
        size in (1, want) for size, want in zip(out.shape[::-1], (bc, br), strict=False)
    )
    if not fits:
        raise ValueError(
            f"attention: the function `{name}` of a head [], queries [{br}, 1] and keys [1, {bc}] "
            f"must return what broadcasts to ({br}, {bc}), got shape {out.shape}."
        )
    return program, consts
