"""The kernel that reads the L2 cache, and what becomes of its times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks import _gpu_ceilings as ceilings
from benchmarks import _gpu_clock
from benchmarks._gpu_clock import Times


@pytest.mark.interpreted
@pytest.mark.parametrize("steps", [13, 3])
def test_every_worker_reads_tile_after_tile(steps):
    """More than fit in flight, and fewer."""
    a = jax.random.normal(jax.random.key(0), (6 * ceilings.ROWS, ceilings.WIDTH), jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = jax.jit(lambda a: ceilings.tiles_read(a, workers=2, steps=steps))(a)
        jax.block_until_ready(got)
    tiles = a.reshape(6, ceilings.ROWS, ceilings.WIDTH)
    for worker, start in enumerate((0, 4)):
        last = tiles[(start + steps - 1) % 6]
        np.testing.assert_array_equal(np.asarray(got[worker]), np.asarray(last))


@pytest.mark.parametrize(
    ("name", "unit", "value"),
    [("dense", "FLOP/s", 2.0 * 64**3 / 2e-3), ("memory", "B/s", 2 * 4096 / 2e-3)],
)
def test_a_rate_is_the_amount_over_the_median(monkeypatch, name, unit, value):
    monkeypatch.setattr(ceilings, "SIDE", 64)
    monkeypatch.setattr(ceilings, "COPIED", 4096)
    (record,) = measured(monkeypatch, ceilings.CEILINGS[name])
    assert (record["unit"], record["clock"], record["ms"]) == (unit, "wall", 2)
    assert record["value"] == pytest.approx(value)


def test_a_launch_is_a_time(monkeypatch):
    (record,) = measured(monkeypatch, ceilings.launch)
    assert record["value"] == pytest.approx(2e-3 / ceilings.CHAIN)


def measured(monkeypatch, ceiling):
    """Its record, if everything takes 2 ms."""

    def clock(runs):
        ((name, run),) = runs.items()
        jax.block_until_ready(run(0))
        return {name: Times("wall", *[np.array([1e-3, 2e-3, 9e-3])] * 2, None)}

    monkeypatch.setattr(ceilings, "measured", clock)
    return list(ceiling())


def test_tiny_kernels_are_not_fused():
    text = jax.jit(ceilings.chain).lower(jnp.ones((128,))).as_text()
    assert text.count("optimization_barrier") == ceilings.CHAIN


def test_the_clock_is_that_of_the_suite():
    assert ceilings.measured is _gpu_clock.measured
