"""The machine's own ceilings, to be measured before anything else: what a floor is made of."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks._gpu_clock import measured
from benchmarks._timing import spread

type Record = dict[str, Any]

SIDE = 8192  # of the dense product
COPIED = 2**30  # bytes of the array that is copied
CACHED = 20 * 2**20  # bytes of the array that is read from the L2 cache
PASSES = 100  # over it
CHAIN = 64  # tiny kernels in a row
ROWS, WIDTH, STAGES = 128, 64, 8  # of a copy to shared memory, and how many are in flight


def dense(side: int | None = None, dtype: str = "bfloat16") -> Iterator[Record]:
    """FLOP/s of a product of XLA, on random numbers (zeros are faster)."""
    side = side or SIDE
    a, b = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(2))
    yield rate("flops", 2.0 * side**3, "FLOP/s", jnp.matmul, a, b)


def memory(copied: int | None = None) -> Iterator[Record]:
    """Bytes per second of device memory, read and written, by a kernel that copies."""
    copied = copied or COPIED
    a = jax.random.bits(jax.random.key(0), (copied // 4,), jnp.uint32)
    yield rate("memory", 2.0 * copied, "B/s", lambda a: a ^ jnp.uint32(1), a)


def l2() -> Iterator[Record]:
    """Bytes per second from the L2 cache to the multiprocessors: every one of them loads an array
    that fits in the cache over and over, by TMA, and starts at another place."""
    a = jax.random.normal(jax.random.key(0), (CACHED // 2 // WIDTH, WIDTH), jnp.bfloat16)
    workers = jax.devices()[0].core_count
    steps = PASSES * a.shape[0] // ROWS // workers
    reads = functools.partial(tiles_read, workers=workers, steps=steps)
    size = steps * workers * ROWS * WIDTH * 2.0
    yield rate("l2", size, "B/s", reads, a) | {"array": CACHED, "how": "TMA, 16 KB a copy"}


def launch() -> Iterator[Record]:
    """Seconds from one tiny kernel of a program to the next, the kernel included."""
    yield rate("launch", 1.0 / CHAIN, "s", chain, jnp.ones((128,)), seconds=True)


def chain(a: Array) -> Array:
    """Tiny kernels in a row, which a barrier keeps from being fused."""
    for _ in range(CHAIN):
        a = lax.optimization_barrier(a + 1)
    return a


def rate(
    name: str, amount: float, unit: str, f: Callable, *args: Array, seconds: bool = False
) -> Record:
    """`amount` over the median time of `f`, or that time times `amount`."""
    program = jax.jit(f).lower(*args).compile()
    times = measured({name: lambda _: program(*args)})[name]
    middle, low, high = spread(times.seconds)
    return {
        "benchmark": "ceilings",
        "ceiling": name,
        "value": amount * middle if seconds else amount / middle,
        "unit": unit,
        "clock": times.clock,
        "ms": 1e3 * middle,
        "ms_low": 1e3 * low,
        "ms_high": 1e3 * high,
    }


def tiles_read(a: Array, *, workers: int, steps: int) -> Array:
    """Loads `steps` tiles of `a` in each of so many programs; returns the last that each loaded."""
    tiles = a.shape[0] // ROWS

    def kernel(a, out):
        worker = lax.axis_index("worker")

        def read(buffers, full):
            def tile(step):
                # another place for each worker, so that they do not read the same at a time
                start = lax.rem(worker * (tiles // workers + 1) + step, tiles) * ROWS
                stage = lax.rem(step, STAGES)
                plgpu.copy_gmem_to_smem(
                    a.at[pl.ds(start, ROWS), :], buffers.at[stage], full.at[stage]
                )

            for step in range(min(STAGES, steps)):
                tile(jnp.int32(step))

            def turn(step, _):
                plgpu.barrier_wait(full.at[lax.rem(step, STAGES)])
                pl.when(step + STAGES < steps)(lambda: tile(step + STAGES))

            lax.fori_loop(0, steps, turn, None)
            last = buffers.at[(steps - 1) % STAGES]
            plgpu.copy_smem_to_gmem(last, out.at[worker])
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            read,
            plgpu.SMEM((STAGES, ROWS, WIDTH), a.dtype),
            plgpu.Barrier(num_arrivals=1, num_barriers=STAGES),
        )

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((workers, ROWS, WIDTH), a.dtype),
        grid=(workers,),
        grid_names=("worker",),
    )
    return run(a)


CEILINGS = {"dense": dense, "memory": memory, "l2": l2, "launch": launch}
