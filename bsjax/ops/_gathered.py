"""Policy "forward" of a sampled product by kernels that read slices of 64 where they lie.

    contract(x, w)  = x D w           dx = columns(dy, w)   dw = rows(x, dy)
    columns(dy, w)  = dy w^T D        ddy = contract(g, w)  dw = rows(g, dy)
    rows(x, dy)     = D x^T dy        dx = columns(dy, g)   ddy = contract(x, g)

D is diagonal: what each feature counts, most of them nothing. The three call each other, so there
are derivatives of every order. What is kept for them is x and w as they are, no copy of a sample.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bsjax.ops import _core, _mesh, _mosaic, _reference
from bsjax.ops._sampled_core import Spec


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(
    spec: Spec, which: str, left: Array, right: Array, weights: Float[Array, " g"]
) -> Array:
    """One of the three, of operands `[..., features]` or weights."""
    run = functools.partial(_run, spec, which)
    if which == "rows":
        return _mesh.over_tokens(run, left, right, weights)
    return _mesh.per_token(lambda left, rest: run(left, *rest), left, (right, weights))


def _product_fwd(spec, which, left, right, weights):
    return product(spec, which, left, right, weights), _core.saved(left, right, weights)


def _product_bwd(spec, which, residuals, g):
    left, right, weights = residuals
    g = jnp.asarray(g)
    run = functools.partial(product, spec)
    if which == "contract":
        return run("columns", g, right, weights), run("rows", left, g, weights), None
    if which == "columns":
        return run("contract", g, right, weights), run("rows", g, left, weights), None
    return run("columns", right, g, weights), run("contract", left, g, weights), None


product.defvjp(_product_fwd, _product_bwd)


def _run(spec: Spec, which: str, left: Array, right: Array, weights: Array) -> Array:
    taken = spec.cut(spec.features).taken
    same = spec.sampler in ("uniform", "top_k")  # all that are taken count the same
    kernel = functools.partial(_mosaic.gathered, which, taken=taken, block=spec.block, same=same)
    if spec.kernel == "asked":
        return kernel(left, right, weights)
    # `auto` on a machine with a GPU may still be lowered for its CPU
    masked = functools.partial(_masked, spec, which)
    return lax.platform_dependent(left, right, weights, cuda=kernel, default=masked)


def _masked(spec: Spec, which: str, left: Array, right: Array, weights: Array) -> Array:
    """The same without a kernel."""
    dtype = _reference.accumulator(left, right)
    counts = jnp.repeat(weights, spec.block).astype(dtype)
    left_, right_ = left.astype(dtype), right.astype(dtype)
    if which == "contract":
        y = (left_ * counts[None]) @ right_
    elif which == "columns":
        y = (left_ @ right_.T) * counts[None]
    else:
        y = counts[:, None] * (left_.T @ right_)
    return y.astype(left.dtype)
