"""Functions of users as programs: what they close over becomes an argument."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import Literal
from jax.interpreters import partial_eval

from bsjax.ops import _mesh

CALLS = {"jit", "pjit"}  # steps that are programs themselves
CASTS = {"pvary", "pcast"}  # those that only say over which mesh axes a number varies


class Hoisted:
    """A function of what it closed over, and of its arguments. Holds no tracer.

    Two are equal where their programs read the same: what was compiled for one serves the other.
    """

    def __init__(self, jaxpr: Any, tree: Any) -> None:
        self.jaxpr, self.tree = jaxpr, tree

    def __call__(self, consts: list[Any], *args: Any) -> Any:
        return self.tree.unflatten(eval_jaxpr(self.jaxpr, (), *consts, *jax.tree.leaves(args)))

    def anywhere(self, consts: list[Any], *args: Any) -> Any:
        """The same on another mesh, or on part of one, than where it was traced.

        A program remembers which mesh it was traced on and which of its numbers vary over it. Here
        every step is taken anew, its operands cast to vary over the same axes.
        """
        return self.tree.unflatten(walk(self.jaxpr, [*consts, *jax.tree.leaves(args)], _anew))

    @functools.cached_property
    def _text(self) -> str:
        return str(self.jaxpr)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Hoisted) and (self.tree, self._text) == (other.tree, other._text)

    def __hash__(self) -> int:
        return hash(self._text)


def hoisted(f: Callable[..., Any], *args: Any) -> tuple[Hoisted, list[Any]]:
    """`g` and `consts`, with `g(consts, *args)` for `f(*args)`."""
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
    jaxpr = partial_eval.convert_constvars_jaxpr(closed.jaxpr)
    return Hoisted(jaxpr, jax.tree.structure(shape)), closed.consts


def walk(jaxpr: Any, args: list[Any], run: Callable[[Any, list[Any]], Any]) -> list[Any]:
    """A program step by step: `outs = run(step, inputs)`."""
    known = dict(zip(jaxpr.invars, args, strict=True))

    def value(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else known[v]

    for step in jaxpr.eqns:
        outs = run(step, [value(v) for v in step.invars])
        known.update(zip(step.outvars, outs, strict=True))
    return [value(v) for v in jaxpr.outvars]


def _anew(step: Any, inputs: list[Any]) -> Any:
    axes = _mesh.varying(*inputs)
    inputs = [_mesh.vary(jnp.asarray(a), axes) for a in inputs] if axes else inputs
    if step.primitive.name in CALLS:
        inner = step.params["jaxpr"]
        jaxpr = partial_eval.convert_constvars_jaxpr(inner.jaxpr)
        return walk(jaxpr, [*inner.consts, *inputs], _anew)
    if step.primitive.name in CASTS:
        return inputs
    params = step.primitive.get_bind_params(step.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # JAX 0.11
    outs = step.primitive.bind(*functions, *inputs, **params)
    return outs if step.primitive.multiple_results else [outs]
