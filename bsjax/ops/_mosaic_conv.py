"""The door to the kernels of convolutions: `_mosaic` says what they can run.

Images are rows `[n, pixels * channels]` for a kernel, as they lie.
"""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from bsjax.ops import _mesh, _mosaic
from bsjax.ops._conv_form import Form
from bsjax.pattern import BlockPattern
from pallas_kernels import config


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
    return _conv((x,), values, (), p, form, transpose, out_dtype, {})[0]


def _conv(
    images: tuple[Array, ...],
    values: Array,
    bias: tuple[Array, ...],
    p: BlockPattern,
    form: Form,
    transpose: bool,
    out_dtype: Any,
    options: dict[str, Any],
) -> tuple[Array, ...]:
    """The kernel, with the epilogue that `options` name, on images and perhaps a residual."""
    from pallas_kernels import conv as kernels
    from pallas_kernels import lists
    from pallas_kernels.epilogue import Epilogue

    br, bc = p.block
    sizes, blocks = ((bc, br), p.grid[0]) if transpose else ((br, bc), p.grid[1])
    _, out = form.space(transpose)
    epilogue = Epilogue(**options)

    def run(*args: Array) -> tuple[Array, ...]:
        n, bytes_ = args[0].shape[0], jnp.dtype(out_dtype).itemsize
        chosen = config.for_conv(n, sizes, bytes_, _mosaic.multiprocessors())
        rows = (_mosaic._padded(a, chosen.tile) for a in args[: len(images)])
        args = _mosaic._alike(*rows, *args[len(images) :])
        (x, *residual), (values, row, col, *bias) = args[: len(images)], args[len(images) :]
        steps = lists.of_pattern(row, col, p.grid, transpose=transpose)
        outs = kernels.conv(
            x,
            values,
            steps,
            chosen,
            *bias,
            *residual,
            axes=_axes(form),
            blocks=blocks,
            transpose=transpose,
            epilogue=epilogue,
            out_dtype=out_dtype,
        )
        return tuple(_mesh.vary(y, _mesh.varying(x))[:n] for y in outs)

    rows = tuple(a.reshape(a.shape[0], a[0].size) for a in images)
    weights = (values.reshape(p.capacity, math.prod(form.window), br, bc), p.row, p.col, *bias)
    axes = ["n i", *["n o"] * (len(rows) - 1), "e t a b", "e", "e", *["h c"] * len(bias)]
    rule = f"{', '.join(axes)} -> {', '.join(['n o', 'n p'][: 1 + epilogue.keep])}"
    outs = _mosaic._on_each_device(run, rows, weights, rule)
    return tuple(y.reshape(y.shape[0], *out, blocks * sizes[1]) for y in outs)


def _axes(form: Form) -> Any:
    from pallas_kernels.windows import Axis

    return tuple(
        Axis(source=p, target=q, window=w, stride=s, dilation=d, low=low)
        for p, q, w, s, d, low in zip(
            form.source,
            form.target,
            form.window,
            form.strides,
            form.dilation,
            form.low,
            strict=True,
        )
    )
