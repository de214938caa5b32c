"""The feed-forward layer in three kernels: interpreted, against the reference; compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax.ops import _fused, _mlp
from tests.helpers import normal, random_mask
from tests.kernels.test_interpreted import few_workers, interpreted  # noqa: F401 - a fixture


def weights(rng, mask, block, capacity, dtype, bias):
    p = bsjax.BlockPattern.from_mask(mask, block, capacity=capacity)
    fan = block[0] * max(1, mask.sum(0).max())
    values = normal(rng, (p.capacity, *block), dtype) / jnp.asarray(fan**0.5, dtype)
    return _mlp.Weights(
        values.at[p.nnz :].set(jnp.nan), p, normal(rng, p.shape[1:], dtype) if bias else None
    )


def problem(*, n, block, dtype=jnp.bfloat16, gated=False, biases=True, residual=True, spare=2):
    """x, both weights, a residual and a cotangent; a hub row, an empty row and an empty column."""
    rng = np.random.default_rng(0)
    mask = random_mask(3, 4, 0.5)
    mask[:, 1], mask[1] = True, False
    up = weights(rng, mask, (block, block * (1 + gated)), mask.sum() + spare, dtype, biases)
    down = weights(rng, mask.T, (block, block), mask.sum() + spare, dtype, biases)
    x = normal(rng, (n, 3 * block), dtype)
    added = normal(rng, x.shape, dtype) if residual else None
    return (x, up, down, added), normal(rng, x.shape, dtype)


def reference(form, x, up, down, residual):
    def product(x, one):
        y = x @ bsjax.todense(one.values, one.p)
        return y if one.bias is None else y + one.bias[None]

    y = product(form(product(x, up), up.p.block[1]), down)
    return y if residual is None else y + residual


def run(f, args, dy):
    def both(floats, dy):
        def g(floats):
            x, (uv, ub), (dv, db), residual = floats
            return f(x, args[1]._replace(values=uv, bias=ub), args[2]._replace(values=dv, bias=db), residual)

        y, pull = jax.vjp(g, floats)
        return y, pull(dy.astype(y.dtype))[0]

    x, up, down, residual = args
    return jax.jit(both)((x, (up.values, up.bias), (down.values, down.bias), residual), dy)


def conforms(activation="gelu", *, gated=False, **options):
    args, dy = problem(gated=gated, **options)
    form = _fused.Form(activation, gated)
    with interpreted():
        got = jax.block_until_ready(run(functools.partial(_mlp.mlp, form=form, precision=None), args, dy))
    plain = [a if a is None or a.dtype == jnp.int32 else a.astype(jnp.float32) for a in jax.tree.leaves(args)]
    want = run(functools.partial(reference, form), jax.tree.unflatten(jax.tree.structure(args), plain), dy)
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    for g, w in zip(got, want, strict=True):
        spread = float(jnp.abs(w).max())
        print(g.shape, g.dtype, float(jnp.abs(g.astype(jnp.float32) - w).max())/spread)


def test_it():
    conforms(n=137, block=32)
    conforms("silu", gated=True,n=137, block=32, biases=False)
