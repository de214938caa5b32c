"""What a convolution with a block-sparse kernel means: `lax` with the dense kernel, differentiated
by plain autodiff, no speed."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bsjax.ops import _reference
from bsjax.ops._conv_form import Form
from bsjax.pattern import BlockPattern


def kernel(values: Float[Array, "e ..."], p: BlockPattern) -> Float[Array, "*window k m"]:
    """The dense kernel: zero but for the stored blocks `values[e, *window, br, bc]`."""
    e, *window, br, bc = values.shape
    return as_kernel(
        _reference.todense(values.reshape(e, math.prod(window) * br, bc), tall(p, window)),
        window,
        p,
    )


def tall(p: BlockPattern, window: Any) -> BlockPattern:
    """The pattern with all taps of a block below each other."""
    return BlockPattern(p.row, p.col, p.grid, (math.prod(window) * p.block[0], p.block[1]))


def as_kernel(
    dense: Float[Array, "i m"], window: Any, p: BlockPattern
) -> Float[Array, "*window k m"]:
    """A dense matrix of such a pattern as a kernel."""
    (k, m), (r, _), (br, _) = p.shape, p.grid, p.block
    taps = dense.reshape(r, math.prod(window), br, m).swapaxes(0, 1)
    return taps.reshape(*window, k, m)


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
    """The convolution with the dense kernel, or its transpose."""
    kept = _reference.accumulator(x, values)
    x, w = x.astype(kept), kernel(values.astype(kept), p)
    if not transpose:
        return form.conv(x, w, precision=precision).astype(out_dtype)
    zeros = jnp.zeros((x.shape[0], *form.source, w.shape[-2]), kept)
    pull = jax.vjp(lambda source: form.conv(source, w, precision=precision), zeros)[1]
    return pull(x)[0].astype(out_dtype)


def taps(
    x: Float[Array, "n ..."],
    y: Float[Array, "n ..."],
    p: BlockPattern,
    form: Form,
    *,
    precision: Any,
    out_dtype: Any,
) -> Float[Array, "e ..."]:
    """The stored blocks of the gradient of the dense kernel."""
    kept = _reference.accumulator(x, y)
    x, y = x.astype(kept), y.astype(kept)
    w = jnp.zeros((*form.window, x.shape[-1], y.shape[-1]), kept)
    dense = jax.vjp(lambda w: form.conv(x, w, precision=precision), w)[1](y)[0]
    return blocks(dense, p).astype(out_dtype)


def blocks(dense: Float[Array, "*window k m"], p: BlockPattern) -> Float[Array, "e ..."]:
    """The stored blocks of a kernel, zeros in spare slots."""
    *window, _, m = dense.shape
    (r, _), (br, bc) = p.grid, p.block
    taps = dense.reshape(math.prod(window), r, br, m).swapaxes(0, 1).reshape(-1, m)
    return _reference.fromdense(taps, tall(p, window)).reshape(p.capacity, *window, br, bc)
