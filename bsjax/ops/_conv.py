"""`conv`: a convolution whose kernel is sparse between blocks of channels and dense in space."""

import math
from typing import Any

import jax
from jaxtyping import Array, Float

from bsjax.ops import _conv_core, _conv_form, _core, _fused, _gate, _mesh, _products, _reference
from bsjax.ops import _validate as validate
from bsjax.ops._activations import Activation, named
from bsjax.ops._choose import Implementation, check
from bsjax.ops._conv_form import Padding
from bsjax.ops._core import Spec
from bsjax.pattern import BlockPattern

OP = "conv"


def conv(
    x: Any,
    values: Any,
    p: BlockPattern,
    *,
    window: int | tuple[int, ...] | None = None,
    strides: int | tuple[int, ...] = 1,
    padding: Padding = "SAME",
    dilation: int | tuple[int, ...] = 1,
    transpose: bool = False,
    gate: Any = None,
    bias: Any = None,
    activation: Activation | None = None,
    residual: Any = None,
    precision: Any = None,
    implementation: Implementation = "auto",
) -> Float[Array, "..."]:
    """`y[q, m] = act(sum_t x[strides q + dilation t - pad, k] @ S_t[k, m] + bias) + residual`,
    for pixels q and the taps t of a window.

    `x[*n, *space, k]` has one to three axes of space and any leading axes, y is `[*n, *space, m]`.
    The matrices S_t have one pattern: they are zero outside the stored blocks, which are
    `values[e, *window, br, bc]`, dense in the taps. `window` may be left out, since values have it;
    if it is given, they must agree.

    `strides`, `padding` ("SAME", "VALID", "SAME_LOWER", or how much on both sides, or before and
    after, for each axis of space) and `dilation` of the kernel are those of
    `jax.lax.conv_general_dilated`. Pixels outside the image are zeros.

    With `transpose=True` it is the transposed convolution, from the same values: x is
    `[*n, *space, m]`, y is `[*n, *space, k]`, and both are those of `jax.lax.conv_transpose` with
    `transpose_kernel=True`. So "SAME" has `strides` times as many pixels out as in, and with a name
    it is the adjoint of the convolution with equal arguments that has its output for input;
    `before` in numbers is the adjoint of a convolution with `dilation (window - 1) - before`. There
    is no "SAME_LOWER" of it.

    `gate`, `bias`, `activation`, `residual`, `precision`, dtypes and derivatives are those of
    `matmul`, which a convolution with one tap is. dx is the other transpose, dvalues the sums over
    all images and windows of the outer products of pixels, in the stored blocks. A block with
    gate 0 is left out of y and dx. No implementation writes down all windows of the image.

    After Gray, Radford and Kingma 2017, "GPU Kernels for Block-Sparse Weights".
    """
    p, transpose = validate.pattern(OP, p), validate.flag(OP, "transpose", transpose)
    x, values = validate.array(OP, "x", x), _values(values, p)
    taps = values.shape[1:-2]
    axes = len(taps)
    if window is not None and _conv_form.each(OP, "window", window, axes) != taps:
        raise ValueError(
            f"{OP}: `window` is {window}, but `values` of shape {values.shape} have the window "
            f"{taps}: leave `window` out, or give values (e, *window, br, bc)."
        )
    k, m = p.shape[::-1] if transpose else p.shape
    if x.ndim <= axes or x.shape[-1] != k:
        space = ", ".join("space" for _ in taps)
        of = "the transpose of a kernel" if transpose else "a kernel"
        raise ValueError(
            f"{OP}: `x` of shape {x.shape} cannot be convolved with {of} of window {taps} and "
            f"channels {p.shape}: expected (..., {space}, {k})."
        )
    lead, space = x.shape[: -axes - 1], x.shape[-axes - 1 : -1]
    names = ("SAME", "VALID") if transpose else _conv_form.PADDINGS
    form = (_conv_form.transposed if transpose else _conv_form.forward)(
        space,
        taps,
        _conv_form.each(OP, "strides", strides, axes),
        _conv_form.pads(OP, padding, axes, names),
        _conv_form.each(OP, "dilation", dilation, axes),
    )
    into, out = form.space(transpose)
    shape = (*lead, *out, m)
    gate, bias, residual = validate.extras(OP, p, gate, bias, residual, shape, "channel")
    act = named(OP, activation)
    precision = validate.precision(OP, precision)
    dtype = _reference.common_dtype(x.dtype, values.dtype)
    check(implementation, _conv_core.problem(OP, form, math.prod(lead), p, dtype))
    if form.is_pointwise and not (transpose and form.reads_some):
        return _products.matmul(
            form.read(x) if form.reads_some else x,
            values.reshape(p.capacity, *p.block),
            p,
            transpose=transpose,
            gate=gate,
            bias=bias,
            activation=activation,
            residual=residual,
            precision=precision,
            implementation=implementation,
        )
    # an epilogue works on the unrounded sums
    bare = bias is None and act is None and residual is None
    sums = x.dtype if bare else _reference.accumulator(x, values)
    by_kernel = implementation == "mosaic"
    spec = Spec(implementation, precision, sums, dtype if by_kernel else None)
    rows = x.reshape(*lead, math.prod(into) * k)
    fits = residual is None or residual.dtype == x.dtype
    fits &= by_kernel and not bare and gate is None
    if fits and not callable(activation) and math.prod((*shape, rows.size, p.capacity)) > 0:
        epilogue = _fused.Form(activation, space=form)  # at no pass over memory
        rest = None if residual is None else residual.reshape(*lead, math.prod(out) * m)
        sums = _core.to(spec, x)
        return _fused.matmul(sums, transpose, epilogue, rows, values, p, bias, rest).reshape(shape)
    open_ = None
    if gate is not None:
        scaled = _gate.scaled(values, gate, p)
        # the tensor cores take 16 bits
        values = scaled.astype(values.dtype) if by_kernel else scaled
        open_ = None if implementation == "reference" else _gate.opened(gate, p)
    y = _conv_core.conv(spec, form, transpose, rows, values, p, open_)
    if bias is not None:
        y = _mesh.per_token(_plus, y, bias.astype(y.dtype))
    y = y.reshape(shape)
    if act is not None:
        y = act(y)
    if residual is not None:
        y = y + residual.astype(y.dtype)
    return y.astype(x.dtype)


def _plus(y: Float[Array, "n i"], bias: Float[Array, " m"]) -> Float[Array, "n i"]:
    """Images in rows, and a number for each channel."""
    pixels = y.reshape(y.shape[0], y.shape[1] // max(1, bias.size), bias.size)
    return (pixels + bias[None, None]).reshape(y.shape)


def _values(value: Any, p: BlockPattern) -> jax.Array:
    """Values `[e, *window, br, bc]` of `p`."""
    value = validate.array(OP, "values", value)
    if not 4 <= value.ndim <= 6 or (value.shape[0], *value.shape[-2:]) != (p.capacity, *p.block):
        e, br, bc = p.capacity, *p.block
        raise ValueError(
            f"{OP}: `values` of shape {value.shape} do not fit the pattern: expected "
            f"(e, *window, br, bc) = ({e}, *window, {br}, {bc}), with one to three axes of space."
        )
    return value
