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
    rows = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    (y,) = _conv((rows,), values, (), p, form, transpose, out_dtype, {})
    _, out = form.space(transpose)
    return y.reshape(y.shape[0], *out, p.shape[0 if transpose else 1])


def fused(
    x: Float[Array, "n i"],
    values: Float[Array, "e ..."],
    p: BlockPattern,
    form: Form,
    bias: Float[Array, " m"] | None,
    residual: Float[Array, "n o"] | None,
    *,
    transpose: bool,
    activation: str | None,
    keep: bool,
) -> tuple[Array, ...]:
    """`activation(conv(x) + bias) + residual`, and what the activation was applied to if `keep`,
    of and as rows."""
    bias_row = () if bias is None else (bias.astype(jnp.float32)[None],)
    images = (x,) if residual is None else (x, residual)
    options = {
        "activation": activation,
        "bias": bias is not None,
        "residual": residual is not None,
        "keep": keep,
    }
    return _conv(images, values, bias_row, p, form, transpose, x.dtype, options)


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
    """The kernel, with the epilogue that `options` name, on rows of images and perhaps of a
    residual."""
    from pallas_kernels import conv as kernels
    from pallas_kernels import conv_config, lists, windows
    from pallas_kernels.epilogue import Epilogue

    br, bc = p.block
    sizes, blocks = ((bc, br), p.grid[0]) if transpose else ((br, bc), p.grid[1])
    epilogue, axes = Epilogue(**options), _axes(form)
    places = windows.tables(axes, transpose)

    def run(*args: Array) -> tuple[Array, ...]:
        n, bytes_ = args[0].shape[0], jnp.dtype(out_dtype).itemsize
        strips = kernels.strips(axes[-1], transpose)
        workers = _mosaic.multiprocessors()
        chosen = conv_config.for_conv(n, sizes, bytes_, workers, strips=strips)
        tile = chosen.tile // chosen.pixels
        rows = (_mosaic._padded(a, tile) for a in args[: len(images)])
        args = _mosaic.alike(*rows, *args[len(images) :])
        (x, *residual), (values, row, col, *rest) = args[: len(images)], args[len(images) :]
        tables, bias = rest[: len(places)], rest[len(places) :]
        steps = lists.of_pattern(row, col, p.grid, transpose=transpose)
        outs = kernels.conv(
            x,
            values,
            steps,
            chosen,
            *bias,
            *residual,
            axes=axes,
            tables=tables,
            blocks=blocks,
            transpose=transpose,
            epilogue=epilogue,
            out_dtype=out_dtype,
        )
        return tuple(_mesh.vary(y, _mesh.varying(x))[:n] for y in outs)

    weights = (
        values.reshape(p.capacity, math.prod(form.window), br, bc),
        p.row,
        p.col,
        *places,
        *bias,
    )
    rule = ["n i", *["n o"] * (len(images) - 1), "e t a b", "e", "e"]
    rule += [*["q r", "s u", "v w"][: len(places)], *["h c"] * len(bias)]
    rule = f"{', '.join(rule)} -> {', '.join(['n o', 'n p'][: 1 + epilogue.keep])}"
    return _mosaic._on_each_device(run, images, weights, rule)


def taps(
    x: Float[Array, "n ..."],
    y: Float[Array, "n ..."],
    p: BlockPattern,
    form: Form,
    *,
    precision: Any,
    out_dtype: Any,
) -> Float[Array, "e ..."]:
    """The stored blocks, for each tap, of source times target."""
    from pallas_kernels import lists, sampled_dense, windows

    axes = _axes(form)
    pairs = windows.Pairs(axes).table()

    def run(x: Array, y: Array, row: Array, col: Array, table: Array) -> Array:
        workers, bytes_ = _mosaic.multiprocessors(), jnp.dtype(out_dtype).itemsize
        chosen = _mosaic._unsplit(config.for_sddmm(p.block, bytes_, workers))
        rows = (_mosaic._padded(a, chosen.depth) for a in (x, y))
        x, y, row, col, table = _mosaic.alike(*rows, row, col, table)
        ptr = lists.pointers(col, p.grid[1])
        options = {"block": p.block, "axes": axes, "table": table, "out_dtype": out_dtype}
        v = sampled_dense.sddmm(x, y, row, ptr, chosen, **options)
        stored = jnp.arange(p.capacity, dtype=jnp.int32) < ptr[-1]
        v = _mesh.vary(v, _mesh.varying(x))
        return jnp.where(stored[:, None, None, None], v, 0)

    rows = tuple(a.reshape(a.shape[0], math.prod(a.shape[1:])) for a in (x, y))
    weights, rule = (p.row, p.col, pairs), "n i, n o, e, e, q r -> e t a b"
    v = _mosaic._on_each_device(run, rows, weights, rule)
    return v.reshape(p.capacity, *form.window, *p.block)


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
