"""The cells of `benchmarks.lstm`, and whether they are right."""

import bisect
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bsjax
import bsjax.nnx

CELLS = {
    "small-world": "SmallWorldLSTMCell",
    "lstm": "BlockLSTMCell",
    "multiplicative": "BlockMultiplicativeLSTMCell",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured."""

    cell: str = "small-world"
    state: int = 4096
    density: float = 0.05
    block: int = 64
    depth: int = 5
    inputs: int = 64
    batch: int = 64
    length: int = 16
    dtype: str = "float32"
    implementation: str = "auto"

    @property
    def bytes(self) -> int:
        """Of text that a training step reads, one for each step of a sequence."""
        return self.batch * self.length


# `auto` leaves so few tokens to the dense product on a GPU, until kernels were measured there
GPU: dict[str, Any] = {"dtype": "bfloat16", "implementation": "mosaic"}
CASES = {"cpu": Case(), "gpu": Case(state=18432, density=0.03, length=64, **GPU)}


def graph(n: int, seed: int, density: float) -> np.ndarray:
    """`round(density n^2)` blocks with the diagonal among them, the others anywhere."""
    rng = np.random.default_rng(seed)
    others = np.flatnonzero(~np.eye(n, dtype=bool))
    mask = np.eye(n, dtype=bool).ravel()
    mask[rng.choice(others, max(0, round(density * n * n) - n), replace=False)] = True
    return mask.reshape(n, n)


def sparse(case: Case, **options: Any) -> Any:
    """The block-sparse cell."""
    n, steps = case.state // case.block, _steps(case)
    masks = [graph(n, seed, case.density) for seed in range(steps + 1)]
    pattern = masks if steps else masks[0]
    return _cell(case, case.state, pattern, case.block, case.implementation, **options)


def dense(case: Case, width: int) -> Any:
    """A cell with one block, which is a dense matrix, and with random weights."""
    init = jax.nn.initializers.normal(width**-0.5)
    return _cell(case, width, np.ones((1, 1), bool), width, "auto", recurrent_kernel_init=init)


def _cell(case: Case, width: int, pattern: Any, block: int, implementation: str, **options: Any):
    options |= {"depth": case.depth} if case.cell == "small-world" else {}
    return getattr(bsjax.nnx, CELLS[case.cell])(
        case.inputs,
        width,
        pattern=pattern,
        block=block,
        use_layer_norm=True,
        implementation=implementation,
        dtype=jnp.dtype(case.dtype),
        param_dtype=jnp.dtype(case.dtype),
        rngs=nnx.Rngs(0),
        **options,
    )


def _steps(case: Case) -> int:
    return {"small-world": case.depth, "lstm": 0, "multiplicative": 1}[case.cell]


def parameters(make: Callable[[], Any]) -> int:
    """How many a cell will have. Nothing is computed."""
    return count(nnx.eval_shape(make))


def narrower(case: Case) -> int:
    """The width of the widest dense cell that has no more parameters than the sparse one."""
    wanted = parameters(lambda: sparse(case))
    of = lambda width: parameters(lambda: dense(case, width))  # noqa: E731
    return bisect.bisect_right(range(case.state), wanted, 2, key=of) - 1


def densified(case: Case, cell: Any) -> Any:
    """The dense cell with the weights of a sparse one: it must give the same numbers."""
    twin = dense(case, case.state)
    for ours, theirs in zip([*cell.steps, cell.gates], [*twin.steps, twin.gates], strict=True):
        matrix = bsjax.todense(ours.values[...], ours.pattern.get_value())
        theirs.values.set_value(matrix[None])
    for name in ("inputs", "input_norm", "step_norms", "gate_norm"):
        nnx.update(getattr(twin, name), nnx.state(getattr(cell, name)))
    return twin


@nnx.jit
def outputs(rnn: Any, x: jax.Array) -> jax.Array:
    """Of all steps."""
    return rnn(x)


def check(case: Case) -> str | None:
    """Why the sparse cell is not the dense one with zeros in it, or None if it is."""
    cell = sparse(case, recurrent_kernel_init=bsjax.inits.stored_fan_in())
    x = normal(0, (case.batch, 2, case.inputs), case.dtype)
    got, want = (outputs(bsjax.nnx.RNN(c), x) for c in (cell, densified(case, cell)))
    got, want = (np.asarray(a, np.float32) for a in (got, want))
    # outputs are at most 1; every product and norm rounds, and the gates pass errors on
    roundings = 2 * 2 * (_steps(case) + 4)
    allowed = roundings * max(float(jnp.finfo(case.dtype).eps), 1e-6 * case.state**0.5)
    worst = float(np.abs(got - want).max())
    fine = np.isfinite(got).all() and worst <= allowed
    return None if fine else f"differs from the dense cell by {worst:.2g}, allowed {allowed:.2g}"


def count(cell: Any) -> int:
    """The number of its parameters."""
    return sum(a.size for a in jax.tree.leaves(nnx.state(cell, nnx.Param)))


def normal(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Standard normal numbers."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.dtype(dtype))
