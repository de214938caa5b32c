"""The feed-forward layer `act(x @ U + b) @ D + c + residual` in two kernels, three with gradients.

The gradient of what goes into the activation is an epilogue of the product with D^T:

    dz = (dy @ D^T) * act'(z)        db = the sum of dz over tokens, in the same kernel
    dx = dz @ U^T                    dU = sddmm(x, dz)
    dc = the sum of dy over tokens   dD = sddmm(act(z), dy)

so the gradient of the hidden activations is never written. z and act(z) are kept, in x's dtype.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bsjax.ops import _core, _fused, _mesh, _mosaic
from bsjax.ops import _validate as validate
from bsjax.ops._choose import Problem
from bsjax.ops._core import Spec
from bsjax.ops._fused import Form
from bsjax.pattern import BlockPattern, is_concrete

LINEAR = Form(None)


class Weights(NamedTuple):
    """Of a product: values, which blocks they are, and a bias."""

    values: Array
    p: BlockPattern
    bias: Array | None


def cast(one: Weights, dtype: Any) -> Weights:
    """With values and bias of that dtype."""
    bias = None if one.bias is None else jnp.asarray(one.bias, dtype)
    return one._replace(values=jnp.asarray(one.values, dtype), bias=bias)


def paired(p: BlockPattern) -> BlockPattern:
    """With blocks twice as wide."""
    return BlockPattern(p.row, p.col, p.grid, (p.block[0], 2 * p.block[1]))


def alike(p: BlockPattern, q: BlockPattern) -> bool:
    """Whether two patterns can be seen to be one: by their coordinates, or as the same variable."""
    if (p.grid, p.block) != (q.grid, q.block):
        return False
    if p.row is q.row and p.col is q.col:
        return True
    return is_concrete(p.row, p.col, q.row, q.col) and p.equals(q)


def pair(gate: Weights, up: Weights) -> Weights:
    """Both as one, the gate on the left, for a pattern of both."""
    return Weights(jnp.concatenate([gate.values, up.values], axis=2), paired(up.p), None)


def fits(x: Array, up: BlockPattern, down: BlockPattern, *, gated: bool) -> bool:
    """Whether both products have kernels, and the hidden features of one are those of the other."""
    if up.shape[1] != down.shape[0] or (gated and up.block[1] != down.block[0]):
        return False
    problems = (
        Problem(
            op="matmul",
            n=_mesh.tokens(x),
            grid=p.grid,
            block=p.block,
            capacity=p.capacity,
            dtype=x.dtype,
        )
        for p in (paired(up) if gated else up, down)
    )
    some = _mesh.tokens(x) * up.capacity * down.capacity > 0
    return some and not any(map(_mosaic.why_not, problems))


def mlp(
    x: Array, up: Weights, down: Weights, residual: Array | None, *, form: Form, precision: Any
) -> Array:
    """`form(x @ U + b) @ D + c + residual`, all in the dtype of x, for what `fits`.

    With a gated `form`, U is a `pair`.
    """
    spec = Spec("mosaic", validate.precision("matmul", precision), x.dtype, x.dtype)
    x, up, down, residual = _core.same_axes(x, up, down, residual)
    return _mlp(spec, form, x, up, down, residual)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mlp(spec, form, x, up, down, residual):
    hidden = _fused.matmul(spec, False, form, x, up.values, up.p, up.bias, None)
    return _down(spec, hidden, down, residual)


def _mlp_fwd(spec, form, x, up, down, residual):
    hidden, z = _fused._kept(spec, False, form, x, up.values, up.p, up.bias, None)
    return _down(spec, hidden, down, residual), (x, up, down, residual, hidden, z)


def _down(spec, hidden, down, residual):
    return _fused.matmul(spec, False, LINEAR, hidden, down.values, down.p, down.bias, residual)


def _mlp_bwd(spec, form, saved, dy):
    x, up, down, residual, hidden, z = saved
    dy = jnp.asarray(dy)
    dz, db = _slope(spec, form, up.bias is not None, dy, down.values, down.p, z)
    dx = _core.matmul(spec, True, dz, up.values, up.p)
    dup = _core.sddmm(spec, x, dz, up.p), None, _like(db, up.bias)
    ddown = _core.sddmm(spec, hidden, dy, down.p), None, _like(_total(dy), down.bias)
    return dx, up._make(dup), down._make(ddown), _like(dy, residual)


_mlp.defvjp(_mlp_fwd, _mlp_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _slope(spec, form, total, dy, values, p, z):
    """The gradient of what goes into the activation, and its sum over tokens if `total`."""
    args = (dy, values, p, z)
    if not is_concrete(*jax.tree.leaves(args)):
        return _run_slope(form, total, *args)
    return _jit_slope(form, total, *args)


def _slope_fwd(spec, form, total, *args):
    return _slope(spec, form, total, *args), args


def _slope_bwd(spec, form, total, args, cotangents):
    """Through the same formula made of products that have derivatives."""
    dy, values, p, z = args

    def unfused(dy, values, z):
        dhidden = _core.matmul(spec, True, dy, values, p)
        dz = _slope_of(form, p.block[0], dhidden, z)
        return dz.astype(dy.dtype), _total(dz) if total else None

    ddy, dvalues, ddz = jax.vjp(unfused, dy, values, z)[1](cotangents)
    return ddy, dvalues, None, ddz


_slope.defvjp(_slope_fwd, _slope_bwd)


def _slope_of(form: Form, side: int, dhidden: Array, z: Array) -> Array:
    """What the kernel computes, on arrays, in float32."""
    apply = functools.partial(form, width=side * (1 + form.gated))
    return jax.vjp(apply, z.astype(jnp.float32))[1](dhidden.astype(jnp.float32))[0]


def _run_slope(form, total, dy, values, p, z):
    """The kernel adds over tokens where they are all on one device."""
    explicit = any(axis is not None for axis in jax.typeof(dy).sharding.spec)
    whole = total and not explicit and not _mosaic.several_gpus()

    def kernel(dy: Array, weights: Any, z: Array) -> tuple[Array, ...]:
        values, p = weights
        return _mosaic.sloped(
            dy,
            values,
            p,
            z,
            transpose=True,
            activation=form.activation,
            gated=form.gated,
            total=whole,
        )

    if not whole:
        (dz,) = _mesh.per_token(kernel, dy, (values, p), z)
        return dz, _total(dz) if total else None
    dz, sums = kernel(_flat(dy), (values, p), _flat(z))
    return dz.reshape(z.shape), sums


_jit_slope = jax.jit(_run_slope, static_argnums=(0, 1))


def _flat(a: Array) -> Array:
    return a.reshape(_mesh.tokens(a), a.shape[-1])


def _total(dy: Array) -> Array:
    return jnp.sum(dy.astype(jnp.float32), axis=tuple(range(dy.ndim - 1)))


def _like(gradient: Array | None, of: Array | None) -> Array | None:
    return None if gradient is None or of is None else gradient.astype(of.dtype)
