"""What attention means: all scores at once, differentiated by plain autodiff."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from bsjax.ops import _attention_dropout as _dropout
from bsjax.ops import _attention_tile as tiles
from bsjax.ops._attention_tile import Fixed, Operands, Spec
from bsjax.ops._reference import accumulator


def attention(spec: Spec, x: Operands, p: Fixed) -> Float[Array, "n q h f"]:
    """`softmax(scores) @ v`, in what sums are kept in; zeros where nothing is seen."""
    (n, h, share), dtype = tiles.sizes(spec, x), accumulator(x.q)
    q, k, v = (a.astype(dtype) for a in (x.q, x.k, x.v))
    q = q.reshape(n, q.shape[1], h // share, share, q.shape[3])
    einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    s = einsum("nqgjd,nsgd->ngjqs", q, k).reshape(n, h, q.shape[1], k.shape[1])
    s = s * jnp.asarray(spec.scale, dtype)
    if spec.softcap is not None:
        s = spec.softcap * jnp.tanh(s / spec.softcap)
    if x.bias is not None:
        s = s + _everywhere(spec, p, x.bias.astype(dtype))
    if spec.bias is not None:
        s = s + _per_head(
            spec, x, functools.partial(tiles.bias_of, spec, x.bias_consts, p.bias_consts)
        ).astype(dtype)
    s = jnp.where(_visible(spec, x, p), s, -jnp.inf)
    top = lax.stop_gradient(s.max(-1, initial=-jnp.inf))
    if x.sinks is not None:
        sinks = x.sinks.astype(dtype)[None, :, None]
        top = jnp.maximum(top, lax.stop_gradient(sinks))
    top = jnp.where(top == -jnp.inf, 0, top)
    probs = jnp.exp(s - top[..., None])
    total = probs.sum(-1)
    if x.sinks is not None:
        total = total + jnp.exp(sinks - top)
    probs = probs / jnp.where(total > 0, total, 1)[..., None]
    if spec.dropout_rate:
        probs = probs * _dropped(spec, p).astype(dtype)
    probs = probs.reshape(n, h // share, share, *probs.shape[2:])
    return einsum("ngjqs,nsgf->nqgjf", probs, v).reshape(n, q.shape[1], h, v.shape[3])


def forward(spec: Spec, x: Operands, p: Fixed) -> tuple[Array, Array]:
    """As the others have it: nothing is kept but the operands."""
    n, heads, _ = tiles.sizes(spec, x)
    return attention(spec, x, p), jnp.zeros((n, heads, x.q.shape[1]), accumulator(x.q))


def backward(spec: Spec, x: Operands, p: Fixed, out: Any, lse: Any, dout: Array) -> Operands:
    """The gradient of every operand, in what sums are kept in."""
    x = jax.tree.map(lambda a: a.astype(accumulator(a)), x)
    _, pull = jax.vjp(lambda x: attention(spec, x, p), x)
    return pull(dout)[0]


def _visible(spec: Spec, x: Operands, p: Fixed) -> Bool[Array, "n h q s"]:
    c, bc = spec.grid[1], spec.block[1]
    k = jnp.arange(c * bc, dtype=jnp.int32)[None]
    found = k < spec.lengths[1]
    if p.kv_lengths is not None:
        found = found & (k < p.kv_lengths[:, None])
    found = found[:, None, None]
    if p.q_segments is not None and p.kv_segments is not None:
        found = found & (p.q_segments[:, None, :, None] == p.kv_segments[:, None, None])
    at = (*jnp.indices(p.row.shape, sparse=True)[:2], p.row, p.col)
    slots = jnp.zeros((*p.row.shape[:2], *spec.grid), bool).at[at]
    stored = slots.set(True, mode="drop")
    partial = stored if p.full is None else slots.set(~p.full, mode="drop")
    stored, partial = _elements(spec, stored), _elements(spec, partial)
    masks = [
        _per_head(spec, x, lambda *at, f=f, c=c: f.anywhere(c, *at))
        for f, c in zip(spec.masks, p.mask_consts, strict=True)
    ]
    masks += [_everywhere(spec, p, a) for a in p.masks]
    for mask in masks:
        found = found & (mask | ~partial)
    return found & stored


def _elements(spec: Spec, blocks: Array) -> Array:
    return jnp.repeat(jnp.repeat(blocks, spec.block[0], -2), spec.block[1], -1)


def _per_head(spec: Spec, x: Operands, f: Any) -> Array:
    """A function of indices for all heads and positions: `[1, h, q, s]`."""
    (r, c), (br, bc) = spec.grid, spec.block
    q = jnp.arange(r * br, dtype=jnp.int32)[:, None]
    k = jnp.arange(c * bc, dtype=jnp.int32)[None]
    # as the program was traced: for one tile
    tile = jax.vmap(jax.vmap(f, (None, None, 0)), (None, 0, None))
    heads = jnp.arange(x.q.shape[2], dtype=jnp.int32)
    blocks = jax.vmap(tile, (0, None, None))(heads, q.reshape(r, br, 1), k.reshape(c, 1, bc))
    return _whole(jnp.broadcast_to(blocks, (1, heads.size, r, c, br, bc)))


def _everywhere(spec: Spec, p: Fixed, a: Array) -> Array:
    """An array per slot as `[#n, #h, q, s]`, zeros where nothing is stored."""
    lead, e = jnp.broadcast_shapes(a.shape[:2], p.row.shape[:2]), p.row.shape[2]
    a = jnp.broadcast_to(a, (*lead, e, *spec.block))
    row, col = (jnp.broadcast_to(i, (*lead, e)) for i in (p.row, p.col))
    at = (*jnp.indices(row.shape, sparse=True)[:2], row, col)
    blocks = jnp.zeros((*lead, *spec.grid, *spec.block), a.dtype).at[at].set(a, mode="drop")
    return _whole(blocks)


def _whole(blocks: Array) -> Array:
    """`[..., r, c, br, bc]` as `[..., r * br, c * bc]`."""
    *lead, r, c, br, bc = blocks.shape
    return blocks.swapaxes(-3, -2).reshape(*lead, r * br, c * bc)


def _dropped(spec: Spec, p: Fixed) -> Float[Array, "n h q s"]:
    """What each probability is multiplied by."""
    assert p.seeds is not None
    (r, c), (br, bc) = spec.grid, spec.block
    q = jnp.arange(r * br, dtype=jnp.int32)[None, None]
    first, second = _dropout.words(p.seeds[:, :, None], q)
    k = jnp.arange(c * bc, dtype=jnp.int32)[None, None, None]
    kept = _dropout.kept(first[..., None], second[..., None], k, spec.dropout_rate)
    return jnp.where(kept, jnp.float32(1 / (1 - spec.dropout_rate)), 0)
