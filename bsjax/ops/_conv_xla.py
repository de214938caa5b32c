"""A convolution over stored blocks in lax: any device, fast on a CPU.

What was measured on CPUs and decides the shape of this file: `lax.conv_general_dilated` runs at
the speed of a matrix product and packs the pixels of a window as it goes, without writing them to
memory. So an output block-column is a convolution of the channels that it reads, side by side: a
stored block costs one copy of its channels, however many taps there are, and the copies of one
product are all that is there at a time. All operands lie as `lax` wants them before it is called:
what it has to turn around inside a loop takes ten times as long.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bsjax.ops._conv_form import Form
from bsjax.ops._lists import Lists
from bsjax.ops._reference import accumulator
from bsjax.ops._xla import in_pieces, piece_size, zeros
from bsjax.pattern import BlockPattern


def conv(
    x: Float[Array, "n ..."],
    values: Float[Array, "e ..."],
    p: BlockPattern,
    form: Form,
    *,
    transpose: bool,
    precision: Any,
    out_dtype: Any,
) -> Float[Array, "n ..."]:
    """The convolution over stored blocks, or its transpose from the same values."""
    lists, dtype = Lists(p, transpose), accumulator(x, values)
    n, e, axes = x.shape[0], p.capacity, len(form.window)
    into, out = form.space(transpose)
    images = x.reshape(n, *into, lists.inputs, lists.width_in)
    if transpose:
        values = jnp.flip(values, tuple(range(1, axes + 1))).swapaxes(-2, -1)
    run = form.back if transpose else form.conv

    def product(start: Any, count: int, total: Array) -> Array:
        source = lax.dynamic_slice_in_dim(lists.source, start, count)
        channels = images.at[..., source, :].get(mode="clip").astype(dtype)
        channels = channels.reshape(n, *into, count * lists.width_in)
        w = jnp.moveaxis(lists.take(values, start, count), 0, axes).astype(dtype)
        w = w.reshape(*form.window, count * lists.width_in, lists.width_out)
        return total + run(channels, lax.optimization_barrier(w), precision=precision)

    def column(j: Any, y: Array) -> Array:
        total = zeros((n, *out, lists.width_out), dtype, x, values, lists.ptr)
        total = in_pieces(lists.ptr[j], lists.ptr[j + 1], piece_size(lists, e), product, total)
        return lax.dynamic_update_slice_in_dim(y, total.astype(out_dtype), j * lists.width_out, -1)

    features = lists.outputs * lists.width_out
    y = zeros((n, *out, features), out_dtype, x, values, lists.ptr)
    return lax.fori_loop(0, lists.outputs, column, y)


def taps(
    x: Float[Array, "n ..."],
    y: Float[Array, "n ..."],
    p: BlockPattern,
    form: Form,
    *,
    precision: Any,
    out_dtype: Any,
) -> Float[Array, "e ..."]:
    """The stored blocks, for each tap, of source times target: images are what is summed over."""
    lists, dtype = Lists(p, False), accumulator(x, y)
    n, e, axes = x.shape[0], p.capacity, len(form.window)
    # [r, br, *source, n] and [*target, n, c * bc]
    x_blocks = x.astype(dtype).swapaxes(0, -1)
    x_blocks = x_blocks.reshape(lists.inputs, lists.width_in, *form.source, n)
    y_last = jnp.moveaxis(y.astype(dtype), 0, -2)

    def column(j: Any, v: Array) -> Array:
        right = lax.dynamic_slice_in_dim(y_last, j * lists.width_out, lists.width_out, -1)

        def product(start: Any, count: int, v: Array) -> Array:
            source = lax.dynamic_slice_in_dim(lists.source, start, count)
            left = x_blocks.at[source].get(mode="clip")
            left = left.reshape(count * lists.width_in, *form.source, n)
            part = form.taps(left, right, precision=precision).astype(out_dtype)
            part = part.reshape(count, lists.width_in, *form.window, lists.width_out)
            return lax.dynamic_update_slice_in_dim(v, jnp.moveaxis(part, 1, axes + 1), start, 0)

        return in_pieces(lists.ptr[j], lists.ptr[j + 1], piece_size(lists, e), product, v)

    v = zeros((e, *form.window, *p.block), out_dtype, x, y, lists.ptr)
    return lax.fori_loop(0, lists.outputs, column, v)
