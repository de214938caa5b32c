"""A small model that uses one weight at every step, and what to compare its gradients by."""

import jax
import jax.numpy as jnp
import numpy as np

import bsjax
from tests.helpers import normal, random_mask

STEPS, TOKENS = 5, 3
PATTERN = bsjax.BlockPattern.from_mask(random_mask(3, 3, 0.5), (4, 4), capacity=6)
E, K = PATTERN.capacity, PATTERN.shape[0]


def weights(dtype=jnp.float32, p=PATTERN):
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys(("state", "input", "up"), (p.capacity, *p.block))
    shapes |= {"bias": (p.shape[1],), "gate": (p.capacity,)}
    drawn = {name: normal(rng, shape, dtype) for name, shape in shapes.items()}
    return {name: a * jnp.asarray(a.shape[-1] ** -0.5, dtype) for name, a in drawn.items()}


def sequence(dtype=jnp.float32, width=K, tokens=TOKENS):
    """The first state, inputs, and a cotangent of the outputs."""
    rng = np.random.default_rng(1)
    long = (STEPS, tokens, width)
    return tuple(normal(rng, shape, dtype) for shape in (long[1:], long, long))


def gradients(model, *args, cotangent):
    """The gradient of all arguments."""
    return jax.jit(lambda *args: jax.vjp(model, *args)[1](cotangent))(*args)


def agree(got, want, rtol=1e-9):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_allclose(g, w, rtol=rtol, atol=rtol)


def recurrent(scan, w, state, xs, p=PATTERN, **options):
    """The smallest model of all."""

    def step(state, x):
        state = jnp.tanh(bsjax.matmul(state, w["state"], p) + x)
        return state, state

    return scan(step, state, xs, **options)[1]
