"""Products on a mesh: which axes an array varies over, and tokens that stay where they are.

With automatic mesh axes XLA finds the placement by itself. With explicit axes placement is part of
the type, and inside shard_map so is what varies; the functions here see to both.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array


def varying(*arrays: Any) -> frozenset[str]:
    """The union of the manual mesh axes that arrays vary over (none outside shard_map)."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def vary(array: Array, axes: frozenset[str]) -> Array:
    """`array` cast to vary over `axes` too. The transpose is a sum over the devices of the cast."""
    missing = tuple(axes - varying(array))
    return lax.pcast(array, missing, to="varying") if missing else array


def zeros(x: Array, columns: int, dtype: Any) -> Array:
    """`[..., columns]` for the tokens of `x[..., features]`, placed as they are."""
    shape = (*x.shape[:-1], columns)
    (lead, axes), array = _token_axes(x), vary(jnp.zeros(shape, dtype), varying(x))
    return jax.sharding.reshard(array, lead) if axes else array


def per_token(run: Callable[..., Any], x: Array, weights: Any, *others: Array) -> Any:
    """`run(x[n, k], weights, *others) -> y[n, m]` (or several) with all leading axes of `x` and of
    the others as `n`, on every device's own tokens."""
    lead, axes = _token_axes(x)
    _require_whole(weights)

    def local(x: Array, weights: Any, *others: Array) -> Any:
        ys = run(_flat(x), weights, *map(_flat, others))
        return jax.tree.map(lambda y: y.reshape(*x.shape[:-1], y.shape[-1]), ys)

    if not axes:
        return local(x, weights, *others)
    return jax.shard_map(
        local,
        mesh=jax.typeof(x).sharding.mesh,
        in_specs=(lead, PartitionSpec(), *[lead] * len(others)),
        out_specs=lead,
        axis_names=axes,
    )(x, weights, *(jax.sharding.reshard(a, lead) for a in others))


def over_tokens(run: Callable[..., Array], x: Array, y: Array, weights: Any = ()) -> Array:
    """`run(x[n, k], y[n, m], weights) -> v`, a sum over tokens: each device's own, then all."""
    (lead, axes), (other, others) = _token_axes(x), _token_axes(y)
    _require_whole(weights)
    if not axes | others:
        return run(_flat(x), _flat(y), weights)
    lead, axes = (lead, axes) if axes else (other, others)
    x, y = (jax.sharding.reshard(a, lead) for a in (x, y))
    return jax.shard_map(
        lambda x, y, w: lax.psum(run(_flat(x), _flat(y), w), tuple(axes)),
        mesh=jax.typeof(x).sharding.mesh,
        in_specs=(lead, lead, PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names=axes,
    )(x, y, weights)


def on_each_device(
    run: Callable[..., Any], per_token: tuple[Array, ...], weights: tuple[Array, ...], rule: str
) -> Any:
    """`run(*per_token, *weights)`, a kernel, on every device's own tokens under automatic axes.

    XLA cannot look into a kernel: left to itself it gathers all tokens on every device. `rule`
    names the axes of all operands and of the result, as in an einsum; tokens are `n`. A result
    without them is a sum over devices. Under `vmap` tokens are not kept apart.
    """
    summed = "n" not in rule.split("->")[1]

    def partition(mesh: Any, operands: Any, result: Any) -> Any:
        first = [a.sharding.spec[0] for a in operands[: len(per_token)] if a.sharding.spec]
        axes = next((axis for axis in first if axis is not None), None)
        own, whole = (NamedSharding(mesh, PartitionSpec(a)) for a in (axes, None))

        def local(*args: Array) -> Any:
            return lax.psum(run(*args), axes) if summed and axes else run(*args)

        sharded = (own,) * len(per_token) + (whole,) * len(weights)
        out = whole if summed else own
        return mesh, local, jax.tree.map(lambda _: out, result), sharded

    whole = custom_partitioning(lambda *args: run(*args))
    whole.def_partition(partition, sharding_rule=rule)
    call = custom_vmap(lambda *args: whole(*args))

    @call.def_vmap
    def _(size: int, batched: Any, *args: Array) -> Any:
        axes = [0 if one else None for one in batched]
        outs = jax.vmap(run, axes, axis_size=size)(*args)
        return outs, jax.tree.map(lambda _: True, outs)

    return call(*per_token, *weights)


def is_sharded(x: Array) -> bool:
    """Whether the tokens of `x[..., features]` lie over explicit mesh axes."""
    return bool(_token_axes(x)[1])


def take(x: Array, index: Array) -> Array:
    """Tokens `[s, features]` of `x[..., features]` by their number over all its leading axes, and
    zeros past the last. They lie over the mesh axes of x if these divide s, else on each device."""
    lead, _ = _token_axes(x)
    axes = tuple(a for axis in lead if axis for a in ((axis,) if isinstance(axis, str) else axis))
    mesh = jax.typeof(x).sharding.mesh
    over = axes if index.size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()
    place = PartitionSpec(over, None) if axes else None
    return _flat(x).at[index].get(mode="fill", fill_value=0, out_sharding=place)


def tokens(x: Array) -> int:
    """All leading axes as one number (-1 in a reshape would not do where features are empty)."""
    return math.prod(x.shape[:-1])


def _flat(x: Array) -> Array:
    return x.reshape(tokens(x), x.shape[-1])


def _token_axes(x: Array) -> tuple[PartitionSpec, set[str]]:
    """How the leading axes of `x[..., features]` are sharded, and over which explicit mesh axes."""
    spec = jax.typeof(x).sharding.spec
    *lead, features = (*spec, *[None] * (x.ndim - len(spec)))
    if features is not None:
        raise ValueError(
            f"the features of an activation are sharded over the mesh axis {features!r}, but a "
            "product needs them whole: reshard to shard tokens only, or cut the weights with "
            "bsjax.partition and use jax.shard_map."
        )
    named = [(axis,) if isinstance(axis, str) else axis for axis in lead if axis is not None]
    return PartitionSpec(*lead), {name for axis in named for name in axis}


def _require_whole(weights: Any) -> None:
    for leaf in jax.tree.leaves(weights):
        axes = [axis for axis in jax.typeof(leaf).sharding.spec if axis is not None]
        if axes:
            raise ValueError(
                f"values or coordinates are sharded over the mesh axis {axes[0]!r}, but a slot may "
                "belong to any block-column: replicate them, or cut the weights with "
                "bsjax.partition and use jax.shard_map."
            )
