"""Attention over stored blocks in jnp and lax: tile by tile, no tile is kept.

What was measured on CPUs and decides the shape of this file: products of one tile of 64 x 64 run at
three quarters of the speed of large ones as long as all is in the cache, and one head at a time
keeps it there. Batched products over many tiles, or gathered pieces of several key blocks, are
slower. An update in place of dk and dv costs less than a second pass in the order of the keys.

A query block takes its key blocks one by one, in order. A block in which nothing is visible changes
no bit of the result: what other queries chose does not show.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bsjax.ops import _attention_tile as tiles
from bsjax.ops import _mesh
from bsjax.ops._attention_tile import Fixed, Operands, Spec, Tile
from bsjax.ops._reference import accumulator
from bsjax.pattern import pointers
from bsjax.pattern._index import stable_argsort


class _Lists:
    """The slots of each query block: `slot[ptr[row]:ptr[row + 1]]`, for each pattern."""

    def __init__(self, spec: Spec, p: Fixed) -> None:
        row, self.col = jnp.asarray(p.row), jnp.asarray(p.col)
        self.slot = jnp.asarray(stable_argsort(row))  # by row, and as before by column
        row = jnp.take_along_axis(row, self.slot, axis=2)
        self.ptr = jax.vmap(jax.vmap(lambda keys: pointers(keys, spec.grid[0])))(row)

    def span(self, at: Tile) -> tuple[Any, Any]:
        """Where the list of a query block starts and ends."""
        ptr = tiles.own(self.ptr, at)
        return ptr[at.row], ptr[at.row + 1]

    def tile(self, at: Tile, place: Any) -> Tile:
        """The tile of the slot at `place` of the list."""
        slot = tiles.own(self.slot, at)[place]
        return at._replace(slot=slot, col=tiles.own(self.col, at)[slot])


def forward(spec: Spec, x: Operands, p: Fixed) -> tuple[Array, Array]:
    """`(out[n, q, h, f], lse[n, h, q])`, both in what sums are kept in."""
    lists, (n, heads, share) = _Lists(spec, p), tiles.sizes(spec, x)
    (br, bc), dtype, features = spec.block, accumulator(x.q), x.v.shape[3]
    zeros = _zeros_like(x, p)

    def row(i: Any, out: Any) -> Any:
        at = _row(spec, i, heads)
        q = tiles.read(x.q, at.n, at.row, br, at.h)

        def step(place: Any, sums: Any) -> Any:
            top, total, mixed = sums
            tile = lists.tile(at, place)
            k = tiles.read(x.k, at.n, tile.col, bc, at.h // share)
            v = tiles.read(x.v, at.n, tile.col, bc, at.h // share)
            bias = None if x.bias is None else tiles.per_slot(x.bias, tile).astype(dtype)
            seen = tiles.visible(spec, p, tile)
            s = tiles.scores(spec, p, tile, seen, q, k, bias, x.bias_consts)
            new = jnp.maximum(top, s.max(1))
            finite = jnp.where(new == -jnp.inf, 0, new)  # nothing seen yet
            probs, old = jnp.exp(s - finite[:, None]), jnp.exp(top - finite)
            total = total * old + probs.sum(1)
            if (drop := tiles.dropout(spec, p, tile)) is not None:
                probs = probs * drop.astype(dtype)
            return new, total, mixed * old[:, None] + tiles.dot(probs, v, 1, 0)

        mixed = zeros((br, features), dtype)
        if x.sinks is None:
            start = (zeros((br,), dtype) - jnp.inf, zeros((br,), dtype), mixed)
        else:  # a key of its own logit, whose value is zero
            start = (
                zeros((br,), dtype) + x.sinks[at.h].astype(dtype),
                zeros((br,), dtype) + 1,
                mixed,
            )
        top, total, mixed = lax.fori_loop(*lists.span(at), step, start)
        some = total > 0
        mixed = mixed / jnp.where(some, total, 1)[:, None]
        lse = jnp.where(some, top + jnp.log(jnp.where(some, total, 1)), -jnp.inf)
        whole, logs = out
        return _write(whole, mixed, at), lax.dynamic_update_slice(
            logs, lse[None, None], tiles.index(at.n, at.h, at.row * br)
        )

    out = (
        zeros((n, x.q.shape[1], heads, features), dtype),
        zeros((n, heads, x.q.shape[1]), dtype),
    )
    return _every_row(spec, p, n * heads, row, out)


def backward(spec: Spec, x: Operands, p: Fixed, out: Array, lse: Array, dout: Array) -> Operands:
    """The gradient of every operand, in what sums are kept in."""
    lists, (n, heads, share) = _Lists(spec, p), tiles.sizes(spec, x)
    (br, bc), dtype = spec.block, accumulator(x.q)
    zeros = _zeros_like(x, p)

    def row(i: Any, grads: Operands) -> Operands:
        at = _row(spec, i, heads)
        q, do, o = (tiles.read(a, at.n, at.row, br, at.h) for a in (x.q, dout, out))
        logs = lax.dynamic_slice(lse, tiles.index(at.n, at.h, at.row * br), (1, 1, br))[0, 0]
        logs = jnp.where(logs == -jnp.inf, 0, logs)  # nothing to attend to: all scores are -inf
        mean = (do * o).sum(1)  # of the gradients of the probabilities

        def step(place: Any, carry: Any) -> Any:
            dq, grads = carry
            tile = lists.tile(at, place)
            k = tiles.read(x.k, at.n, tile.col, bc, at.h // share)
            v = tiles.read(x.v, at.n, tile.col, bc, at.h // share)
            bias = None if x.bias is None else tiles.per_slot(x.bias, tile).astype(dtype)
            seen = tiles.visible(spec, p, tile)
            s, pull = jax.vjp(
                lambda *args: tiles.scores(spec, p, tile, seen, *args), q, k, bias, x.bias_consts
            )
            probs = jnp.exp(s - logs[:, None])
            dprobs, kept = tiles.dot(do, v, 1, 1), probs
            if (drop := tiles.dropout(spec, p, tile)) is not None:
                dprobs, kept = dprobs * drop.astype(dtype), probs * drop.astype(dtype)
            ds = probs * (dprobs - mean[:, None])
            dq_part, dk, dbias, dconsts = pull(ds)
            where = at._replace(row=tile.col, h=at.h // share)
            grads = grads._replace(
                k=_add(grads.k, dk, where), v=_add(grads.v, tiles.dot(kept, do, 0, 0), where)
            )
            if x.bias is not None:
                grads = grads._replace(bias=tiles.add_per_slot(grads.bias, dbias, tile))
            if dconsts:
                dconsts = jax.tree.map(
                    lambda a, b: a + b.astype(a.dtype), grads.bias_consts, dconsts
                )
                grads = grads._replace(bias_consts=dconsts)
            return dq + dq_part, grads

        dq, grads = lax.fori_loop(*lists.span(at), step, (zeros(q.shape, dtype), grads))
        grads = grads._replace(q=_write(grads.q, dq, at))
        if x.sinks is not None and grads.sinks is not None:
            probs = jnp.exp(x.sinks[at.h].astype(dtype) - logs)
            grads = grads._replace(sinks=grads.sinks.at[at.h].add(-(probs * mean).sum()))
        return grads

    start = jax.tree.map(lambda a: zeros(a.shape, accumulator(a)), x)
    return _every_row(spec, p, n * heads, row, start)


def _row(spec: Spec, i: Any, heads: int) -> Tile:
    """The i-th query block of all heads and batch elements."""
    stream, row = i // spec.grid[0], i % spec.grid[0]
    return Tile(stream // heads, stream % heads, 0, row, 0)


def _every_row(spec: Spec, p: Fixed, streams: int, row: Any, out: Any) -> Any:
    rows = streams * spec.grid[0]
    if not rows * p.row.shape[2]:  # nothing is stored: zeros
        return out
    return lax.fori_loop(jnp.int32(0), jnp.int32(rows), row, out)


def _write(a: Array, block: Array, at: Tile) -> Array:
    """`block[br, d]` in its place in `a[n, q, h, d]`."""
    index = tiles.index(at.n, at.row * block.shape[0], at.h, 0)
    return lax.dynamic_update_slice(a, block[None, :, None], index)


def _add(a: Array, block: Array, at: Tile) -> Array:
    index = tiles.index(at.n, at.row * block.shape[0], at.h, 0)
    old = lax.dynamic_slice(a, index, (1, block.shape[0], 1, block.shape[1]))
    return lax.dynamic_update_slice(a, old + block[None, :, None], index)


def _zeros_like(*trees: Any) -> Any:
    """A maker of zeros that vary over every mesh axis that the arguments vary over, as carries of
    loops must."""
    axes = _mesh.varying(*jax.tree.leaves(trees))
    return lambda shape, dtype: _mesh.vary(jnp.zeros(shape, dtype), axes)
