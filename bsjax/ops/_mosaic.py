"""The door to the GPU kernels: padding, lists and configurations belong here, and for convolutions
and attention in the files of that name beside it.

Kernels take 16-bit operands whose sizes their tiles divide. They are imported when the first of
them runs: `import bsjax` needs no Pallas.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bsjax.ops import _mesh
from bsjax.pattern import BlockPattern
from pallas_kernels import config

if TYPE_CHECKING:
    from bsjax.ops._choose import Problem


def why_not(problem: "Problem") -> str | None:
    """The reason why no kernel can run `problem`, or None if one can."""
    if reason := config.why_not(jnp.dtype(problem.dtype).name, problem.block):
        return reason
    if isinstance(problem.n, int) and _steps(problem) > config.MOST_STEPS:
        return f"{problem.n} tokens times {problem.capacity} slots are more than int32 counts"
    return no_gpu()


def no_gpu() -> str | None:
    """The reason why kernels do not run on the GPU that is here."""
    if jax.default_backend() != "gpu":  # a CPU may interpret, or compile for a GPU elsewhere
        return None
    return _no_hopper(jax.devices()[0])


def _no_hopper(device: Any) -> str | None:
    capability = getattr(device, "compute_capability", "unknown")
    if str(capability).startswith("9."):
        return None
    return (
        "the kernels are written for Hopper GPUs (compute capability 9.0), and this is "
        f"{device.device_kind} ({capability})"
    )


@contextlib.contextmanager
def in_words(op: str) -> Iterator[None]:
    """Says what to do about a kernel without a GPU. (Under jit JAX itself says that CPUs only
    interpret kernels: the platform is not known before.)"""
    try:
        yield
    except ValueError as error:
        if "interpret mode" not in str(error):
            raise
        raise ValueError(
            f'{op}: implementation="mosaic" cannot run here: it needs a Hopper GPU, and JAX found '
            f'{jax.default_backend()} only. Use implementation="auto", which takes the fastest '
            "that can."
        ) from error


def matmul(
    x: Float[Array, "n i"],
    values: Float[Array, "e br bc"],
    p: BlockPattern,
    *,
    transpose: bool,
    precision: Any,
    out_dtype: Any,
) -> Float[Array, "n o"]:
    """`x @ S`, or `x @ S^T` from the same values."""
    outputs = p.shape[0] if transpose else p.shape[1]
    if not x.shape[0] * p.capacity * outputs:
        return jnp.zeros((x.shape[0], outputs), out_dtype)
    return _matmul((x,), values, (), p, transpose, out_dtype, {})[0]


def fused(
    x: Float[Array, "n i"],
    values: Float[Array, "e br bc"],
    p: BlockPattern,
    bias: Float[Array, " o"] | None,
    residual: Float[Array, "n o"] | None,
    *,
    transpose: bool,
    activation: str | None,
    gated: bool,
    keep: bool,
) -> tuple[Array, ...]:
    """`activation(x @ S + bias) + residual`, and what the activation was applied to if `keep`.

    With `gated`, columns of S are pairs of blocks, and the left one gates the right one.
    """
    bias_row = () if bias is None else (bias.astype(jnp.float32)[None],)
    tokens = (x,) if residual is None else (x, residual)
    options = {
        "activation": activation,
        "gated": gated,
        "bias": bias is not None,
        "residual": residual is not None,
        "keep": keep,
    }
    return _matmul(tokens, values, bias_row, p, transpose, x.dtype, options)


def sloped(
    dy: Float[Array, "n i"],
    values: Float[Array, "e br bc"],
    p: BlockPattern,
    z: Float[Array, "n o"],
    *,
    transpose: bool,
    activation: str,
    gated: bool,
    total: bool,
) -> tuple[Array, ...]:
    """`(dy @ S) * activation'(z)`, or for a pair z the gradient of both, and its sum over tokens
    in float32 if `total` (not over several GPUs)."""
    options = {"slope": activation, "gated": gated, "total": total}
    dz, *totals = _matmul((dy, z), values, (), p, transpose, dy.dtype, options)
    return dz, *(jnp.sum(rows, axis=0) for rows in totals)


def _matmul(
    tokens: tuple[Array, ...],
    values: Array,
    bias: tuple[Array, ...],
    p: BlockPattern,
    transpose: bool,
    out_dtype: Any,
    options: dict[str, Any],
) -> tuple[Array, ...]:
    """The kernel, with the epilogue that `options` name, on x and perhaps a residual."""
    from pallas_kernels import block_sparse, lists
    from pallas_kernels.epilogue import Epilogue

    br, bc = p.block
    sizes = (bc, br) if transpose else (br, bc)
    epilogue = Epilogue(**options)

    def run(*args: Array) -> tuple[Array, ...]:
        op = "matmul transposed" if transpose else "matmul"
        n, bytes_ = args[0].shape[0], jnp.dtype(out_dtype).itemsize
        density = p.capacity / math.prod(p.grid)
        options = {"density": density, "tuned": _key(op, args[0], sizes, density)}
        chosen = _unsplit(config.for_matmul(n, sizes, bytes_, multiprocessors(), **options))
        tile = chosen.tile * chosen.cluster
        args = alike(*(_padded(a, tile) for a in args[: len(tokens)]), *args[len(tokens) :])
        (x, *residual), (values, row, col, *bias) = args[: len(tokens)], args[len(tokens) :]
        steps = lists.of_pattern(row, col, p.grid, columns=chosen.columns, transpose=transpose)
        outs = block_sparse.matmul(
            x,
            values,
            steps,
            chosen,
            *bias,
            *residual,
            blocks=p.grid[0] if transpose else p.grid[1],
            transpose=transpose,
            epilogue=epilogue,
            out_dtype=out_dtype,
        )
        return tuple(_mesh.vary(y, _mesh.varying(x))[:n] for y in outs)

    axes = ["n i", *["n p"] * (len(tokens) - 1), "e a b", "e", "e", *["h o"] * len(bias)]
    rule = f"{', '.join(axes)} -> {', '.join(['n p', 'n o'][: 1 + epilogue.keep])}"
    return _on_each_device(run, tokens, (values, p.row, p.col, *bias), rule)


def sddmm(
    x: Float[Array, "n k"],
    y: Float[Array, "n m"],
    p: BlockPattern,
    *,
    precision: Any,
    out_dtype: Any,
) -> Float[Array, "e br bc"]:
    """The stored blocks of `x^T y`."""
    from pallas_kernels import lists, sampled_dense

    if not x.shape[0] * p.capacity:
        return jnp.zeros((p.capacity, *p.block), out_dtype)

    def run(x: Array, y: Array, row: Array, col: Array) -> Array:
        bytes_ = jnp.dtype(out_dtype).itemsize
        tuned = _key("sddmm", x, p.block, p.capacity / math.prod(p.grid))
        options = {"n": x.shape[0], "tuned": tuned}
        chosen = _unsplit(config.for_sddmm(p.block, bytes_, multiprocessors(), **options))
        x, y, row, col = alike(_padded(x, chosen.depth), _padded(y, chosen.depth), row, col)
        ptr = lists.pointers(col, p.grid[1])
        v = sampled_dense.sddmm(x, y, row, ptr, chosen, block=p.block, out_dtype=out_dtype)
        stored = jnp.arange(p.capacity, dtype=jnp.int32) < ptr[-1]
        return jnp.where(stored[:, None, None], _mesh.vary(v, _mesh.varying(x)), 0)

    return _on_each_device(run, (x, y), (p.row, p.col), "n i, n o, e, e -> e a b")


def why_not_gathered(dtypes: tuple[Any, Any], block: int, features: int) -> str | None:
    """The reason why no kernel can sample so many features by blocks of that size, or None."""
    x, w = (jnp.dtype(dtype).name for dtype in dtypes)
    if x != w or x not in ("bfloat16", "float16"):
        return f"kernels multiply bfloat16 or float16, x and w alike, and these are {x} and {w}"
    if block % config.SLICE:
        return f"kernels read slices of {config.SLICE} features, and `block` is {block}"
    if features // config.SLICE > config.SLICES:
        return f"{features} features are more than the {config.SLICES * config.SLICE} of a list"
    return no_gpu()


def gathered(
    which: Any,
    left: Float[Array, "n k"],
    right: Float[Array, "a b"],
    weights: Float[Array, " g"],
    *,
    taken: int,
    block: int,
    same: bool,
) -> Float[Array, "c d"]:
    """Products of which one axis is a sample of groups (see the kernel), from the `weights` of all
    groups: `taken` of them count, all the `same` or each differently."""
    from pallas_kernels import gathered as kernels
    from pallas_kernels import lists

    if not left.size * right.size:  # no tokens, or no features out
        shape = left.shape[1 if which == "rows" else 0], right.shape[0 if which == "columns" else 1]
        return jnp.zeros(shape, left.dtype)
    slices = weights.shape[0] * block // config.SLICE
    count = taken * block // config.SLICE

    def run(left: Array, right: Array, weights: Array) -> Array:
        n = left.shape[1 if which == "rows" else 0]
        m = right.shape[0 if which == "columns" else 1]
        rows = count * config.SLICE if which == "rows" else n
        columns = count * config.SLICE if which == "columns" else m
        chosen = kernels.tiling(rows, columns, slices, multiprocessors())
        tile = config.SLICE if which == "rows" else chosen.rows * chosen.cluster
        left = _padded(_padded(left, tile), config.SLICE, axis=1)
        right = _padded(_padded(right, config.SLICE), config.SLICE, axis=1)
        options = {"count": count, "slices": slices}
        if which == "contract" and not same:
            options["every"] = block // config.SLICE
        order, counts = lists.of_sample(weights, taken, block // config.SLICE)
        factors = lists.quotients(counts, same=same) if which == "contract" else counts
        tables = kernels.table(order), kernels.table(factors)
        left, right, order, factors = alike(left, right, *tables)
        out = kernels.product(which, left, right, order, factors, chosen, **options)
        return _mesh.vary(out, _mesh.varying(left))[:n, :m]

    rules = {
        "contract": "n k, k m, g -> n m",
        "columns": "n m, k m, g -> n k",
        "rows": "n k, n m, g -> k m",
    }
    if which == "rows":
        return _on_each_device(run, (left, right), (weights,), rules[which])
    return _on_each_device(run, (left,), (right, weights), rules[which])


def multiprocessors() -> int:
    """Of the GPU that runs this, or of an H200 where a program is compiled ahead without one."""
    if device := jax.sharding.get_abstract_mesh().abstract_device:
        return device.num_cores or config.MULTIPROCESSORS
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else config.MULTIPROCESSORS


def _key(op: str, x: Array, block: tuple[int, int], density: float) -> config.Key | None:
    """Where a tuned configuration would stand; there is none for a GPU that is not there."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return None
    return config.key(device.device_kind, op, x.dtype.name, block, x.shape[0], density)


def several_gpus() -> bool:
    """Whether a program may be spread over several GPUs without saying so while it is traced."""
    return jax.default_backend() == "gpu" and jax.device_count() > 1


def _on_each_device(
    run: Callable[..., Any], per_token: tuple[Array, ...], weights: tuple[Array, ...], rule: str
) -> Any:
    if several_gpus():
        return _mesh.on_each_device(run, per_token, weights, rule)
    return run(*per_token, *weights)


def _unsplit(chosen: config.Config) -> config.Config:
    """What joins tiles writes in place, which XLA's partitioner does not take."""
    return dataclasses.replace(chosen, split=False) if several_gpus() else chosen


def _padded(x: Array, tile: int, axis: int = 0) -> Array:
    more = [(0, -x.shape[i] % tile if i == axis else 0) for i in range(2)]
    return jnp.pad(x, more) if more[axis][1] else x


def alike(*arrays: Any) -> Any:
    """All of them varying over the mesh axes that one of them varies over, as a kernel wants."""
    axes = _mesh.varying(*jax.tree.leaves(arrays))
    return jax.tree.map(lambda a: _mesh.vary(a, axes), arrays)


def _steps(problem: "Problem") -> int:
    """The most that any of the three products of a training step takes."""
    parts = max(1, max(problem.block) // 64)
    tokens = problem.n if problem.images is None else problem.images
    each = problem.capacity * parts * problem.taps + max(problem.grid)
    return math.ceil(tokens / 64) * problem.pixels * each
