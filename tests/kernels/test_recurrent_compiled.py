"""A training step of a small-world LSTM compiles to machine code for an H200, without one."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import bsjax.nnx
from tests.helpers import loop_bodies
from tests.kernels import h200
from tests.kernels.test_compiled import checked, toolchain  # noqa: F401 - a fixture

pytestmark = pytest.mark.h200
BATCH, TIME, HIDDEN, BLOCK, IN, DEPTH = 64, 8, 2048, 64, 64, 3


def test_a_training_step():
    """Kernels for every product; those of the gradient of matrices run after the loop."""
    masks = bsjax.patterns.step_masks(HIDDEN // BLOCK, DEPTH, "balanced", {"density": 0.1})

    def make():
        cell = bsjax.nnx.SmallWorldLSTMCell(
            IN,
            HIDDEN,
            pattern=masks,
            block=BLOCK,
            depth=DEPTH,
            dtype=jnp.bfloat16,
            implementation="mosaic",
            rngs=nnx.Rngs(0),
        )
        return bsjax.nnx.RNN(cell)

    graphdef, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    # patterns are arguments, as they are in a training loop
    place = h200.mesh()
    shapes = jax.tree.map(lambda a: h200.argument(place, a.shape, a.dtype), (params, rest))
    x = h200.argument(place, (BATCH, TIME, IN), jnp.bfloat16)

    def step(params, rest, x):
        def loss(params, x):
            return jnp.square(nnx.merge(graphdef, params, rest)(x).astype(jnp.float32)).sum()

        return jax.grad(loss, argnums=(0, 1))(params, x)

    program, kernels = h200.compiled(step, *shapes, x)
    checked(program, kernels)
    text = program.as_text()
    # kernels that write blocks of weights; where tiles are cut, a second one joins them
    made = rf"= \(?bf16\[\d+,{BLOCK},{BLOCK}\]\S* custom-call\("
    assert len(re.findall(made, text)) >= DEPTH + 1
    assert re.findall(made, loop_bodies(text)) == []
    assert loop_bodies(text).count('custom_call_target="mosaic_gpu') >= 2 * (DEPTH + 1)
