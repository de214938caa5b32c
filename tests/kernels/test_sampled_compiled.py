"""Kernels of sampled products compile to machine code for an H200, without one."""

import contextlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

import bsjax
from bsjax.ops import _mosaic
from tests.kernels import h200
from tests.kernels.test_compiled import compile_everything, toolchain  # noqa: F401

pytestmark = pytest.mark.h200
bf16, f16 = jnp.bfloat16, jnp.float16


def step(x, w, dy, key, **options):
    """What a layer computes forward and backward."""

    def layer(x, w):
        return bsjax.sampled_matmul(
            x, w, key=jax.random.wrap_key_data(key), implementation="mosaic", **options
        )

    y, pull = jax.vjp(layer, x, w)
    return y, *pull(dy)


def arguments(mesh, n, k, m, dtype=bf16, *spec):
    shapes = ((n, k), *spec), ((k, m),), ((n, m), *spec)
    arrays = [h200.argument(mesh, shape, dtype, *axes) for shape, *axes in shapes]
    return *arrays, h200.argument(mesh, (2,), jnp.uint32)


@pytest.mark.parametrize(
    ("block", "fraction", "sampler", "size", "dtype"),
    [
        pytest.param(64, 0.25, "systematic", (8192,) * 3, bf16, id="64"),
        pytest.param(128, 0.1, "uniform", (8192,) * 3, f16, id="128, the same counts"),
        pytest.param(64, 0.5, "priority", (100, 1024, 1000), bf16, id="odd sizes"),
        *(
            pytest.param(b, f, s, (n, 4096, 4096), bf16, id=f"{b} {f} {s} {n}", marks=slow)
            for slow in [pytest.mark.slow]
            for b in (64, 128, 256)
            for f in (0.1, 0.5)
            for s in ("systematic", "uniform")
            for n in (64, 200, 4096)
        ),
    ],
)
def test_y_and_both_gradients(block, fraction, sampler, size, dtype):
    options = {"block": block, "fraction": fraction, "sampler": sampler}
    program, kernels = h200.compiled(
        lambda *args: step(*args, **options), *arguments(h200.mesh(), *size, dtype)
    )
    assert program.as_text().count('custom_call_target="mosaic_gpu') == 3
    assert max(h200.shared_memory()) <= 232_448
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert not kernel.serialized, kernel
        assert kernel.tma, kernel
        assert kernel.wgmma, kernel
    if size[0] == 8192:
        written = [path.read_text() for path in h200.DUMPS.glob("*.ptx")]
        assert all("multicast::cluster" in text for text in written)
        # a stage is free once both programs have read it, which the interpreter does not miss
        assert all(re.search(r"mbarrier\.arrive\S*shared::cluster", text) for text in written)
        # a running product is waited for before its stage is released
        assert all("wgmma.wait_group.sync.aligned" in text for text in written)
        # nothing of the size of a sample is copied
        taken = round(fraction * 8192)
        assert not re.search(rf"\[8192,{taken}\]|\[{taken},8192\]", program.as_text())


@pytest.mark.parametrize(
    "how",
    [
        "automatic axes",
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("explicit axes", "shard_map")),
    ],
)
def test_tokens_stay_on_their_devices(how, monkeypatch):
    monkeypatch.setattr(_mosaic, "several_gpus", lambda: True)
    axes = AxisType.Explicit if how == "explicit axes" else AxisType.Auto
    mesh = h200.mesh(8, axes)

    def run(*args):
        return step(*args, fraction=0.25, block=64)

    if how == "shard_map":
        P = PartitionSpec
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(P("d"), P(), P("d"), P()),
            out_specs=(P("d"), P("d"), P()),
        )
    with jax.set_mesh(mesh) if how == "explicit axes" else contextlib.nullcontext():
        program, _ = h200.compiled(run, *arguments(mesh, 4096, 1024, 2048, bf16, "d"))
    assert program.as_text().count('custom_call_target="mosaic_gpu') == 3
    assert "all-gather" not in program.as_text()
    assert "all-reduce" in program.as_text()  # of scores and of dw
