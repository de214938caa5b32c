"""The same parameters in both Flax dialects."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx, traverse_util

from bsjax._serialization import SIZES, from_state, to_state
from bsjax.pattern import BlockPattern

type Path = tuple[str, ...]


def from_nnx(model: Any) -> dict[str, Any]:
    """The variables of the Linen model that has the submodules of `model` under the same names.

    Collections come from the types of the NNX variables, as in Flax (`nnx.Param` is `params`,
    `nnx.BatchStat` is `batch_stats`), patterns are in `patterns`. Item `i` of a list `layers` is
    `layers_i`, as Linen names it. States of random numbers are left out: Linen has none.
    """
    flat: dict[Path, Any] = {}
    for path, value in ((path, v.get_value()) for path, _, v in _variables(model)):
        flat |= _leaves(path, value)
    return traverse_util.unflatten_dict(flat)


def to_nnx(variables: Any, model: Any) -> None:
    """Put the variables of a Linen model into the NNX model that they fit, in place.

    The other direction of `from_nnx`. The names, shapes and dtypes must be the same, and so must
    grid, block and capacity of patterns (sizes that `variables` do not hold are not compared). If
    anything does not fit, nothing is changed.
    """
    given = traverse_util.flatten_dict(nn.meta.unbox(variables))
    wanted = traverse_util.flatten_dict(from_nnx(model))
    optional = {path for path in wanted if path[0] == "patterns" and path[-1] in SIZES}
    if missing := wanted.keys() - given.keys() - optional:
        raise ValueError(
            f"to_nnx: `variables` lack {_some(missing)}, which `model` has: both need the same "
            "layers under the same names."
        )
    if surplus := given.keys() - wanted.keys():
        raise ValueError(
            f"to_nnx: `model` has no {_some(surplus)}, which `variables` hold: both need the same "
            "layers under the same names."
        )
    fitting = []
    for path, key, variable in _variables(model):
        ours = variable.get_value()
        state = {name: given.get(name, leaf) for name, leaf in _leaves(path, ours).items()}
        try:
            value = _fitted(ours, state)
        except (TypeError, ValueError) as error:
            raise type(error)(f"to_nnx: {'/'.join(path)}: {error}") from None
        fitting.append((key, variable.replace(value)))
    nnx.update(model, nnx.from_flat_state(fitting))


def _variables(model: Any) -> list[tuple[Path, Any, Any]]:
    """Of every variable: its path in Linen, its path in NNX, itself."""
    kept = nnx.state(model, nnx.All(nnx.Variable, nnx.Not(nnx.RngState)))
    found = []
    for key, variable in nnx.to_flat_state(kept):
        path = [nnx.variable_name_from_type(type(variable), allow_register=True)]
        for part in key:
            if isinstance(part, int):
                path[-1] += f"_{part}"
            else:
                path.append(str(part))
        if isinstance(variable.get_value(), BlockPattern) and path[-1] == "pattern":
            path.pop()  # Linen keeps the coordinates beside each other in the layer
        found.append((tuple(path), key, variable))
    return found


def _leaves(path: Path, value: Any) -> dict[Path, Any]:
    if isinstance(value, BlockPattern):
        return {(*path, name): leaf for name, leaf in to_state(value).items()}
    return {path: value}


def _fitted(ours: Any, state: dict[Path, Any]) -> Any:
    """The new value of a variable, if it fits in the place of `ours`."""
    if isinstance(ours, BlockPattern):
        return from_state(ours, {path[-1]: leaf for path, leaf in state.items()})
    (value,) = state.values()
    if value.shape != ours.shape:
        raise ValueError(
            f"expected shape {ours.shape}, got {value.shape}: build `model` with the sizes and "
            "the pattern of the Linen model."
        )
    if value.dtype != ours.dtype:
        raise TypeError(
            f"expected {ours.dtype}, got {value.dtype}: cast the array first, or build `model` "
            f"with param_dtype={value.dtype}."
        )
    return jnp.asarray(value)


def _some(paths: Any) -> str:
    names = sorted("/".join(path) for path in paths)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
