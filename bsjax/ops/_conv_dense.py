"""A convolution by way of the dense kernel, behind the same derivatives."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from bsjax.ops import _dense
from bsjax.ops._conv_form import Form
from bsjax.ops._conv_reference import as_kernel, blocks, tall
from bsjax.ops._reference import accumulator
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
    """The convolution with the dense kernel, or its transpose."""
    e, *window, br, bc = values.shape
    dense = _dense.todense(values.reshape(e, math.prod(window) * br, bc), tall(p, window))
    w = as_kernel(dense, window, p)
    options = {"precision": precision, "preferred_element_type": accumulator(x, values)}
    if transpose:
        flipped = jnp.flip(w, tuple(range(len(window)))).swapaxes(-2, -1)
        return form.back(x, flipped, **options).astype(out_dtype)
    return form.conv(x, w, **options).astype(out_dtype)


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
    options = {"precision": precision, "preferred_element_type": accumulator(x, y)}
    dense = form.taps(x.swapaxes(0, -1), jnp.moveaxis(y, 0, -2), **options)
    return blocks(jnp.moveaxis(dense, 0, -2), p).astype(out_dtype)
