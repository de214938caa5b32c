"""Stages of shared memory in a ring: one warpgroup loads ahead, the others multiply behind it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOADING, MULTIPLYING = 40, 232  # registers of a thread


class Run(NamedTuple):
    """Steps that do the same: `multiply(accumulator, stage)` starts so many `products`."""

    steps: Any
    multiply: Callable[[Any, Array], None]
    products: int = 1


class Ring(NamedTuple):
    """Barriers of the stages. `turn` counts the steps of a program from zero; stages repeat."""

    full: Any
    empty: Any

    @property
    def stages(self) -> int:
        return self.full.shape[0]

    def stage(self, turn: Any) -> Array:
        return lax.rem(turn, self.stages)

    def free(self, turn: Any) -> tuple[Array, Any]:
        """The stage to load, once everybody has read it, and the barrier to arrive at."""
        stage = self.stage(turn)

        @pl.when(turn >= self.stages)
        def _():
            plgpu.barrier_wait(self.empty.at[stage])

        return stage, self.full.at[stage]

    def drain(self, turn: Any) -> None:
        """Waits until everything that was loaded before `turn` has been read."""

        @pl.loop(lax.max(turn - self.stages, 0), turn)
        def _(earlier):
            plgpu.barrier_wait(self.empty.at[self.stage(earlier)])

    def release(self, turn: Any) -> None:
        plgpu.barrier_arrive(self.empty.at[self.stage(turn)])

    def sums(
        self,
        turn: Any,
        shape: tuple[int, int],
        runs: Sequence[Run],
    ) -> tuple[Array, Any]:
        """What the steps of all `runs` add up to, and the turn after them."""
        end = turn + sum(run.steps for run in runs)

        def accumulate(acc):
            at = turn
            for run in runs:

                def step(s, _, at=at, run=run):
                    stage = self.stage(at + s)
                    plgpu.barrier_wait(self.full.at[stage])
                    run.multiply(acc, stage)
                    plgpu.wgmma_wait(run.products)
                    # this step is still running; the one before it has read its stage
                    pl.when(at + s > turn)(lambda: self.release(at + s - 1))

                lax.fori_loop(0, run.steps, step, None)
                at += run.steps
            return acc[...]

        sums = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
        pl.when(end > turn)(lambda: self.release(end - 1))
        return sums, end


def onto(sums: Array, accumulate: Callable[[Any], None]) -> Array:
    """What `accumulate` adds to `sums`, in their registers; waits for its products."""
    if _interpreted():  # no accumulator can begin with given sums there

        def alone(acc):
            accumulate(acc)
            return acc[...]

        shape: Any = sums.shape
        return sums + pl.run_scoped(alone, plgpu.WGMMAAccumulatorRef(shape, sums.dtype))
    start: Any = plgpu.WGMMAAccumulatorRef.init(sums)
    return pl.run_state(accumulate)(start)


def onto_product(sums: Array, left: Array, right: Any) -> Array:
    """`sums + left @ right`, with `left` in registers and `right` in shared memory."""
    if _interpreted():  # no product reads registers there
        wide = right[...].astype(jnp.float32)
        plgpu.commit_smem()  # what was read may be overwritten
        return sums + jnp.dot(left.astype(jnp.float32), wide, precision="highest")

    def accumulate(acc):
        plgpu.wgmma(acc, left, right)
        plgpu.wgmma_wait(0)

    return onto(sums, accumulate)


def _interpreted() -> bool:
    """Whether what is traced now will be interpreted; JAX has no public name for it."""
    from jax._src import config

    return config.pallas_tpu_interpret_mode_context_manager.value is not None


def ring(stages: int, warpgroups: int, copies: int, cluster: bool = False) -> Ring:
    """To be allocated: each stage takes `copies` arrivals to fill, and one of each warpgroup that
    multiplies, of all programs in a `cluster`, to be free again."""
    empty: Any = plgpu.Barrier
    if cluster:
        empty = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
    return Ring(
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        empty(num_arrivals=warpgroups, num_barriers=stages),
    )


def roles(
    warpgroups: int,
    load: Callable[[], None],
    multiply: Callable[[], None],
    registers: tuple[int, int] = (LOADING, MULTIPLYING),
) -> None:
    """The last warpgroup loads, the others multiply and get its registers."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == warpgroups)
    def _():
        plgpu.set_max_registers(registers[0], action="decrease")
        load()

    @pl.when(warpgroup < warpgroups)
    def _():
        plgpu.set_max_registers(registers[1], action="increase")
        multiply()


def swizzled(shape: tuple[int, ...], columns: int, dtype: Any) -> Any:
    """Shared memory as `wgmma` and TMA like it, of which `columns` at a time are used."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * size * 8)
    tiling = plgpu.TilingTransform((8, swizzle // size))  # pyright: ignore[reportAbstractUsage]
    transforms = (tiling, plgpu.SwizzleTransform(swizzle))  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class Slots:
    """Slices of one output tile on their way out: shared memory `[slots, rows, columns]`.

    To wait until a slot is read takes as long as all loads that were started before, so there had
    better be a slot for every slice. What was used when is known while Python traces.
    """

    def __init__(self, memory: Any) -> None:
        self.memory, self.used, self.groups = memory, 0, 0
        self.last: dict[int, int] = {}  # by slot: the copies that were started before its own

    @property
    def shape(self) -> tuple[int, int]:
        """Of a slice."""
        return self.memory.shape[1:]

    def next(self) -> Any:
        """A slot that nobody reads any more."""
        slot = self.used % self.memory.shape[0]
        if not self.used:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        elif slot in self.last:
            plgpu.wait_smem_to_gmem(self.groups - 1 - self.last[slot], wait_read_only=True)
        self.used += 1
        return self.memory.at[slot]

    def put(self, part: Array, copy: Callable[[Any], None]) -> Any:
        """Rounds a slice to the next slot; `copy(slot)` starts writing it."""
        slot = self.next()
        slot[...] = part.astype(self.memory.dtype)
        plgpu.commit_smem()
        copy(slot)
        self.last[(self.used - 1) % self.memory.shape[0]] = self.groups
        self.groups += 1
        return slot
