"""A scale for each stored block, and no work for those whose scale is zero.

A slot with gate 0 is as good as a spare one: the products get a pattern without it, and run as they
always do. What is left for a rule of its own is the gradient. With D = sddmm(x, dy, p),

    dvalues[i] = gate[i] D[i]        dgate[i] = <D[i], values[i]>

so D is needed where the gate is 0 as well, but only if somebody asks for dgate.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from bsjax.ops import _core, _mesh, _reference, _scan
from bsjax.ops._core import Spec
from bsjax.pattern import BlockPattern


def scaled(values: Array, gate: Array, p: BlockPattern) -> Array:
    """`gate * values` before rounding. A spare slot may hold anything, NaN too, and the gradient of
    its gate is zero all the same."""
    dtype = _reference.accumulator(values, gate)
    stored, gate = (a.reshape(-1, *[1] * (values.ndim - 1)) for a in (p.col < p.grid[1], gate))
    return jnp.where(stored, values.astype(dtype), 0) * gate.astype(dtype)


def applied(
    spec: Spec, transpose: bool, x: Array, values: Array, gate: Array, p: BlockPattern
) -> tuple[Array, BlockPattern, Array]:
    """Values and pattern to multiply with, and the probe that takes the gradients of values and
    gate from the cotangent of the sums."""
    x, values, gate, p = _core.same_axes(x, values, gate, p)
    open_, order = opened(gate, p)
    product = scaled(values, gate, p)
    probe = _scan.probe(spec, transpose, x, product, p, spec.out_dtype)
    if probe is None:
        probe = _late(spec, transpose, x, values, gate, p)
    return product[order], open_, probe


def opened(gate: Array, p: BlockPattern) -> tuple[BlockPattern, Array]:
    """The pattern with closed slots as spare ones, and the slots that its own come from."""
    closed = gate == 0
    order = jnp.argsort(closed | (p.col == p.grid[1]), stable=True)
    row, col = (
        jnp.where(closed, jnp.int32(size), jnp.asarray(a))[order]
        for a, size in zip((p.row, p.col), p.grid, strict=True)
    )
    return BlockPattern(row, col, p.grid, p.block), order


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _late(
    spec: Spec, transpose: bool, x: Array, values: Array, gate: Array, p: BlockPattern
) -> Array:
    """Zeros in the place of `x @ S`, which nobody reads."""
    return _mesh.zeros(x, p.shape[0 if transpose else 1], spec.out_dtype)


def _late_fwd(spec, transpose, *args):
    wanted = args[2].perturbed
    args = jax.tree.map(lambda a: a.value, args, is_leaf=lambda a: hasattr(a, "perturbed"))
    return _late(spec, transpose, *args), (args, () if wanted else None)


def _late_bwd(spec, transpose, saved, dsums):
    (x, values, gate, p), wanted = saved
    if isinstance(dsums, SymbolicZero):
        return None, None, None, None
    dtype = _reference.accumulator(values, gate)
    pair = (dsums, x) if transpose else (x, dsums)
    sums = dataclasses.replace(spec, out_dtype=dtype)
    if wanted is None:
        open_, order = opened(gate, p)
        d = _core.sddmm(sums, *pair, open_)[jnp.argsort(order)]
    else:
        d = _core.sddmm(sums, *pair, p)
    dvalues = (scaled(d, gate, p)).astype(values.dtype)
    stored = (p.col < p.grid[1])[:, None, None]
    each = jnp.where(stored, values.astype(dtype), 0) * d
    return None, dvalues, jnp.sum(each, axis=(1, 2)).astype(gate.dtype), None


_late.defvjp(_late_fwd, _late_bwd, symbolic_zeros=True)
