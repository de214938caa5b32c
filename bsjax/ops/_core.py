"""The two products and their derivatives, which are the same two products.

    y = x @ S            dx = dy @ S^T  (the other transpose, the same values)
                         dvalues = sddmm(x, dy)
    v = sddmm(x, y)      dx = y @ dv^T,  dy = x @ dv     with dv in the place of the values

They call each other, so they live in one file. A core never sees a bad shape, and no public
function ever sees a cotangent.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array

from bsjax.ops import _dense, _mesh, _mosaic, _reference, _xla
from bsjax.ops._choose import Problem, fastest
from bsjax.pattern import BlockPattern, is_concrete

_IMPLEMENTATIONS = {"xla": _xla, "mosaic": _mosaic, "dense": _dense, "reference": _reference}


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """The static part of a product."""

    name: str
    precision: Any
    out_dtype: Any
    operands: Any = None  # what kernels of one dtype get: a cotangent may come in another


def matmul(
    spec: Spec,
    transpose: bool,
    x: Array,
    values: Array,
    p: BlockPattern,
    probe: Array | None = None,
) -> Array:
    """`x[..., k] @ S` or `x[..., m] @ S^T`, in `spec.out_dtype`.

    A `probe`, of the shape and dtype of the result, is never read: its cotangent is dy, and the
    gradient of the values is left to who gave it.
    """
    if probe is not None:
        x, values, p, probe = same_axes(x, values, p, probe)
        return _probed(spec, transpose, x, values, p, probe)
    x, values, p = same_axes(x, values, p)
    # the reference is differentiated by plain autodiff: that is what makes it the law
    product = _run_matmul if spec.name == "reference" else _matmul
    return product(spec, transpose, x, values, p)


def sddmm(spec: Spec, x: Array, y: Array, p: BlockPattern) -> Array:
    """The stored blocks of `x[..., k]^T y[..., m]`, in `spec.out_dtype`."""
    x, y, p = same_axes(x, y, p)
    product = _run_sddmm if spec.name == "reference" else _sddmm
    return product(spec, x, y, p)


def compiled[**A, T](op: str, static: int) -> Callable[[Callable[A, T]], Callable[A, T]]:
    """Of a function of `static` static arguments and arrays: outside jit, where loops that close
    over arrays would be compiled again at every call, it is compiled once for each size."""

    def wrap(run: Callable[A, T]) -> Callable[A, T]:
        once = jax.jit(run, static_argnums=tuple(range(static)))

        @functools.wraps(run)
        def either(*args, **none):
            if not is_concrete(*jax.tree.leaves(args[static:])):
                return run(*args, **none)
            with _mosaic.in_words(op):
                return once(*args, **none)

        return either

    return wrap


@compiled("matmul", 2)
def _run_matmul(spec: Spec, transpose: bool, x: Array, values: Array, p: BlockPattern) -> Array:
    x, values = one_dtype(spec, x, values)

    def run(name: str, x: Array, weights: tuple[Array, BlockPattern]) -> Array:
        return _IMPLEMENTATIONS[name].matmul(
            x, *weights, transpose=transpose, precision=spec.precision, out_dtype=spec.out_dtype
        )

    staged = stage(spec, _problem("matmul", x, p), run)
    return _mesh.per_token(staged, x, (values, p))


@compiled("sddmm", 1)
def _run_sddmm(spec: Spec, x: Array, y: Array, p: BlockPattern) -> Array:
    x, y = one_dtype(spec, x, y)

    def run(name: str, x: Array, y: Array, p: BlockPattern) -> Array:
        return _IMPLEMENTATIONS[name].sddmm(
            x, y, p, precision=spec.precision, out_dtype=spec.out_dtype
        )

    return _mesh.over_tokens(stage(spec, _problem("sddmm", x, p), run), x, y, p)


def _problem(op: str, x: Array, p: BlockPattern) -> Problem:
    return Problem(
        op=op,
        n=_mesh.tokens(x),
        grid=p.grid,
        block=p.block,
        capacity=p.capacity,
        dtype=x.dtype,
    )


def stage(spec: Spec, problem: Problem, run: Callable[..., Array]) -> Callable:
    """`run` with its implementation. The platform is not known while Python traces, so where
    `auto` depends on it both are staged, and only the one that is needed is lowered."""
    if spec.name != "auto":
        return functools.partial(run, spec.name)
    if not isinstance(problem.n, int):  # symbolic, in an export: dense serves any number
        return functools.partial(run, "dense")
    names = {platform: fastest(problem, platform) for platform in ("cpu", "default")}
    # a program for a GPU that is compiled elsewhere cannot know which it will be
    if jax.default_backend() == "gpu" and _mosaic.why_not(problem) is None:
        names["cuda"] = fastest(problem, "cuda")
    runs = {platform: functools.partial(run, name) for platform, name in names.items()}
    if len(set(names.values())) == 1:
        return runs["cpu"]
    return lambda *args: jax.lax.platform_dependent(*args, **runs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(spec: Spec, transpose: bool, x: Array, values: Array, p: BlockPattern) -> Array:
    return _run_matmul(spec, transpose, x, values, p)


def _matmul_fwd(spec, transpose, x, values, p):
    # through the rule again: a second derivative differentiates what is computed here
    return _matmul(spec, transpose, x, values, p), saved(x, values, p)


def _matmul_bwd(spec, transpose, residuals, dy):
    x, values, p = residuals
    dy = jnp.asarray(dy)  # a cotangent may be a NumPy array
    dx = _matmul(to(spec, x), not transpose, dy, values, p)
    pair = (dy, x) if transpose else (x, dy)
    dvalues = _sddmm(to(spec, values), *pair, p)
    return dx, dvalues, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _probed(
    spec: Spec, transpose: bool, x: Array, values: Array, p: BlockPattern, probe: Array
) -> Array:
    return _run_matmul(spec, transpose, x, values, p)


def _probed_fwd(spec, transpose, x, values, p, probe):
    # of x only the dtype is needed; a second derivative is not probed
    return _matmul(spec, transpose, x, values, p), saved(jnp.zeros(0, x.dtype), values, p)


def _probed_bwd(spec, transpose, residuals, dy):
    like, values, p = residuals
    dy = jnp.asarray(dy)
    return _matmul(to(spec, like), not transpose, dy, values, p), None, None, dy


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sddmm(spec: Spec, x: Array, y: Array, p: BlockPattern) -> Array:
    return _run_sddmm(spec, x, y, p)


def _sddmm_fwd(spec, x, y, p):
    return _sddmm(spec, x, y, p), saved(x, y, p)


def _sddmm_bwd(spec, residuals, dv):
    x, y, p = residuals
    dv = jnp.asarray(dv)
    dx = _matmul(to(spec, x), True, y, dv, p)
    dy = _matmul(to(spec, y), False, x, dv, p)
    return dx, dy, None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
_probed.defvjp(_probed_fwd, _probed_bwd)
_sddmm.defvjp(_sddmm_fwd, _sddmm_bwd)


def saved(*residuals: Any) -> tuple[Any, ...]:
    """What a rule keeps for its backward pass.

    JAX (0.11 and 0.12) confuses residuals that are arguments as they came when it differentiates a
    scan twice. A copy is none, and costs nothing where it is compiled.
    """
    return jax.tree.map(lambda a: jnp.copy(a) if isinstance(a, Tracer) else a, residuals)


def one_dtype(spec: Spec, a: Array, b: Array) -> tuple[Array, Array]:
    dtype = spec.operands or _reference.common_dtype(a.dtype, b.dtype)
    return a.astype(dtype), b.astype(dtype)


def to(spec: Spec, like: Array) -> Spec:
    """A derivative has the dtype of what it is the derivative of, rounded once."""
    return dataclasses.replace(spec, out_dtype=like.dtype)


def same_axes(*trees: Any) -> Any:
    """Cast all arguments to vary over the union of their mesh axes (shard_map with its checks).

    A cotangent varies over all of them, so an argument that did not would be refused by
    `custom_vjp`; the transpose of this cast is the sum over devices that the gradient needs.
    """
    axes = _mesh.varying(*jax.tree.leaves(trees))
    return jax.tree.map(lambda a: _mesh.vary(a, axes), trees)
