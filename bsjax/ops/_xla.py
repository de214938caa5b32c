"""The products in jnp and lax: any device, fast on a CPU, memory of about another x and y.

What was measured on CPUs and decides the shape of this file:

* A gather of whole activation tiles costs little beside the product it feeds if it copies
  contiguous memory: so x is transposed once to features-first, and so is y.
* One product per stored block is too small, one batched product over all blocks writes e * bc * n
  partial sums to memory. A block-column at a time, a few stored blocks per product, keeps the
  partial sums in cache, and a column costs what it stores.
* The stored blocks of `x^T y` need no transposition at all where few of them are stored.
* At few tokens the batched product wins, since the partial sums are small and loops are not free.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bsjax.ops import _mesh
from bsjax.ops._lists import Lists
from bsjax.ops._reference import accumulator
from bsjax.pattern import BlockPattern

FEW_TOKENS = 128  # up to here one batched product over all stored blocks may beat the loop,
PARTIAL = 1 << 22  # as long as what it gathers and writes stays in the cache: so many numbers
WIDE = 32  # slices of columns as wide as this are read at a fair speed, and cost less
FEW_READS = 3  # than a transposition as long as no column is read more often, on average
INNER = 512  # features per product: large enough to run at full speed, small enough for the cache


def matmul(
    x: Float[Array, "n i"],
    values: Float[Array, "e br bc"],
    p: BlockPattern,
    *,
    transpose: bool,
    precision: Any,
    out_dtype: Any,
) -> Float[Array, "n o"]:
    """`x @ S`, or `x @ S^T` from the same values."""
    lists = Lists(p, transpose)
    n, partial = x.shape[0], x.shape[0] * p.capacity * sum(p.block)
    form = _batched if n <= FEW_TOKENS and partial <= PARTIAL else _by_column
    return form(x, values, lists, precision, accumulator(x, values)).astype(out_dtype)


def _batched(x: Array, values: Array, lists: Lists, precision: Any, dtype: Any) -> Array:
    """All partial products at once, then their sum per output block."""
    n = x.shape[0]
    if lists.slot is not None:
        values = values[lists.slot]
    blocks = x.reshape(n, lists.inputs, lists.width_in).swapaxes(0, 1)
    gathered = blocks.at[lists.source].get(mode="clip") if lists.inputs else blocks
    contract = 2 if lists.transpose else 1
    partial = lax.dot_general(
        gathered,
        values,
        (((2,), (contract,)), ((0,), (0,))),
        precision=precision,
        preferred_element_type=dtype,
    )
    y = jax.ops.segment_sum(partial, lists.target, lists.outputs, indices_are_sorted=True)
    return y.swapaxes(0, 1).reshape(n, lists.outputs * lists.width_out)


def _by_column(x: Array, values: Array, lists: Lists, precision: Any, dtype: Any) -> Array:
    """Output block by output block, a few stored blocks per product."""
    n, e = x.shape[0], values.shape[0]
    blocks = x.T.reshape(lists.inputs, lists.width_in, n)
    contract = ((0, 2), (0, 1)) if lists.transpose else ((0, 1), (0, 1))

    def product(start: Any, count: int, total: Array) -> Array:
        source = lax.dynamic_slice_in_dim(lists.source, start, count)
        return total + lax.dot_general(
            lists.take(values, start, count),
            blocks.at[source].get(mode="clip"),
            (contract, ((), ())),
            precision=precision,
            preferred_element_type=dtype,
        )

    def column(j: Any, y: Array) -> Array:
        total = zeros((lists.width_out, n), dtype, x, values, lists.ptr)
        total = in_pieces(lists.ptr[j], lists.ptr[j + 1], piece_size(lists, e), product, total)
        return lax.dynamic_update_index_in_dim(y, total, j, 0)

    y = zeros((lists.outputs, lists.width_out, n), dtype, x, values, lists.ptr)
    if e:
        y = lax.fori_loop(0, lists.outputs, column, y)
    return y.reshape(lists.outputs * lists.width_out, n).T


def sddmm(
    x: Float[Array, "n k"],
    y: Float[Array, "n m"],
    p: BlockPattern,
    *,
    precision: Any,
    out_dtype: Any,
) -> Float[Array, "e br bc"]:
    """The stored blocks of `x^T y`."""
    reads = p.capacity * sum(p.block) / max(1, sum(p.shape))
    form = _by_slot if min(p.block) >= WIDE and reads <= FEW_READS else _stored_by_column
    return form(x, y, Lists(p, False), p.capacity, precision, accumulator(x, y), out_dtype)


def _by_slot(
    x: Array, y: Array, lists: Lists, e: int, precision: Any, dtype: Any, out_dtype: Any
) -> Array:
    """Stored block by stored block, straight from the tokens: no transposition."""

    def product(i: Any, out: Array) -> Array:
        left = lax.dynamic_slice_in_dim(x, lists.source[i] * lists.width_in, lists.width_in, 1)
        right = lax.dynamic_slice_in_dim(y, lists.target[i] * lists.width_out, lists.width_out, 1)
        part = lax.dot_general(
            left, right, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=dtype
        )
        return lax.dynamic_update_index_in_dim(out, part.astype(out_dtype), i, 0)

    out = zeros((e, lists.width_in, lists.width_out), out_dtype, x, y, lists.ptr)
    return lax.fori_loop(0, lists.ptr[-1], product, out) if e else out


def _stored_by_column(
    x: Array, y: Array, lists: Lists, e: int, precision: Any, dtype: Any, out_dtype: Any
) -> Array:
    """Block-column by block-column, a few stored blocks per product."""
    n = x.shape[0]
    x_blocks = x.T.reshape(lists.inputs, lists.width_in, n)
    y_blocks = y.T.reshape(lists.outputs, lists.width_out, n)

    def column(j: Any, out: Array) -> Array:
        right = lax.dynamic_index_in_dim(y_blocks, j, keepdims=False)

        def product(start: Any, count: int, out: Array) -> Array:
            source = lax.dynamic_slice_in_dim(lists.source, start, count)
            part = lax.dot_general(
                x_blocks.at[source].get(mode="clip"),
                right,
                (((2,), (1,)), ((), ())),
                precision=precision,
                preferred_element_type=dtype,
            ).astype(out_dtype)
            return lax.dynamic_update_slice_in_dim(out, part, start, 0)

        return in_pieces(lists.ptr[j], lists.ptr[j + 1], piece_size(lists, e), product, out)

    out = zeros((e, lists.width_in, lists.width_out), out_dtype, x, y, lists.ptr)
    return lax.fori_loop(0, lists.outputs, column, out) if e else out


def piece_size(lists: Lists, e: int) -> int:
    """Stored blocks per product: a power of two, near the features that one product wants."""
    most = max(1, min(INNER // lists.width_in, e // max(1, lists.outputs)))
    return 1 << (most.bit_length() - 1)


def in_pieces(
    start: Any, stop: Any, piece: int, product: Callable[[Any, int, Array], Array], total: Array
) -> Array:
    """`product` over slots start..stop: whole pieces, then halves, so that no slot is padded."""
    whole = (stop - start) // piece
    total = lax.fori_loop(0, whole, lambda i, t: product(start + i * piece, piece, t), total)
    start = start + whole * piece
    while piece := piece // 2:
        left = stop - start >= piece
        total = lax.cond(left, lambda t, s=start, w=piece: product(s, w, t), lambda t: t, total)
        start = jnp.where(left, start + piece, start)
    return total


def zeros(shape: tuple[int, ...], dtype: Any, *like: Any) -> Array:
    """Zeros that vary over every mesh axis that one of `like` varies over, as loop carries must."""
    return _mesh.vary(jnp.zeros(shape, dtype), _mesh.varying(*like))
