"""Kernels, and programs that use them, compile to machine code for an H200, without one.

Every kernel must use the tensor cores and TMA, spill nothing and fit in shared memory.
"""

import contextlib
import dataclasses
import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import bsjax
import bsjax.nnx
from bsjax.ops import _mosaic
from pallas_kernels import config
from tests.kernels import h200

pytestmark = pytest.mark.h200
bf16, f16, f32 = jnp.bfloat16, jnp.float16, jnp.float32


@pytest.fixture(scope="module", autouse=True)
def toolchain():
    """`make test` asks for it, with what it takes installed: there a skip would hide a defect."""
    try:
        h200.mesh()
    except Exception as error:
        why = f"JAX cannot compile for an H200 here ({type(error).__name__}: {error})"
        if "JAX_SKIP_CUDA_CONSTRAINTS_CHECK" in os.environ:
            pytest.fail(why)
        pytest.skip(f"{why}; `make test` does, in an environment of its own")


@pytest.fixture(autouse=True)
def compile_everything():
    jax.clear_caches()  # what was compiled before is not dumped again


def checked(program, kernels):
    """Forward, dx and dvalues are kernels (one that was compiled before is not reported again)."""
    assert program.as_text().count('custom_call_target="mosaic_gpu') >= 3
    assert max(h200.shared_memory(), default=0) <= 232_448
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert not kernel.serialized, kernel
        assert kernel.tma, kernel
        assert kernel.waits or not kernel.wgmma, kernel


def training_step(p):
    """Tokens, values and a cotangent; what a layer computes forward and backward."""

    def step(x, values, dy):
        y, pull = jax.vjp(lambda x, v: bsjax.matmul(x, v, p, implementation="mosaic"), x, values)
        return y, *pull(dy)

    return step


SIDES = [16, 32, 64, 128]
OTHERS = [(64, 256), (256, 64), (128, 256), (32, 64), (64, 32), (16, 128), (128, 16)]


@pytest.mark.parametrize(
    ("block", "n", "dtype"),
    [
        *(pytest.param(side, 8192, bf16, id=f"{side}") for side in SIDES),
        pytest.param(32, 64, bf16, id="32 few tokens"),
        pytest.param((64, 256), 8192, bf16, id="64x256"),
        *(
            pytest.param(
                block, n, dtype, id=f"{block} {n} {dtype.__name__}", marks=pytest.mark.slow
            )
            for block in (*SIDES, *OTHERS)
            for n in (64, 100, 8192)
            for dtype in (bf16, f16)
        ),
    ],
)
def test_matmul_and_its_derivatives(block, n, dtype):
    """At the sizes of the benchmark: 8192 x 8192 at a density of a tenth."""
    compiles((block, block) if isinstance(block, int) else block, n, dtype, 0.1)


@pytest.mark.parametrize("side", [64, *(pytest.param(s, marks=pytest.mark.slow) for s in (16, 32))])
def test_output_blocks_that_share_what_is_read(side):
    """At this density the heuristic takes groups of them, and programs in pairs."""
    chosen = config.for_matmul(8192, (side, side), 2, density=0.5)
    assert (chosen.columns, chosen.cluster) == (min(4, 128 // side), 1 + (side > 16))
    compiles((side, side), 8192, bf16, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("side", [16, 64, 128])
def test_programs_that_share_what_is_read(side, monkeypatch):
    """As the tuner tries them: 128 tokens by 256 features for each of two programs."""
    heuristic = config.for_matmul

    def in_clusters(*args, **options):
        found = dataclasses.replace(
            heuristic(*args, **options),
            tile=128,
            columns=min(4, 256 // side),
            cluster=2,
            workers=config.MULTIPROCESSORS // 2,
        )
        return config.staged(found, side, 2)

    monkeypatch.setattr(config, "for_matmul", in_clusters)
    compiles((side, side), 8192, bf16, 0.25)
    written = [path.read_text() for path in h200.DUMPS.glob("*.ptx")]
    clusters = [text for text in written if "multicast::cluster" in text]
    assert len(clusters) == 2  # forward and dx
    # a stage is free once both programs have read it, which the interpreter does not miss
    assert all(re.search(r"mbarrier\.arrive\S*shared::cluster", text) for text in clusters)


def compiles(block, n, dtype, density):
    place = h200.mesh()
    grid = tuple(8192 // side for side in block)
    e = round(grid[0] * grid[1] * density)

    def step(x, values, dy, row, col):
        return training_step(bsjax.BlockPattern(row, col, grid, block))(x, values, dy)

    shapes = [((n, 8192), dtype), ((e, *block), dtype), ((n, 8192), dtype)]
    shapes += [((e,), jnp.int32)] * 2
    program, kernels = h200.compiled(step, *(h200.argument(place, *s) for s in shapes))
    checked(program, kernels)
    assert sum(kernel.wgmma > 0 for kernel in kernels) >= 3
    copies = re.findall(rf"= \w+\[{n},8192\]\S* copy\(", program.as_text())
    assert copies == []  # tiles that were cut are joined in place


@pytest.fixture(scope="module")
def pattern():
    mask = np.random.default_rng(0).random((32, 32)) < 0.1
    return bsjax.BlockPattern.from_mask(mask, 64)


@pytest.mark.parametrize(
    "how", ["automatic axes", pytest.param("explicit axes", marks=pytest.mark.slow), "shard_map"]
)
def test_tokens_stay_on_their_devices(how, pattern, monkeypatch):
    monkeypatch.setattr(_mosaic, "several_gpus", lambda: True)
    axes = AxisType.Explicit if how == "explicit axes" else AxisType.Auto
    mesh = h200.mesh(8, axes)
    x = h200.argument(mesh, (4096, 2048), bf16, "d")
    values = h200.argument(mesh, (pattern.capacity, 64, 64), bf16)
    step = training_step(pattern)
    if how == "shard_map":
        P = PartitionSpec
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(P("d"), P(), P("d")), out_specs=(P("d"), P("d"), P())
        )
    with jax.set_mesh(mesh) if how == "explicit axes" else contextlib.nullcontext():
        program, kernels = h200.compiled(step, x, values, x)
    checked(program, kernels)
    text = program.as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text  # of dvalues


EPILOGUES = [
    pytest.param("gelu", True, True, id="everything"),
    *(
        pytest.param(name, True, False, id=name or "bias", marks=pytest.mark.slow)
        for name in (None, "relu", "silu", "tanh", "sigmoid")
    ),
]


@pytest.mark.parametrize(("activation", "bias", "residual"), EPILOGUES)
@pytest.mark.parametrize(
    "block",
    [16, pytest.param(128, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow)],
)
def test_epilogues(activation, bias, residual, block):
    place, grid = h200.mesh(), (4096 // block, 4096 // block)
    e = grid[0] * grid[1] // 10

    def step(x, values, b, r, row, col):
        p = bsjax.BlockPattern(row, col, grid, (block, block))

        def f(x, values, b, r):
            options = {"bias": b if bias else None, "residual": r if residual else None}
            return bsjax.matmul(
                x, values, p, activation=activation, implementation="mosaic", **options
            )

        y, pull = jax.vjp(f, x, values, b, r)
        return y, *pull(y)

    shapes = [((8192, 4096), bf16), ((e, block, block), bf16), ((4096,), bf16)]
    shapes += [((8192, 4096), bf16), ((e,), jnp.int32), ((e,), jnp.int32)]
    checked(*h200.compiled(step, *(h200.argument(place, *s) for s in shapes)))


def test_a_function_as_activation():
    """Its cotangent is float32, and kernels take 16 bits."""
    place, grid = h200.mesh(), (64, 64)

    def step(x, values, row, col):
        p = bsjax.BlockPattern(row, col, grid, (64, 64))
        options = {"activation": jnp.sin, "implementation": "mosaic"}
        y, pull = jax.vjp(lambda x, v: bsjax.matmul(x, v, p, **options), x, values)
        return y, *pull(y)

    shapes = [((8192, 4096), bf16), ((400, 64, 64), bf16), *[((400,), jnp.int32)] * 2]
    checked(*h200.compiled(step, *(h200.argument(place, *s) for s in shapes)))


@pytest.mark.parametrize("block", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_gated_linear_unit(block):
    place, grid = h200.mesh(), (4096 // block, 4096 // block)
    e = grid[0] * grid[1] // 10

    def step(x, gate, up, row, col):
        p = bsjax.BlockPattern(row, col, grid, (block, block))
        f = functools.partial(bsjax.glu, implementation="mosaic")
        y, pull = jax.vjp(lambda x, gate, up: f(x, gate, up, p), x, gate, up)
        return y, *pull(y)

    shapes = [((8192, 4096), bf16), *[((e, block, block), bf16)] * 2, *[((e,), jnp.int32)] * 2]
    checked(*h200.compiled(step, *(h200.argument(place, *s) for s in shapes)))


def test_loops_and_rematerialisation(pattern):
    place = h200.mesh()

    def loss(values, x):
        @jax.checkpoint
        def layer(x, values):
            return jnp.tanh(bsjax.matmul(x, values, pattern, implementation="mosaic")), None

        return jnp.sum(jax.lax.scan(layer, x, values)[0].astype(f32))

    stack = h200.argument(place, (3, pattern.capacity, 64, 64), bf16)
    x = h200.argument(place, (4096, 2048), bf16)
    program, kernels = h200.compiled(jax.grad(loss), stack, x)
    checked(program, kernels)


def test_vmap(pattern):
    place = h200.mesh()
    x = h200.argument(place, (2, 1024, 2048), bf16)
    values = h200.argument(place, (2, pattern.capacity, 64, 64), bf16)
    program, kernels = h200.compiled(jax.vmap(training_step(pattern)), x, values, x)
    checked(program, kernels)


def test_a_training_step_of_the_transformer(monkeypatch):
    """The recipe's own step, with its products in bfloat16 through the kernels, as one program."""
    from flax import nnx

    from models import transformer

    product = bsjax.nnx.BlockLinear.__call__
    monkeypatch.setattr(
        bsjax.nnx.BlockLinear, "__call__", lambda layer, x: product(layer, x).astype(x.dtype)
    )

    config = transformer.Config(layers=1)
    model = transformer.Transformer(config, transformer.wide(config), nnx.Rngs(0))
    layers = [m for _, m in nnx.iter_graph(model) if isinstance(m, bsjax.nnx.BlockLinear)]
    for layer in layers:
        layer.implementation, layer.dtype = "mosaic", bf16
    optimizer = nnx.Optimizer(model, transformer.adam(1e-3, 0.1, 10, 0.1), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    def step(state, data):
        model, optimizer = nnx.merge(graph, state)
        loss = transformer.train_step(model, optimizer, data)
        return loss, nnx.state((model, optimizer))

    place = h200.mesh()
    state = jax.tree.map(lambda a: h200.argument(place, a.shape, a.dtype), state)
    data = h200.argument(place, (config.batch, config.length + 1), jnp.uint8)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        program, kernels = h200.compiled(step, state, data)
    checked(program, kernels)
    text = program.as_text()
    assert text.count('custom_call_target="mosaic_gpu') >= 3 * len(layers)
