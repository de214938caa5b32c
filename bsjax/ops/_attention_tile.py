"""One tile of attention: a block of queries against a block of keys. What every implementation
over stored blocks computes, in one place: scores, what is masked, and what is dropped."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from bsjax.ops import _attention_dropout as _dropout
from bsjax.ops import _mesh
from bsjax.ops._hoist import Hoisted
from bsjax.ops._reference import accumulator


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """The static part of an attention."""

    name: str
    grid: tuple[int, int]
    block: tuple[int, int]
    lengths: tuple[int, int]  # queries and keys
    scale: float
    softcap: float | None
    dropout_rate: float
    masks: tuple[Hoisted, ...]
    bias: Hoisted | None


class Operands(NamedTuple):
    """What is differentiated."""

    q: Float[Array, "n q h d"]
    k: Float[Array, "n s g d"]
    v: Float[Array, "n s g f"]
    bias: Float[Array, "#n #h #e #br #bc"] | None  # per slot
    bias_consts: list[Array]  # floating-point numbers that the function `bias` closes over
    sinks: Float[Array, " h"] | None


class Fixed(NamedTuple):
    """What is not. One pattern, one for each head, or one for each batch element and head."""

    row: Int32[Array, "#n #h e"]
    col: Int32[Array, "#n #h e"]
    full: Bool[Array, "#n #h e"] | None  # slots in which the masks are known to be true
    masks: list[Bool[Array, "#n #h #e #br #bc"]]  # per slot
    mask_consts: list[list[Any]]  # of each function
    bias_consts: list[Any]  # those that are no floating-point numbers, None for the others
    q_segments: Int32[Array, "n q"] | None
    kv_segments: Int32[Array, "n s"] | None
    kv_lengths: Int32[Array, " n"] | None
    seeds: Int32[Array, "n h 2"] | None  # of a dropout


class Tile(NamedTuple):
    """Where a tile is: the batch element, the head, the slot and its block."""

    n: Any
    h: Any
    slot: Any
    row: Any
    col: Any


def sizes(spec: Spec, x: Operands) -> tuple[int, int, int]:
    """Batch elements, heads, and query heads to each head of keys."""
    return x.q.shape[0], x.q.shape[2], x.q.shape[2] // x.k.shape[2]


def own(a: Array, at: Tile) -> Array:
    """The part of `a[#n, #h, ...]` that belongs to a head of a batch element."""
    return a[at.n if a.shape[0] > 1 else 0, at.h if a.shape[1] > 1 else 0]


def read(a: Array, n: Any, block: Any, size: int, h: Any) -> Array:
    """`size` positions of one head: `[size, d]`, in what sums are kept in."""
    piece = lax.dynamic_slice(a, index(n, block * size, h, 0), (1, size, 1, a.shape[3]))
    return piece[0, :, 0].astype(accumulator(a))


def index(*places: Any) -> tuple[Array, ...]:
    """Of one dtype, also where 64-bit numbers are switched on."""
    return tuple(jnp.asarray(i, jnp.int32) for i in places)


def per_slot(a: Array, at: Tile) -> Array:
    """The part `[#br, #bc]` of an array per slot."""
    return lax.dynamic_slice(a, _place(a, at), (1, 1, 1, *a.shape[3:]))[0, 0, 0]


def add_per_slot(a: Array, part: Array, at: Tile) -> Array:
    """`a`, with `part` added to what `per_slot` reads."""
    place = _place(a, at)
    old = lax.dynamic_slice(a, place, (1, 1, 1, *a.shape[3:]))
    return lax.dynamic_update_slice(a, old + part[None, None, None], place)


def _place(a: Array, at: Tile) -> tuple[Array, ...]:
    shared = zip((at.n, at.h, at.slot), a.shape[:3], strict=True)
    return index(*(i if size > 1 else 0 for i, size in shared), 0, 0)


def positions(spec: Spec, at: Tile) -> tuple[Int32[Array, "br 1"], Int32[Array, "1 bc"]]:
    """Of the queries and of the keys."""
    br, bc = spec.block
    q = at.row * br + lax.broadcasted_iota(jnp.int32, (br, 1), 0)
    return q, at.col * bc + lax.broadcasted_iota(jnp.int32, (1, bc), 1)


def visible(spec: Spec, p: Fixed, at: Tile) -> Bool[Array, "br bc"] | None:
    """Which keys each query sees, or None: all of them."""
    q, k = positions(spec, at)
    found = []
    if spec.lengths[1] % spec.block[1]:
        found.append(k < spec.lengths[1])
    if p.kv_lengths is not None:
        found.append(k < p.kv_lengths[at.n])
    if p.q_segments is not None and p.kv_segments is not None:
        br, bc = spec.block
        ours = lax.dynamic_slice(p.q_segments, index(at.n, at.row * br), (1, br))
        theirs = lax.dynamic_slice(p.kv_segments, index(at.n, at.col * bc), (1, bc))
        found.append(theirs == ours.T)
    if spec.masks or p.masks:
        found.append(_unless_full(spec, p, at, q, k))
    return functools.reduce(jnp.logical_and, found) if found else None


def _unless_full(spec: Spec, p: Fixed, at: Tile, q: Array, k: Array) -> Bool[Array, "br bc"]:
    axes = _mesh.varying(*jax.tree.leaves(p))

    def alike(a: Array) -> Array:
        return _mesh.vary(a, axes)

    def evaluate() -> Array:
        found = [f.anywhere(c, at.h, q, k) for f, c in zip(spec.masks, p.mask_consts, strict=True)]
        found += [per_slot(a, at) for a in p.masks]
        return alike(jnp.broadcast_to(functools.reduce(jnp.logical_and, found), spec.block))

    if p.full is None:
        return evaluate()
    return lax.cond(own(p.full, at)[at.slot], lambda: alike(jnp.ones(spec.block, bool)), evaluate)


def dropout(spec: Spec, p: Fixed, at: Tile) -> Float[Array, "br bc"] | None:
    """What each probability is multiplied by: 0, or 1 over the share that is kept."""
    if p.seeds is None:
        return None
    q, k = positions(spec, at)
    kept = _dropout.kept(*_dropout.words(p.seeds[at.n, at.h], q), k, spec.dropout_rate)
    return jnp.where(kept, jnp.float32(1 / (1 - spec.dropout_rate)), 0)


def bias_of(spec: Spec, floats: list[Any], others: list[Any], h: Any, q: Array, k: Array) -> Array:
    """The function `bias` at these positions."""
    assert spec.bias is not None
    floats = iter(floats)  # pyright: ignore[reportAssignmentType]
    consts = [next(floats) if other is None else other for other in others]  # pyright: ignore
    return spec.bias.anywhere(consts, h, q, k)


def scores(
    spec: Spec, p: Fixed, at: Tile, seen: Array | None, q: Array, k: Array, bias: Any, consts: Any
) -> Float[Array, "br bc"]:
    """The scores of a tile of queries `q[br, d]` and keys `k[bc, d]`: -inf where not seen."""
    s = dot(q, k, 1, 1) * jnp.asarray(spec.scale, q.dtype)
    if spec.softcap is not None:
        s = spec.softcap * jnp.tanh(s / spec.softcap)
    if bias is not None:
        s = s + bias
    if spec.bias is not None:
        s = s + bias_of(spec, consts, p.bias_consts, at.h, *positions(spec, at)).astype(s.dtype)
    return s if seen is None else jnp.where(seen, s, -jnp.inf)


def dot(a: Array, b: Array, over_a: int, over_b: int) -> Array:
    """A full-precision product that contracts one axis of each."""
    return lax.dot_general(
        a, b, (((over_a,), (over_b,)), ((), ())), precision=lax.Precision.HIGHEST
    )
