"""Functions of users as programs: what they close over becomes an argument."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.interpreters import partial_eval


class Hoisted:
    """A function of what it closed over, and of its arguments. Holds no tracer.

    Two are equal where their programs read the same: what was compiled for one serves the other.
    """

    def __init__(self, jaxpr: Any, tree: Any) -> None:
        self.jaxpr, self.tree = jaxpr, tree

    def __call__(self, consts: list[Any], *args: Any) -> Any:
        return self.tree.unflatten(eval_jaxpr(self.jaxpr, (), *consts, *jax.tree.leaves(args)))

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
