"""`activation(x @ S + bias) + residual`, or the gated linear unit, in one kernel, with derivatives.

The kernel writes what the activation was applied to beside y, in the dtype of x, when a gradient is
wanted. From there the chain rule is elementwise, and the rest are the two products again.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bsjax.ops import _conv_core, _conv_form, _core, _mesh, _mosaic, _mosaic_conv
from bsjax.ops._activations import ACTIVATIONS
from bsjax.ops._core import Spec
from bsjax.pattern import BlockPattern, is_concrete


class Form(NamedTuple):
    """What the kernel does to its sums."""

    activation: str | None
    gated: bool = False  # columns of S are pairs of blocks; activation(left) * right
    space: _conv_form.Form | None = None  # of a convolution: images are rows [pixels * channels]

    @property
    def bare(self) -> bool:
        """Whether nothing has to be kept for a gradient."""
        return self.activation is None and not self.gated

    def __call__(self, sums: Array, width: int) -> Array:
        """The same on an array, where blocks (or pairs) are so wide."""
        act = ACTIVATIONS[self.activation] if self.activation else lambda x: x
        if not self.gated:
            return act(sums)
        pairs = sums.reshape(*sums.shape[:-1], -1, 2, width // 2)
        y = act(pairs[..., 0, :]) * pairs[..., 1, :]
        return y.reshape(*sums.shape[:-1], -1)


def matmul(
    spec: Spec,
    transpose: bool,
    form: Form,
    x: Array,
    values: Array,
    p: BlockPattern,
    bias: Array | None,
    residual: Array | None,
    probe: Array | None = None,
) -> Array:
    """The product with its epilogue, in the dtype of x, rounded once.

    A `probe`, of the shape of `x @ S` and the dtype of x, is never read: its cotangent is that of
    the sums, and the gradient of the values is left to who gave it.
    """
    args = _core.same_axes(x, values.astype(x.dtype), p, bias, residual, probe)
    return _fused(spec, transpose, form, *args)


def _run(transpose, form, keep, x, values, p, bias, residual):
    def kernel(x: Array, weights: Any, *residual: Array) -> tuple[Array, ...]:
        values, p, bias = weights
        if form.space is not None:
            return _mosaic_conv.fused(
                x,
                values,
                p,
                form.space,
                bias,
                *residual or (None,),
                transpose=transpose,
                activation=form.activation,
                keep=keep,
            )
        return _mosaic.fused(
            x,
            values,
            p,
            bias,
            *residual or (None,),
            transpose=transpose,
            activation=form.activation,
            gated=form.gated,
            keep=keep,
        )

    others = () if residual is None else (residual,)
    return _mesh.per_token(kernel, x, (values, p, bias), *others)


_jit_run = jax.jit(_run, static_argnums=(0, 1, 2))


def _run_now(transpose, form, keep, *args):
    """Outside jit, compiled once for each size."""
    if not is_concrete(*jax.tree.leaves(args)):
        return _run(transpose, form, keep, *args)
    with _mosaic.in_words("matmul" if form.space is None else "conv"):
        return _jit_run(transpose, form, keep, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fused(spec, transpose, form, x, values, p, bias, residual, probe):
    return _run_now(transpose, form, False, x, values, p, bias, residual)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _kept(spec, transpose, form, x, values, p, bias, residual):
    """y and what the activation was applied to (y itself where there is none)."""
    keep = not form.bare
    y, *before = _run_now(transpose, form, keep, x, values, p, bias, residual)
    return y, before[0] if keep else y


def _fused_fwd(spec, transpose, form, *args):
    *args, probe = args
    (y, _), (x, *saved) = _kept_fwd(spec, transpose, form, *args)
    return y, (None if probe is not None else x, *saved)


def _kept_fwd(spec, transpose, form, x, values, p, bias, residual):
    y, before = _kept(spec, transpose, form, x, values, p, bias, residual)
    return (y, before), _core.saved(x, values, p, bias, residual, before)


def _fused_bwd(spec, transpose, form, saved, dy):
    *grads, dsums = _chain(spec, transpose, form, saved, dy, None)
    return *grads, dsums if saved[0] is None else None


def _kept_bwd(spec, transpose, form, saved, cotangents):
    dy, dbefore = cotangents
    if form.bare:  # both are y
        return _chain(spec, transpose, form, saved, dy + dbefore, None)[:-1]
    return _chain(spec, transpose, form, saved, dy, dbefore)[:-1]


def _chain(spec, transpose, form, saved, dy, dbefore):
    """The gradients of all arguments, and of the sums. Without x, none of the values."""
    x, values, p, bias, residual, before = saved
    dy = jnp.asarray(dy)
    slope = dy.astype(jnp.float32)
    if not form.bare:
        width = p.block[0 if transpose else 1]
        apply = functools.partial(form, width=width)
        slope = jax.vjp(apply, before.astype(jnp.float32))[1](slope)[0]
    if dbefore is not None:
        slope = slope + jnp.asarray(dbefore).astype(jnp.float32)
    dsums = slope.astype(before.dtype)  # that of x
    dx = _product(form, _core.to(spec, before), not transpose, dsums, values, p)
    dvalues = dbias = None
    if x is not None:
        pair = (dsums, x) if transpose else (x, dsums)
        dvalues = _stored(form, _core.to(spec, values), *pair, p)
    if bias is not None:
        dbias = jnp.sum(slope, axis=tuple(range(slope.ndim - 1)))
        if form.space is not None:
            dbias = jnp.sum(dbias.reshape(dbias.size // bias.size, bias.size), axis=0)
        dbias = dbias.astype(bias.dtype)
    dresidual = None if residual is None else dy.astype(residual.dtype)
    return dx, dvalues, None, dbias, dresidual, dsums


def _product(form, spec, transpose, x, values, p):
    if form.space is None:
        return _core.matmul(spec, transpose, x, values, p)
    return _conv_core.conv(spec, form.space, transpose, x, values, p)


def _stored(form, spec, x, y, p):
    if form.space is None:
        return _core.sddmm(spec, x, y, p)
    return _conv_core.taps(spec, form.space, x, y, p)


_fused.defvjp(_fused_fwd, _fused_bwd)
_kept.defvjp(_kept_fwd, _kept_bwd)
