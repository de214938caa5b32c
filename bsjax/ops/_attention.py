"""`attention`: what users call, with every argument checked before anything runs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bsjax.ops import _attention_core as core
from bsjax.ops import _attention_validate as validate
from bsjax.ops import _validate
from bsjax.ops._attention_choose import check
from bsjax.ops._attention_tile import Fixed, Operands, Spec
from bsjax.ops._choose import Implementation
from bsjax.ops._hoist import Hoisted, hoisted
from bsjax.pattern import BlockPattern


def attention(
    q: Any,
    k: Any,
    v: Any,
    p: BlockPattern,
    *,
    mask: Any = None,
    full: Any = None,
    bias: Any = None,
    sinks: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    kv_lengths: Any = None,
    dropout_rate: float = 0.0,
    key: Any = None,
    implementation: Implementation = "auto",
) -> Float[Array, "*n q h f"]:
    """TODO"""
    validate.heads(q, k, v)
    *lead, length, h, d = q.shape
    s, n = k.shape[-3], math.prod(lead)
    p = validate.pattern(p, q, s)
    br, bc = p.block

    def padded(a: Array, block: int) -> Array:
        a = a.reshape(n, *a.shape[len(lead) :])
        short = -a.shape[1] % block
        return jnp.pad(a, ((0, 0), (0, short)) + ((0, 0),) * (a.ndim - 2)) if short else a

    fixed: dict[str, Any] = dict.fromkeys(Fixed._fields)
    fixed |= {
        "row": p.row.reshape(-1, p.capacity),
        "col": p.col.reshape(-1, p.capacity),
        "mask_consts": [],
        "bias_consts": [],
        "masks": [],
    }
    functions: list[Hoisted] = []
    for one in mask if isinstance(mask, tuple | list) else () if mask is None else (mask,):
        if callable(one):
            function, consts = _traced("mask", one, p)
            functions.append(function)
            fixed["mask_consts"].append(consts)
        else:
            fixed["masks"].append(validate.per_slot("mask", _bool("mask", one), q, p))
    if full is not None:
        full = _bool("full", full)
        if full.shape not in ((p.capacity,), p.row.shape):
            raise ValueError(
                f"attention: `full` of shape {full.shape} must have shape {p.row.shape}, one flag "
                "for each slot of the pattern."
            )
        fixed["full"] = jnp.broadcast_to(full, p.row.shape).reshape(fixed["row"].shape)
    function, bias_consts, bias_array = None, [], None
    if callable(bias):
        function, consts = _traced("bias", bias, p)
        floats = [jnp.issubdtype(jnp.result_type(c), jnp.floating) for c in consts]
        bias_consts = [jnp.asarray(c) for c, yes in zip(consts, floats, strict=True) if yes]
        fixed["bias_consts"] = [None if yes else c for c, yes in zip(consts, floats, strict=True)]
    elif bias is not None:
        bias_array = validate.per_slot("bias", _validate.array("attention", "bias", bias), q, p)
    if q_segment_ids is not None or kv_segment_ids is not None:
        for name, ids, size, block in (
            ("q_segment_ids", q_segment_ids, length, br),
            ("kv_segment_ids", kv_segment_ids, s, bc),
        ):
            if ids is None:
                raise ValueError(f"attention: `{name}` is missing: give segments of both sides.")
            ids = validate.whole(name, ids, tuple(lead), (size,))
            fixed[name.replace("segment_ids", "segments")] = jnp.pad(
                ids, ((0, 0), (0, -size % block))
            )
    if kv_lengths is not None:
        fixed["kv_lengths"] = validate.whole("kv_lengths", kv_lengths, tuple(lead), ())
    rate = validate.rate(dropout_rate)
    if rate:
        fixed["key"] = validate.key(key)
    spec = Spec(
        name=implementation,
        grid=p.grid,
        block=p.block,
        lengths=(length, s),
        scale=d**-0.5 if scale is None else validate.number("scale", scale),
        softcap=None if softcap is None else validate.number("softcap", softcap, positive=True),
        dropout_rate=rate,
        masks=tuple(functions),
        bias=function,
    )
    check(spec, q)
    x = Operands(
        padded(q, br),
        padded(k, bc),
        padded(v, bc),
        bias_array,
        bias_consts,
        None if sinks is None else validate.sinks(sinks, h),
    )
    out = core.attention(spec, x, Fixed(**fixed))
    return out[:, :length].reshape(*lead, length, h, v.shape[-1])


def _traced(name: str, f: Callable[..., Any], p: BlockPattern) -> tuple[Hoisted, list[Any]]:
    """A function of `(head, q_index[br, 1], k_index[1, bc])` as a program, and what it closes over."""
    br, bc = p.block
    at = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (br, 1), (1, bc))]
    program, consts = hoisted(lambda *at: jnp.asarray(f(*at)), *at)
    out = program.jaxpr.outvars[0].aval
    kind = jnp.bool_ if name == "mask" else jnp.floating
    if not jnp.issubdtype(out.dtype, kind):
        raise TypeError(
            f"attention: the function `{name}` must return {'bool' if name == 'mask' else 'floats'}"
            f", got {out.dtype}."
        )
    if len(out.shape) > 2 or jnp.broadcast_shapes(out.shape, (br, bc)) != (br, bc):
        raise ValueError(
            f"attention: the function `{name}`, given a head, queries [{br}, 1] and keys [1, {bc}],"
            f" must return what broadcasts to ({br}, {bc}), got shape {out.shape}."
        )
    return program, consts


def _bool(name: str, a: Any) -> jax.Array:
    if not hasattr(a, "dtype") or a.dtype != jnp.bool_:
        found = getattr(a, "dtype", type(a).__name__)
        raise TypeError(f"attention: `{name}` must be bool, or a function for a mask, got {found}.")
    return jnp.asarray(a)
