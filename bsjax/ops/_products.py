"""The public products: what users call, with every argument checked before anything runs."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from bsjax.ops import _core, _fused, _gate, _mesh, _reference, _sampled_tokens, _scan
from bsjax.ops import _validate as validate
from bsjax.ops._activations import Activation, named
from bsjax.ops._choose import Implementation, Problem, check
from bsjax.ops._samplers import Sampler
from bsjax.pattern import BlockPattern


def matmul(
    x: Any,
    values: Any,
    p: BlockPattern,
    *,
    transpose: bool = False,
    gate: Any = None,
    bias: Any = None,
    activation: Activation | None = None,
    residual: Any = None,
    precision: Any = None,
    implementation: Implementation = "auto",
    key: Any = None,
    fraction: float | int = 1.0,
    sampler: Sampler = "systematic",
    sample_block: int = 1,
    scores: Any = None,
) -> Float[Array, "*n m"]:
    """`y[..., m] = activation(x[..., k] @ S[k, m] + bias[m]) + residual[..., m]`.

    S is zero outside the stored blocks, which are `values[e, br, bc]`. With `transpose=True` the
    product is `x[..., m] @ S^T`, from the same values. `gate[e]` scales each stored block, and its
    gradient is `<dS, values>` per block, also where the gate is 0. A block with gate 0 is left out:
    no product reads it (that of dvalues only if the gradient of the gate is asked for).

    Sums are kept in float32 (float64 for float64 operands); `y` has the dtype of `x`, rounded
    once. `precision=None` means full float32 for float32 operands.

    `activation` is one of "relu", "gelu" (tanh form), "silu", "tanh", "sigmoid", or a function.

    Differentiable in reverse mode to any order, in x, values, gate, bias and residual: dx is the
    other transpose, dvalues is `sddmm(x, dy, p)`. Forward mode (`jax.jvp`, `jax.hessian`) does not
    exist for a `custom_vjp`; use `jax.jacrev` twice, or implementation="reference".

    With a `key` and a `fraction` below 1, dvalues (and the gradient of the gate) is an estimate,
    from a sample of the tokens, and everything else as exact as ever: policy "weight" of
    `sampled_matmul`, whose `sampler` and `scores` these are. Tokens are drawn in groups of
    `sample_block` neighbours, over all leading axes, by `||x_g||_F` or by `scores`, one for each.
    Only those taken are kept for dvalues, each scaled in float32 and rounded to the dtype of x.

    After Gray, Radford and Kingma 2017, "GPU Kernels for Block-Sparse Weights".
    """
    op = "matmul"
    p, transpose = validate.pattern(op, p), validate.flag(op, "transpose", transpose)
    x, values = validate.array(op, "x", x), validate.values(op, "values", values, p)
    k, m = p.shape[::-1] if transpose else p.shape
    validate.last_axis(op, "x", x, k, p, "multiply the transpose of" if transpose else "multiply")
    out_shape = (*x.shape[:-1], m)
    operands = (x, values)
    gate, bias, residual = validate.extras(op, p, gate, bias, residual, out_shape, "feature")
    act = named(op, activation)
    sample = _sampled_tokens.draw(op, x, key, fraction, sampler, sample_block, scores)
    # an epilogue works on the unrounded sums
    bare = bias is None and act is None and residual is None
    dtype = x.dtype if bare else _reference.accumulator(x, values)
    spec = _spec(op, operands, p, precision, implementation, dtype)
    form = None
    if not bare and not callable(activation) and _one_kernel(spec, x, p, residual):
        form = _fused.Form(activation)
    sums, probe = _core.to(spec, x) if form else spec, None
    if spec.name == "reference":
        values = values if gate is None else _gate.scaled(values, gate, p)
    elif sample is not None:
        values, p, probe = _sampled_tokens.product(sums, transpose, x, values, gate, p, sample)
    elif gate is None:
        probe = _scan.probe(sums, transpose, x, values, p, sums.out_dtype)
    else:
        values, p, probe = _gate.applied(sums, transpose, x, values, gate, p)
    if spec.name == "mosaic":  # gated values are rounded: the tensor cores take 16 bits
        values = values.astype(operands[1].dtype)
    if form:
        return _fused.matmul(spec, transpose, form, x, values, p, bias, residual, probe)
    if spec.name == "reference" and sample is not None:
        y = _sampled_tokens.reference(spec, transpose, x, values, p, sample)
    else:
        y = _core.matmul(spec, transpose, x, values, p, probe)
    if bias is not None:
        y = _mesh.per_token(jnp.add, y, jnp.broadcast_to(bias.astype(y.dtype), (1, m)))
    if act is not None:
        y = act(y)
    if residual is not None:
        y = y + residual.astype(y.dtype)
    return y.astype(x.dtype)


def sddmm(
    x: Any,
    y: Any,
    p: BlockPattern,
    *,
    precision: Any = None,
    implementation: Implementation = "auto",
) -> Float[Array, "e br bc"]:
    """The stored blocks of `x[..., k]^T @ y[..., m]`, summed over all leading axes.

    Sampled dense-dense matrix multiplication: slot `i` is block-row `row[i]` of x^T times
    block-column `col[i]` of y; spare slots are zeros. This is the gradient of `matmul` in its
    values. Sums are kept in float32; the result has the common dtype of `x` and `y`, rounded once.
    Differentiable in reverse mode to any order: both derivatives are a `matmul`.
    """
    op = "sddmm"
    p = validate.pattern(op, p)
    x, y = validate.array(op, "x", x), validate.array(op, "y", y)
    validate.last_axis(op, "x", x, p.shape[0], p, "be the left side of")
    validate.last_axis(op, "y", y, p.shape[1], p, "be the right side of")
    validate.same_lead(op, x, y)
    dtype = _reference.common_dtype(x.dtype, y.dtype)
    spec = _spec(op, (x, y), p, precision, implementation, dtype)
    return _core.sddmm(spec, x, y, p)


def glu(
    x: Any,
    gate_values: Any,
    up_values: Any,
    p: BlockPattern,
    *,
    activation: Activation = "silu",
    precision: Any = None,
    implementation: Implementation = "auto",
) -> Float[Array, "*n m"]:
    """`activation(x @ G) * (x @ U)`: the gated linear unit of two matrices with one pattern.

    G and U are `gate_values[e, br, bc]` and `up_values[e, br, bc]`. Both products read x once, as
    one product with blocks twice as wide. Dtypes, precision and derivatives are those of `matmul`.
    After Shazeer 2020, "GLU Variants Improve Transformer".
    """
    op = "glu"
    p = validate.pattern(op, p)
    x = validate.array(op, "x", x)
    gate_values = validate.values(op, "gate_values", gate_values, p)
    up_values = validate.values(op, "up_values", up_values, p)
    validate.last_axis(op, "x", x, p.shape[0], p, "multiply")
    act = named(op, activation)
    if act is None:
        raise ValueError(
            f"{op}: `activation` must not be None: a product of two linear maps has no gate."
        )
    dtype = _reference.common_dtype(gate_values.dtype, up_values.dtype)
    both = jnp.concatenate([gate_values.astype(dtype), up_values.astype(dtype)], axis=2)
    (r, c), (br, bc) = p.grid, p.block
    pair = BlockPattern(p.row, p.col, (r, c), (br, 2 * bc))
    spec = _spec(op, (x, both), pair, precision, implementation, _reference.accumulator(x, both))
    if not callable(activation) and _one_kernel(spec, x, pair, None):
        form = _fused.Form(activation, gated=True)
        probe = _scan.probe(spec, False, x, both, pair, x.dtype)
        return _fused.matmul(spec, False, form, x, both, pair, None, None, probe)
    probe = _scan.probe(spec, False, x, both, pair, spec.out_dtype)
    y = _core.matmul(spec, False, x, both, pair, probe)
    y = y.reshape(*x.shape[:-1], c, 2, bc)
    y = act(y[..., 0, :]) * y[..., 1, :]
    return y.reshape(*x.shape[:-1], c * bc).astype(x.dtype)


def todense(values: Any, p: BlockPattern) -> Float[Array, "k m"]:
    """The matrix `S[k, m]`: zero but for the stored blocks `values[e, br, bc]`.

    Spare slots are dropped. The derivative is `fromdense`.
    """
    p = validate.pattern("todense", p)
    return _reference.todense(validate.values("todense", "values", values, p), p)


def fromdense(array: Any, p: BlockPattern) -> Float[Array, "e br bc"]:
    """The stored blocks of `array[k, m]`, zeros in spare slots. The derivative is `todense`.

    What lies outside the stored blocks is left out: that is what a pattern says.
    """
    p = validate.pattern("fromdense", p)
    array = validate.array("fromdense", "array", array)
    validate.shape("fromdense", "array", array, p.shape, "that of the pattern")
    return _reference.fromdense(array, p)


def _spec(
    op: str, pair: tuple[Array, Array], p: BlockPattern, precision: Any, wanted: str, dtype: Any
) -> _core.Spec:
    problem = Problem(
        op=op,
        n=_mesh.tokens(pair[0]),
        grid=p.grid,
        block=p.block,
        capacity=p.capacity,
        dtype=_reference.common_dtype(pair[0].dtype, pair[1].dtype),
    )
    check(wanted, problem)
    operands = problem.dtype if wanted == "mosaic" else None
    return _core.Spec(wanted, validate.precision(op, precision), dtype, operands)


def _one_kernel(spec: _core.Spec, x: Array, p: BlockPattern, residual: Array | None) -> bool:
    """Whether a kernel can write y itself, at no pass over memory for the epilogue."""
    able = residual is None or residual.dtype == x.dtype
    return spec.name == "mosaic" and _mesh.tokens(x) * p.capacity > 0 and able
