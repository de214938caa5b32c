"""A convolution with a block-sparse kernel and its derivatives, which are the same two again.

    y = conv(x, S)     dx = the transpose of the convolution, from the same values
                       dvalues = taps(x, dy)
    v = taps(x, y)     dx = the transpose of y with dv in the place of the values,  dy = conv(x, dv)

Images are rows `[..., space * channels]` here, so that they are placed over a mesh as tokens are.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bsjax.ops import _conv_dense, _conv_reference, _conv_xla, _core, _mesh, _mosaic_conv
from bsjax.ops._choose import Problem
from bsjax.ops._conv_form import Form
from bsjax.ops._core import Spec
from bsjax.pattern import BlockPattern

# `_mosaic.why_not` says what kernels cannot run
_IMPLEMENTATIONS = {
    "xla": _conv_xla,
    "mosaic": _mosaic_conv,
    "dense": _conv_dense,
    "reference": _conv_reference,
}

type Open = tuple[BlockPattern, Array] | None  # the slots to read, and where values have them


def conv(
    spec: Spec,
    form: Form,
    transpose: bool,
    x: Array,
    values: Array,
    p: BlockPattern,
    open_: Open = None,
) -> Array:
    """The convolution of `x` with `values[e, *window, br, bc]`, or its transpose, in
    `spec.out_dtype`. Values outside `open_` are zeros and are not read, but for their gradient."""
    x, values, p, open_ = _core.same_axes(x, values, p, open_)
    product = _run_conv if spec.name == "reference" else _conv
    return product(spec, form, transpose, x, values, p, open_)


def taps(spec: Spec, form: Form, x: Array, y: Array, p: BlockPattern) -> Array:
    """The stored blocks, for each tap, of source times target, in `spec.out_dtype`."""
    x, y, p = _core.same_axes(x, y, p)
    return _taps(spec, form, x, y, p)


def problem(op: str, form: Form, n: Any, p: BlockPattern, dtype: Any) -> Problem:
    """What a choice depends on, for `n` images."""
    return Problem(
        op=op,
        n=n * math.prod(form.target),
        grid=p.grid,
        block=p.block,
        capacity=p.capacity,
        dtype=dtype,
        taps=math.prod(form.window),
        pixels=max(math.prod(form.source), math.prod(form.target)),
        images=n,
    )


@_core.compiled("conv", 3)
def _run_conv(
    spec: Spec,
    form: Form,
    transpose: bool,
    x: Array,
    values: Array,
    p: BlockPattern,
    open_: Open,
) -> Array:
    x, values = _core.one_dtype(spec, x, values)
    if open_ is not None:
        p, order = open_
        values = values[order]
    into, out = form.space(transpose)
    features, outputs = p.shape[::-1] if transpose else p.shape

    def run(name: str, x: Array, weights: tuple[Array, BlockPattern]) -> Array:
        n, width = x.shape[0], math.prod(out) * outputs
        if not n * width * p.capacity * math.prod(into):
            return _mesh.vary(jnp.zeros((n, width), spec.out_dtype), _mesh.varying(x))
        y = _IMPLEMENTATIONS[name].conv(
            x.reshape(n, *into, features),
            *weights,
            form,
            transpose=transpose,
            precision=spec.precision,
            out_dtype=spec.out_dtype,
        )
        return y.reshape(n, width)

    staged = _core.stage(spec, problem("conv", form, _mesh.tokens(x), p, x.dtype), run)
    return _mesh.per_token(staged, x, (values, p))


@_core.compiled("conv", 2)
def _run_taps(spec: Spec, form: Form, x: Array, y: Array, p: BlockPattern) -> Array:
    x, y = _core.one_dtype(spec, x, y)

    def run(name: str, x: Array, y: Array, p: BlockPattern) -> Array:
        n, shape = x.shape[0], (p.capacity, *form.window, *p.block)
        if not x.size * y.size * math.prod(shape):
            return _mesh.vary(jnp.zeros(shape, spec.out_dtype), _mesh.varying(x))
        return _IMPLEMENTATIONS[name].taps(
            x.reshape(n, *form.source, p.shape[0]),
            y.reshape(n, *form.target, p.shape[1]),
            p,
            form,
            precision=spec.precision,
            out_dtype=spec.out_dtype,
        )

    staged = _core.stage(spec, problem("taps", form, _mesh.tokens(x), p, x.dtype), run)
    return _mesh.over_tokens(staged, x, y, p)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _conv(
    spec: Spec,
    form: Form,
    transpose: bool,
    x: Array,
    values: Array,
    p: BlockPattern,
    open_: Open,
) -> Array:
    return _run_conv(spec, form, transpose, x, values, p, open_)


def _conv_fwd(spec, form, transpose, x, values, p, open_):
    # through the rule again: a second derivative differentiates what is computed here
    y = _conv(spec, form, transpose, x, values, p, open_)
    return y, _core.saved(x, values, p, open_)


def _conv_bwd(spec, form, transpose, residuals, dy):
    x, values, p, open_ = residuals
    dy = jnp.asarray(dy)  # a cotangent may be a NumPy array
    dx = _conv(_core.to(spec, x), form, not transpose, dy, values, p, open_)
    pair = (dy, x) if transpose else (x, dy)
    return dx, _taps(_core.to(spec, values), form, *pair, p), None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _taps(spec: Spec, form: Form, x: Array, y: Array, p: BlockPattern) -> Array:
    return _run_taps(spec, form, x, y, p)


def _taps_fwd(spec, form, x, y, p):
    return _taps(spec, form, x, y, p), _core.saved(x, y, p)


def _taps_bwd(spec, form, residuals, dv):
    x, y, p = residuals
    dv = jnp.asarray(dv)
    dx = _conv(_core.to(spec, x), form, True, y, dv, p, None)
    dy = _conv(_core.to(spec, y), form, False, x, dv, p, None)
    return dx, dy, None


_conv.defvjp(_conv_fwd, _conv_bwd)
_taps.defvjp(_taps_fwd, _taps_bwd)
