"""Attention with its derivative: the scores are computed again, tile by tile, in the backward pass.

A core never sees a bad shape: lengths are whole numbers of blocks here.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bsjax.ops import _attention_dense, _attention_xla, _core, _mosaic, _mosaic_attention
from bsjax.ops._attention_choose import runs
from bsjax.ops._attention_mesh import over_batch
from bsjax.ops._attention_tile import Fixed, Operands, Spec
from bsjax.ops._reference import accumulator

# each has `forward(spec, x, p) -> (out, lse)` and `backward(spec, x, p, out, lse, dout) -> grads`,
# in what sums are kept in, or at least in the dtype of q
_IMPLEMENTATIONS = {"xla": _attention_xla, "dense": _attention_dense, "mosaic": _mosaic_attention}


def attention(spec: Spec, x: Operands, p: Fixed) -> Array:
    """`[n, q, h, f]` in the dtype of q."""
    if spec.name == "reference":  # plain autodiff: that is what makes it the law
        return _attention_dense.attention(spec, x, p).astype(x.q.dtype)
    with _mosaic.in_words("attention"):
        return _compiled(spec, *_core.same_axes(x, p))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec: Spec, x: Operands, p: Fixed) -> Array:
    return _run(spec, "forward", x, p)[0].astype(x.q.dtype)


def _attention_fwd(spec, x, p):
    out, lse = _run(spec, "forward", x, p)
    x, p = _core.saved(x, p)
    return out.astype(x.q.dtype), (x, p, out, lse)


def _attention_bwd(spec, residuals, dout):
    x = residuals[0]
    grads = _run(spec, "backward", *residuals, jnp.asarray(dout).astype(accumulator(x.q)))
    return jax.tree.map(lambda a, like: a.astype(like.dtype), grads, x), None


_attention.defvjp(_attention_fwd, _attention_bwd)
# outside jit, loops that close over arrays would be compiled again at every call
_compiled = jax.jit(_attention, static_argnums=0)


def _run(spec: Spec, what: str, *args: Any) -> Any:
    """The platform is not known while Python traces, so where `auto` depends on it both are staged,
    and only the one that is needed is lowered."""

    def of(name: str) -> Any:
        run = functools.partial(getattr(_IMPLEMENTATIONS[name], what), spec)
        # XLA finds the placement of a dense product by itself, and kernels run on GPUs only
        alone = name == "dense" or (name == "mosaic" and not _mosaic.several_gpus())
        return run if alone else functools.partial(over_batch, run)

    if spec.name != "auto":
        return of(spec.name)(*args)
    names = runs(spec, args[0], args[1])
    if len(set(names.values())) == 1:
        return of(names["cpu"])(*args)
    return jax.lax.platform_dependent(*args, **{k: of(name) for k, name in names.items()})
