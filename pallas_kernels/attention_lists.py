"""Which blocks attend to which, as the attention kernels walk them: tables, made on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.attention_config import Config
from pallas_kernels.lists import pointers

AHEAD = 4  # so many tiles for each worker are sorted by their length


class Lists(NamedTuple):
    """Blocks on the other side of each block, those that need no mask first.

    There is one list for all, or one for each head, or for each batch element and head.
    """

    ptr: Array  # int32 [lists, 2 * blocks + 1]: where full blocks begin, then partial ones, ...
    other: Array  # int32 [lists, e]: the block on the other side
    slot: Array | None = None  # int32 [lists, e]: where the pair is stored, if that matters


def of_pattern(
    own: Array, other: Array, partial: Array, grid: tuple[int, int], *, slots: bool = False
) -> Lists:
    """Of coordinates `[lists, e]` in any order, with `grid` (own blocks, other blocks).

    Spare slots have `own` past the end. `partial` says which stored blocks need the mask. With
    `slots` lists say where each pair is.
    """
    blocks, others = grid
    key = (2 * jnp.minimum(own, blocks) + partial.astype(jnp.int32)) * others
    key, slot = key + jnp.minimum(other, others - 1), None
    if slots:
        each = lax.broadcasted_iota(jnp.int32, key.shape, key.ndim - 1)
        key, slot = lax.sort((key, each), num_keys=1)
    else:
        key = jnp.sort(key, axis=-1)
    ptr = jax.vmap(lambda kind: pointers(kind, 2 * blocks))(key // others)
    return Lists(ptr, key % others, slot)


def ordered(steps: Array, workers: int) -> Array:
    """In which order to work on tiles of so many `steps` `[heads, tiles]`, for workers that take
    every `workers`-th each: long ones first, but few heads at a time, so that a cache holds their
    keys and values. Every other round goes backwards: who had the longest has the shortest next.
    """
    count = steps.size
    place = jnp.arange(count, dtype=jnp.int32)
    most = jnp.max(steps, initial=0)
    key = place // (AHEAD * workers) * (most + 1) + most - steps.reshape(count)
    sorted_ = jnp.argsort(key, stable=True).astype(jnp.int32)
    first = place // workers * workers
    back = (place // workers % 2 == 1) & (first + workers <= count)
    return sorted_[jnp.where(back, 2 * first + workers - 1 - place, place)]


def order(lists: Lists, config: Config, n: int, heads: int, queries: int, side: int) -> Array:
    """Of the tiles of a kernel, in blocks of `side` tokens and so many `heads` of `n` batch
    elements. If these are heads of keys, lists are those of all heads of `queries`."""
    steps = jnp.diff(lists.ptr[:, ::2])  # of each block
    steps = jnp.repeat(steps, side // config.rows, axis=1)
    known, tiles = steps.shape
    each = min(known, n * heads // config.heads)
    if known in (queries, n * queries) and known > 1:  # what all that share keys take
        each = known * heads // queries
    steps = jnp.sum(steps.reshape(each, known // each, tiles), axis=1, dtype=jnp.int32)
    return ordered(jnp.tile(steps, (n * heads // config.heads // each, 1)), config.workers)
