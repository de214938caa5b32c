"""`scan`: as `jax.lax.scan`, but the gradient of a weight is one product over all steps.

`f` is traced twice. The first time its products are found, and of each is asked what its values are
computed from. Those that depend on neither carry nor x are given a probe the second time: it takes
the cotangent of the product's sums out of the backward loop, beside the inputs that the forward
loop gave out. What is left to do after the loop is one `sddmm` per product.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer, eval_jaxpr
from jax.extend.core import get_opaque_trace_state
from jax.interpreters import partial_eval
from jax.sharding import PartitionSpec
from jaxtyping import Array

from bsjax.ops import _core, _mesh
from bsjax.ops import _validate as validate
from bsjax.ops._hoist import hoisted
from bsjax.pattern import BlockPattern


def scan(
    f: Callable[[Any, Any], Any],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    *,
    remat: bool = False,
) -> tuple[Any, Any]:
    """`jax.lax.scan(f, init, xs, ...)`, where weights get their gradient once, after all steps.

    The gradient of a weight that every step uses is `sum_t sddmm(x_t, dy_t)`. Left to automatic
    differentiation, each step reads and writes all of it. Here every `matmul` and `glu` in `f` has
    one `sddmm` over the tokens of all steps, rounded once.

    That holds for products whose values, gate and pattern depend on neither the carry nor x: `f`
    closes over them, and may cast, scale or join them. Products inside another transformation in
    `f` (`jit`, `vmap`, `checkpoint`, an inner loop), those with implementation="reference", and
    whatever else is made of a weight get the gradient that `jax.lax.scan` gives, in the same call.

    The backward pass holds the inputs `[time, ..., k]` and the cotangents of the sums
    `[time, ..., m]` of these products. `remat=True` keeps nothing else but the carry of each step
    and computes the steps again. `f` must be pure, since it is traced twice. Differentiate inside
    `jit`: outside, every call compiles anew. Reverse mode only, to any order; second derivatives
    are summed step by step.

    After Gray, Radford and Kingma 2017, "GPU Kernels for Block-Sparse Weights", whose code groups
    the updates of time steps (`group_param_grads`).
    """
    remat = validate.flag("scan", "remat", remat)
    loop = functools.partial(jax.lax.scan, length=length, reverse=reverse, unroll=unroll)
    found: list[_Product] = []

    def finding(carry: Any, x: Any) -> Any:
        out, found[:] = _find(f, carry, x)  # if the loop traces again, the last time counts
        return out

    jax.eval_shape(lambda init, xs: loop(finding, init, xs), init, xs)
    shared = {i: product for i, product in enumerate(found) if product.sources}
    if not shared:
        return loop(jax.checkpoint(f, prevent_cse=False) if remat else f, init, xs)

    def probed(carry: Any, x_probes: tuple[Any, dict[int, Array]]) -> Any:
        x, probes = x_probes
        with _recording(probes) as calls:
            carry, y = f(carry, x)
        if [call.form for call in calls] != [product.form for product in found]:
            raise ValueError(
                f"scan: `f` called {len(found)} products when it was traced first and {len(calls)} "
                "or others the second time: it must be pure, the same function at every call."
            )
        return carry, (y, {i: calls[i].x for i in probes})

    if remat:
        probed = jax.checkpoint(probed, prevent_cse=False)
    time = jax.tree.leaves(xs)[0].shape[0] if length is None else length

    def probes() -> dict[int, Array]:
        return {i: product.form.probe(time) for i, product in shared.items()}

    steps, known = hoisted(lambda *args: loop(probed, *args), init, (xs, probes()))
    # what is closed over, each once: known by identity, since every function closes over the same
    consts = {id(c): c for c in [*known, *(c for p in shared.values() for c in p.sources)]}
    at = {key: i for i, key in enumerate(consts)}
    taken = [at[id(c)] for c in known]
    shared = {i: p._replace(sources=[at[id(c)] for c in p.sources]) for i, p in shared.items()}

    def run(consts: list[Any], init: Any, xs: Any, probes: dict[int, Array]) -> Any:
        carry, (ys, inputs) = steps([consts[i] for i in taken], init, (xs, probes))
        return (carry, ys), inputs

    @jax.custom_vjp
    def scanned(consts: list[Any], init: Any, xs: Any) -> Any:
        return run(consts, init, xs, probes())[0]  # where inputs are not used, they are not kept

    def forward(consts: list[Any], init: Any, xs: Any) -> Any:
        out, pull, inputs = jax.vjp(run, consts, init, xs, probes(), has_aux=True)
        return out, (consts, pull, inputs)

    def backward(saved: Any, cotangents: Any) -> Any:
        consts, pull, inputs = saved
        dconsts, dinit, dxs, dsums = pull(cotangents)
        for i, product in shared.items():
            sources = [consts[j] for j in product.sources]
            grads = product.gradients(sources, inputs[i], dsums[i])
            for j, grad in zip(product.sources, grads, strict=True):
                if grad.dtype != jax.dtypes.float0:
                    dconsts[j] = dconsts[j] + grad
        return dconsts, dinit, dxs

    scanned.defvjp(forward, backward)
    return scanned(list(consts.values()), init, xs)


def probe(
    spec: _core.Spec, transpose: bool, x: Array, values: Array, p: BlockPattern, dtype: Any
) -> Array | None:
    """What a product in the body of a `scan` shows itself to, and is given a probe by, if any.
    `dtype` is that of its sums."""
    recorder = _RECORDER.get()
    # inside another transformation the operands are not those of one step
    if recorder is None or recorder.state != get_opaque_trace_state() or spec.name == "reference":
        return None
    varying = _mesh.varying(x, values, p.row, p.col)
    lead, shape = jax.typeof(x).sharding.spec, (*x.shape[:-1], p.shape[0 if transpose else 1])
    form = _Form(spec, transpose, p.grid, p.block, shape, dtype, varying, tuple(lead))
    recorder.calls.append(_Call(form, x, values, p))
    return recorder.probes.get(len(recorder.calls) - 1)


class _Form(NamedTuple):
    """What is static about a product."""

    spec: _core.Spec
    transpose: bool
    grid: tuple[int, int]
    block: tuple[int, int]
    shape: tuple[int, ...]
    dtype: Any
    varying: frozenset[str]
    lead: tuple[Any, ...]  # explicit mesh axes of the tokens

    def probe(self, time: int) -> Array:
        zeros = jnp.zeros((time, *self.shape), self.dtype)
        if any(self.lead):  # the type of a cotangent is that of the probe
            zeros = jax.sharding.reshard(zeros, PartitionSpec(None, *self.lead))
        return _mesh.vary(zeros, self.varying)


class _Call(NamedTuple):
    """A product while `f` is traced."""

    form: _Form
    x: Array
    values: Array
    p: BlockPattern


class _Recorder(NamedTuple):
    state: Any
    probes: dict[int, Array]
    calls: list[_Call]


_RECORDER: contextvars.ContextVar[_Recorder | None] = contextvars.ContextVar("scan", default=None)


@contextlib.contextmanager
def _recording(probes: dict[int, Array]) -> Iterator[list[_Call]]:
    recorder = _Recorder(get_opaque_trace_state(), probes, [])
    token = _RECORDER.set(recorder)
    try:
        yield recorder.calls
    finally:
        _RECORDER.reset(token)


class _Product(NamedTuple):
    """A product of `f`: `values, row, col` as a program of its sources, which are closed over."""

    form: _Form
    program: Any
    sources: list[Any]

    def gradients(self, sources: list[Any], x: Array, dsums: Array) -> tuple[Any, ...]:
        """That of each source, from the inputs and the cotangents of all steps."""
        form = self.form
        axes = _mesh.varying(x, dsums, *sources)

        def weights(*sources: Array) -> tuple[Array, BlockPattern]:
            values, row, col = eval_jaxpr(self.program, (), *sources)
            return _mesh.vary(values, axes), BlockPattern(row, col, form.grid, form.block)

        values, pull, p = jax.vjp(weights, *sources, has_aux=True)
        pair = (dsums, x) if form.transpose else (x, dsums)
        return pull(_mesh.vary(_core.sddmm(_core.to(form.spec, values), *pair, p), axes))


def _find(f: Callable[[Any, Any], Any], carry: Any, x: Any) -> tuple[Any, list[_Product]]:
    """`f(carry, x)`, and its products: with sources where one `sddmm` can serve all steps."""
    forms: list[_Form] = []

    def operands(carry: Any, x: Any) -> Any:
        with _recording({}) as calls:
            out = f(carry, x)
        forms[:] = [call.form for call in calls]
        return out, [(call.values, call.p.row, call.p.col) for call in calls]

    step, consts = hoisted(operands, carry, x)
    results = len(step.jaxpr.outvars) - 3 * len(forms)

    def product(i: int, form: _Form) -> _Product:
        start = results + 3 * i
        needed = [start <= j < start + 3 for j in range(len(step.jaxpr.outvars))]
        program, used = partial_eval.dce_jaxpr(step.jaxpr, needed)
        sources = [c for c, one in zip(consts, used, strict=False) if one]
        sequential = any(used[len(consts) :])
        # where all can be seen, nothing is differentiated
        asked = any(isinstance(c, Tracer) for c in sources)
        return _Product(form, program, [] if sequential or not asked else sources)

    return step(consts, carry, x)[0], [product(i, form) for i, form in enumerate(forms)]
