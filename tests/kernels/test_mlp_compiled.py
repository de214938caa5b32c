"""The feed-forward layer with its derivatives compiles to machine code for an H200, without one."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

import bsjax
from bsjax.ops import _fused, _mlp, _mosaic
from bsjax.ops._core import Spec
from tests.kernels import h200
from tests.kernels.test_compiled import checked, compile_everything, toolchain  # noqa: F401

pytestmark = pytest.mark.h200
bf16, f32 = jnp.bfloat16, jnp.float32
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
N, K, HIDDEN = 8192, 2048, 8192


def training_step(form, block, hidden):
    """y and all gradients, from plain arrays: x, two matrices with a bias each, and a residual."""
    pairs = 1 + form.gated
    grid = (K // block, HIDDEN // hidden)

    def weights(values, row, col, grid, block, bias):
        return _mlp.Weights(values, bsjax.BlockPattern(row, col, grid, block), bias)

    def step(x, residual, u, b, row, col, d, c, drow, dcol):
        def f(x, residual, u, b, d, c):
            up = weights(u, row, col, grid, (block, pairs * hidden), b)
            down = weights(d, drow, dcol, grid[::-1], (hidden, block), c)
            return _mlp.mlp(x, up, down, residual, form=form, precision=None)

        y, pull = jax.vjp(f, x, residual, u, b, d, c)
        return y, *pull(y)

    e = grid[0] * grid[1] // 10
    index = [((e,), jnp.int32)] * 2
    return step, [
        *[((N, K), bf16)] * 2,
        *[((e, block, pairs * hidden), bf16), ((pairs * HIDDEN,), bf16), *index],
        *[((e, hidden, block), bf16), ((K,), bf16), *index],
    ]


@pytest.mark.parametrize(
    ("activation", "gated", "block", "hidden"),
    [
        slow("gelu", False, 64, 64, id="plain"),
        pytest.param("silu", True, 64, 64, id="gated"),
        *(
            slow("gelu", gated, *block, id=f"{block} {gated}")
            for block in ((16, 16), (32, 32), (128, 128), (64, 128))
            for gated in (False, True)
        ),
        slow("gelu", False, 64, 256, id="256 wide"),
    ],
)
def test_a_training_step(activation, gated, block, hidden):
    place = h200.mesh()
    step, shapes = training_step(_fused.Form(activation, gated), block, hidden)
    program, kernels = h200.compiled(step, *(h200.argument(place, *s) for s in shapes))
    checked(program, kernels)
    # nothing as large as the hidden activations is written but by kernels (sddmm of narrow blocks
    # wants its left side transposed)
    wide = rf"\w+\[{N},(?:{HIDDEN}|{2 * HIDDEN})\]\S*"
    written = rf"%(?!wrapped_transpose)(\S+) = {wide} (?:fusion|copy|add|multiply)\("
    assert re.findall(written, program.as_text()) == []


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh", "sigmoid"])
@pytest.mark.parametrize("side", [64, 128])
def test_gradients_of_activations(activation, gated, side):
    place, grid = h200.mesh(), (4096 // side, 2048 // side)
    e, form = grid[0] * grid[1] // 10, _fused.Form(activation, gated)

    def slope(dy, values, row, col, z):
        p = bsjax.BlockPattern(row, col, grid, (side, side))
        return _mlp._slope(Spec("mosaic", None, bf16), form, True, dy, values, p, z)

    shapes = [((N, 2048), bf16), ((e, side, side), bf16), *[((e,), jnp.int32)] * 2]
    shapes += [((N, 4096 * (1 + gated)), bf16)]
    _, kernels = h200.compiled(slope, *(h200.argument(place, *s) for s in shapes))
    assert kernels
    assert [kernel for kernel in kernels if kernel.spilled or kernel.serialized] == []


@pytest.mark.slow
@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_tokens_stay_on_their_devices(axes, monkeypatch):
    monkeypatch.setattr(_mosaic, "several_gpus", lambda: True)
    mesh = h200.mesh(8, axes)
    step, shapes = training_step(_fused.Form("gelu"), 64, 64)
    arguments = [
        h200.argument(mesh, shape, dtype, *["d"] * (shape == (N, K))) for shape, dtype in shapes
    ]
    with jax.set_mesh(mesh):
        program, kernels = h200.compiled(step, *arguments)
    checked(program, kernels)
    text = program.as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text  # of the gradients of weights
