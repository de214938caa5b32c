"""Attention on a mesh: every device has its own batch elements, what all share is summed.

Left to itself XLA gathers all queries and keys on every device, because loops read them by index.
Heads are not kept apart: shard them with `jax.shard_map`.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from bsjax.ops import _core, _mesh
from bsjax.ops._attention_tile import Fixed, Operands


def over_batch(run: Callable[..., Any], x: Operands, p: Fixed, *others: Any) -> Any:
    """`run(x, p, *others)`: with `others`, which are `[n, ...]`, the gradients of `x`, and without
    them arrays `[n, ...]`."""
    flags = (*_own(x, p), *(True for _ in others))
    own, tree = jax.tree.leaves(flags), jax.tree.structure((x, p, *others))
    leaves = jax.tree.leaves((x, p, *others))
    # the gradients of x, or the result and a number for each query
    outs, ranks = (x, [a.ndim for a in jax.tree.leaves(x)]) if others else ((0, 0), [4, 3])
    shared = [not yes for yes in jax.tree.leaves(flags[0])] if others else [False, False]
    lead = jax.typeof(x.q).sharding.spec[:1]
    explicit = lead[0] if lead else None

    def flat(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(run(*tree.unflatten(leaves)))

    def local(axes: Any) -> Callable[..., Any]:
        def summed(*leaves: Any) -> list[Any]:
            outs = zip(flat(*_core.same_axes(*leaves)), shared, strict=True)
            return [lax.psum(a, axes) if one and axes else a for a, one in outs]

        return summed

    if x.q.shape[0] == 1 or jax.device_count() == 1 or _mesh.varying(*leaves):
        found = flat(*leaves)
    elif explicit:
        axes = (explicit,) if isinstance(explicit, str) else tuple(explicit)
        specs = [PartitionSpec(explicit) if yes else PartitionSpec() for yes in own]
        found = jax.shard_map(
            local(axes),
            mesh=jax.typeof(x.q).sharding.mesh,
            in_specs=tuple(specs),
            out_specs=[PartitionSpec() if one else PartitionSpec(explicit) for one in shared],
            axis_names=set(axes),
        )(*(jax.sharding.reshard(a, spec) for a, spec in zip(leaves, specs, strict=True)))
    else:
        found = _automatic(flat, local, leaves, own, shared, ranks)
    return jax.tree.unflatten(jax.tree.structure(outs), found)


def _automatic(
    flat: Any, local: Any, leaves: list[Any], own: list[bool], shared: list[bool], ranks: list[int]
) -> list[Any]:
    def partition(mesh: Any, operands: Any, results: Any) -> Any:
        first = operands[0].sharding.spec
        axes = first[0] if first else None
        ours, whole = (NamedSharding(mesh, PartitionSpec(a)) for a in (axes, None))
        given = tuple(ours if yes else whole for yes in own)
        return mesh, local(axes), [whole if one else ours for one in shared], given

    names = (f"a{i}" for i in itertools.count())

    def axes_of(ranks: list[int], batched: list[bool]) -> str:
        return ", ".join(
            " ".join(["n"] * yes + [next(names) for _ in range(rank - yes)])
            for rank, yes in zip(ranks, batched, strict=True)
        )

    given, results = axes_of([a.ndim for a in leaves], own), axes_of(ranks, [not a for a in shared])
    rule = f"{given} -> {results}"
    whole = custom_partitioning(lambda *leaves: flat(*leaves))
    whole.def_partition(partition, sharding_rule=rule)
    call = custom_vmap(lambda *leaves: whole(*leaves))

    @call.def_vmap
    def _(size: int, batched: Any, *leaves: Any) -> Any:
        outs = jax.vmap(flat, [0 if yes else None for yes in batched], axis_size=size)(*leaves)
        return outs, [True] * len(outs)

    return call(*leaves)


def _own(x: Operands, p: Fixed) -> tuple[Any, Any]:
    """Which arrays have an axis of batch elements."""
    n = x.q.shape[0]

    def per_slot(tree: Any) -> Any:
        return jax.tree.map(lambda a: a.shape[0] == n, tree)

    def all_of(tree: Any, yes: bool) -> Any:
        return jax.tree.map(lambda _: yes, tree)

    differentiated = all_of(x, False)._replace(q=True, k=True, v=True, bias=per_slot(x.bias))
    kept = Fixed(
        row=per_slot(p.row),
        col=per_slot(p.col),
        full=per_slot(p.full),
        masks=per_slot(p.masks),
        mask_consts=all_of(p.mask_consts, False),
        bias_consts=all_of(p.bias_consts, False),
        q_segments=all_of(p.q_segments, True),
        kv_segments=all_of(p.kv_segments, True),
        kv_lengths=all_of(p.kv_lengths, True),
        seeds=all_of(p.seeds, True),
    )
    return differentiated, kept
