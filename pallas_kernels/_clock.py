"""How long a GPU takes, and whether what it computed is right."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

QUEUED = 1e-4  # seconds: longer calls are queued by the host faster than a GPU runs them
WRONG = 0.01  # relative error that no rounding to 16 bits explains
ROUNDS, ROUND = 5, 0.006  # how often something is timed, and for how many seconds


def said(error: BaseException) -> str:
    """The first line of an error, for a record."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:300]


def wrong(got: Array, want: Array) -> str | None:
    """Says so if `got` is not `want` but for its rounding."""
    error = jnp.linalg.norm(got.astype(jnp.float32).ravel() - want.ravel())
    relative = float(error / jnp.linalg.norm(want.ravel()))
    return None if relative < WRONG else f"wrong by {relative:.2g} of the result"  # or NaN


def queued_seconds(run: Callable[[int], Any], calls: int) -> float:
    """Of a call, by the wall, when so many are queued back to back: a GPU runs them in order."""
    start = time.perf_counter()
    result = None
    for i in range(calls):
        result = run(i)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def kernel_seconds(run: Callable[[], Any]) -> list[float] | str:
    """Of each kernel that `run` launches, in their order, by the profiler that comes with JAX
    (CUPTI); or why it gave nothing."""
    from jax.experimental.mosaic.gpu import profiler

    extension = getattr(getattr(profiler, "mosaic_gpu_lib", None), "_mosaic_gpu_ext", None)
    if extension is None or jax.default_backend() != "gpu":
        return "JAX has no profiler of kernels here"
    try:
        extension._cupti_init()
        try:
            jax.block_until_ready(run())
        finally:
            found = extension._cupti_get_timings(True)
    except Exception as error:  # another profiler, a driver without CUPTI: there is the wall
        return said(error)
    return [1e-3 * milliseconds for _, milliseconds in found] or "the profiler saw no kernel"


def clock(run: Callable[[int], Any]) -> float:
    """Seconds of a call on the device: the median of some rounds."""
    jax.block_until_ready(run(0))
    guess = queued_seconds(run, 3)
    calls = max(2, min(200, round(ROUND / guess)))
    if guess < QUEUED:
        kernels = kernel_seconds(lambda: [run(i) for i in range(calls)])
        if not isinstance(kernels, str):
            return sum(kernels) / calls
    return statistics.median(queued_seconds(run, calls) for _ in range(ROUNDS))
