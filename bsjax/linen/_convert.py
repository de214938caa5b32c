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
    for paths, value in ((paths, v.get_value()) for paths, _, v in _variables(model)):
        for path in paths:
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
    for paths, key, variable in _variables(model):
        ours, values = variable.get_value(), []
        for path in paths:
            state = {name: given.get(name, leaf) for name, leaf in _leaves(path, ours).items()}
            try:
                values.append(_fitted(ours, state))
            except (TypeError, ValueError) as error:
                raise type(error)(f"to_nnx: {'/'.join(path)}: {error}") from None
        if not all(values[0].equals(other) for other in values[1:]):
            names = " and ".join("/".join(path) for path in paths)
            raise ValueError(
                f"to_nnx: {names} hold different patterns, but in `model` they are "
                "one variable: give the second layer a variable of its own."
            )
        fitting.append((key, variable.replace(values[0])))
    nnx.update(model, nnx.from_flat_state(fitting))


def _variables(model: Any) -> list[tuple[list[Path], Any, Any]]:
    """Of every variable: its paths in Linen, its path in NNX, itself.

    A pattern that layers share has a path for each, since in Linen each has its own.
    """
    kept = nnx.state(model, nnx.All(nnx.Variable, nnx.Not(nnx.RngState)))
    shared, found = _places(model), []
    for key, variable in nnx.to_flat_state(kept):
        kind = nnx.variable_name_from_type(type(variable), allow_register=True)
        pattern = isinstance(variable.get_value(), BlockPattern)
        keys = shared.get(key, [key]) if pattern else [key]
        found.append(([_path(kind, one, pattern) for one in keys], key, variable))
    return found


def _places(model: Any) -> dict[Any, list[Any]]:
    """For each attribute that is a variable, all attributes that are the same one."""
    places: dict[int, list[Any]] = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            for name, value in vars(node).items():
                if isinstance(value, nnx.Variable):
                    places.setdefault(id(value), []).append((*path, name))
    return {key: keys for keys in places.values() for key in keys}


def _path(kind: str, key: Any, pattern: bool) -> Path:
    path = [kind]
    for part in key:
        if isinstance(part, int):
            path[-1] += f"_{part}"
        else:
            path.append(str(part))
    if pattern and path[-1] == "pattern":
        path.pop()  # Linen keeps the coordinates beside each other in the layer
    return tuple(path)


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
