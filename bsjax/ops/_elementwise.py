"""Functions of indices, evaluated inside a kernel: each element by itself, wherever it is."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from bsjax.ops._hoist import CALLS, CASTS, Hoisted, walk

# primitives that compute each element from those at the same place, and that kernels lower
_LOGIC = {"and", "not", "or", "xor", "select_n", "eq", "ne", "lt", "le", "gt", "ge"}
_NUMBERS = {"abs", "add", "clamp", "div", "integer_pow", "max", "min", "mul", "neg", "rem", "sub"}
_FUNCTIONS = {"exp", "exp2", "log", "sqrt", "square", "tanh"}
STEPS = _LOGIC | _NUMBERS | _FUNCTIONS | {"convert_element_type", "sign"}
# leave every element where it is: axes are only ever added by what kernels do not have
_SAME = {"broadcast_in_dim"} | CASTS


def why_not(name: str, function: Hoisted) -> str | None:
    """The reason why a kernel cannot evaluate a function of a head, queries and keys."""
    closed = len(function.jaxpr.invars) - 3
    if closed:
        return (
            f"the function `{name}` closes over {closed} array(s), and kernels know only indices: "
            "write it as arithmetic on head, q_index and k_index, or use segment ids"
        )
    found = _foreign(function.jaxpr)
    if found is None:
        return None
    return (
        f"the function `{name}` takes a step that is not arithmetic on single elements, or that "
        f"kernels do not have ({found})"
    )


def evaluate(function: Hoisted, head: Any, queries: Any, keys: Any) -> Any:
    """Of a head, and of index arrays of equal shape; `why_not` must have nothing against it."""
    (out,) = walk(function.jaxpr, [head, queries, keys], _step)
    return jnp.broadcast_to(out, queries.shape)


def _foreign(jaxpr: Any) -> str | None:
    for step in jaxpr.eqns:
        name = step.primitive.name
        if name in CALLS:
            inner = step.params["jaxpr"]
            if inner.consts:
                return "a constant array"
            if found := _foreign(inner.jaxpr):
                return found
        elif name not in STEPS | _SAME:
            return name
    return None


def _step(step: Any, inputs: list[Any]) -> Any:
    if step.primitive.name in CALLS:
        return walk(step.params["jaxpr"].jaxpr, inputs, _step)
    if step.primitive.name in _SAME:
        return inputs[:1]
    return [step.primitive.bind(*_alike(inputs, step.invars), **step.params)]


def _alike(inputs: list[Any], variables: Any) -> list[Any]:
    """Scalars beside arrays, as arrays."""
    inputs = [jnp.asarray(a, v.aval.dtype) for a, v in zip(inputs, variables, strict=True)]
    shape = max((jnp.shape(a) for a in inputs), key=len)
    return [lax.broadcast_in_dim(a, shape, ()) if a.ndim < len(shape) else a for a in inputs]
