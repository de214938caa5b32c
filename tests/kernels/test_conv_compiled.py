"""Kernels of convolutions compile to machine code for an H200, without one."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import bsjax
from bsjax.ops import _mosaic
from tests.kernels import h200
from tests.kernels.test_compiled import (  # noqa: F401
    checked,
    compile_everything,
    toolchain,
)

pytestmark = pytest.mark.h200
bf16, f16 = jnp.bfloat16, jnp.float16


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


def compiles(f, block, dtype, space, window, channels, images=256, bias=False, **options):
    """Forward, dx and dvalues of one layer, at a quarter of its blocks."""
    place = h200.mesh()
    grid = tuple(c // side for c, side in zip(channels, block, strict=True))
    e = math.ceil(grid[0] * grid[1] / 4)

    def step(x, values, row, col, *rest):
        p = bsjax.BlockPattern(row, col, grid, block)
        y, pull = jax.vjp(lambda *args: f(p, *args, **options), x, values, *rest)
        return y, *pull(y)

    shapes = [((images, *space, channels[0]), dtype), ((e, *window, *block), dtype)]
    shapes += [((e,), jnp.int32)] * 2 + [((channels[1],), dtype)] * bias
    program, kernels = h200.compiled(step, *(h200.argument(place, *s) for s in shapes))
    checked(program, kernels)
    assert sum(kernel.wgmma > 0 for kernel in kernels) >= 3
    written = "".join(path.read_text() for path in h200.DUMPS.glob("*.ptx"))
    pending = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", written)
    assert max(map(int, pending)) <= 7  # beyond it an instruction has no number
    return program, kernels


def conv(p, x, values, **options):
    return bsjax.conv(x, values, p, implementation="mosaic", **options)


@pytest.mark.parametrize(
    ("block", "dtype", "images", "strides"),
    [
        (64, bf16, 256, 1),
        (128, f16, 128, 2),
        slow(32, bf16, 256, 2),
        slow(16, f16, 64, 1),
        slow(64, bf16, 40, 2),
        slow(64, f16, 256, 2),
        slow(128, bf16, 256, 1),
    ],
)
def test_a_layer_and_its_derivatives(block, dtype, images, strides):
    """3 x 3 on 28 x 28 pixels of 128 channels, as in a ResNet-50."""
    options = {"images": images, "strides": strides}
    program, _ = compiles(conv, (block, block), dtype, (28, 28), (3, 3), (128, 256), **options)
    # x goes in as it is: nobody pads it, and nobody writes down its windows
    x = rf"= \w+\[{images},(3[0-9]|29),(3[0-9]|29),128\]"
    assert not re.findall(x, program.as_text())


def test_an_epilogue_is_in_the_kernel():
    """bias and ReLU, which is a comparison with what was kept on the way back."""

    def layer(p, x, values, bias):
        return conv(p, x, values, bias=bias, activation="relu", residual=x)

    program, _ = compiles(layer, (64, 64), bf16, (14, 14), (3, 3), (256, 256), bias=True)
    assert len(re.findall(r"custom_call_target=\"mosaic_gpu", program.as_text())) == 4  # 1 joins


@pytest.mark.parametrize("how", ["automatic axes", slow("shard_map")])
def test_images_stay_on_their_devices(how, monkeypatch):
    monkeypatch.setattr(_mosaic, "several_gpus", lambda: True)
    mesh = h200.mesh(8, AxisType.Auto)
    p = bsjax.BlockPattern.from_mask(np.eye(4, dtype=bool), 64)
    x = h200.argument(mesh, (512, 14, 14, 256), bf16, "d")
    values = h200.argument(mesh, (p.capacity, 3, 3, 64, 64), bf16)

    def step(x, values, dy):
        y, pull = jax.vjp(lambda x, v: conv(p, x, v), x, values)
        return y, *pull(dy)

    if how == "shard_map":
        P = PartitionSpec
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(P("d"), P(), P("d")), out_specs=(P("d"), P("d"), P())
        )
    program, kernels = h200.compiled(step, x, values, x)
    checked(program, kernels)
    text = program.as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text  # of dvalues


@pytest.mark.slow
def test_vmap_loops_and_rematerialisation():
    place = h200.mesh()
    p = bsjax.BlockPattern.from_mask(np.eye(4, dtype=bool), 64)
    x = h200.argument(place, (2, 128, 14, 14, 256), bf16)
    values = h200.argument(place, (3, p.capacity, 3, 3, 64, 64), bf16)

    def loss(values, x):
        @jax.checkpoint
        def layer(x, values):
            return jnp.tanh(conv(p, x, values)), None

        return jnp.sum(jax.lax.scan(layer, x, values)[0].astype(jnp.float32))

    program, kernels = h200.compiled(jax.vmap(jax.grad(loss), (None, 0)), values, x)
    checked(program, kernels)


@pytest.mark.slow
@pytest.mark.parametrize(("space", "window"), [((4000,), (5,)), ((8, 16, 16), (3, 3, 3))])
def test_other_axes(space, window):
    compiles(conv, (64, 64), bf16, space, window, (128, 128), dilation=2)
