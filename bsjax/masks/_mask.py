"""`Mask`: a function of indices that also knows which blocks it touches, and which it fills."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from bsjax.pattern import BlockPattern, is_concrete
from bsjax.pattern._validate import pair


class Spans(NamedTuple):
    """The first and the last position of every query block `[r, 1]` and key block `[1, c]`."""

    q0: Any
    q1: Any
    k0: Any
    k1: Any

    @property
    def least(self) -> Any:
        """The least difference `q - k` in a block."""
        return self.q0 - self.k1

    @property
    def most(self) -> Any:
        """The largest one."""
        return self.q1 - self.k0


class Mask:
    """Which keys a query sees: `mask(head, q_index, k_index) -> bool` on index arrays.

    `blocks` says of every block whether the mask may be true somewhere in it and whether it is
    true everywhere, from arithmetic on its corners and not from its elements. `&`, `|` and `~`
    combine masks. What `blocks` says of a combination may be cautious, never wrong: a block that is
    stored in vain, a full one that is not known to be full.
    """

    def __init__(
        self, see: Callable[..., Any], blocks: Callable[[Spans], tuple[Any, Any]], name: str
    ) -> None:
        self._see, self._blocks, self._name = see, blocks, name

    def __call__(self, head: Any, q_index: Any, k_index: Any) -> Any:
        return self._see(head, q_index, k_index)

    def __repr__(self) -> str:
        return self._name

    def __and__(self, other: "Mask") -> "Mask":
        return _both(self, other, "&")

    def __or__(self, other: "Mask") -> "Mask":
        return _both(self, other, "|")

    def __invert__(self) -> "Mask":
        def blocks(at: Spans) -> tuple[Any, Any]:
            some, full = self._blocks(at)
            return ~full, ~some

        return Mask(lambda *at: ~self(*at), blocks, f"~{self}")

    def blocks(self, lengths: Any, block: Any) -> tuple[Any, Any]:
        """`(some, full)`, bool `[r, c]`: where the mask may hold somewhere, and holds everywhere.

        `lengths` are the numbers of queries and of keys, `block` is `b` or `(br, bc)`, and the grid
        is `(ceil(q / br), ceil(s / bc))`. With one mask per head both are `[h, r, c]`. They are
        NumPy arrays, unless the mask was made from a traced one.
        """
        (q, s), (br, bc) = (
            pair("Mask.blocks", "lengths", lengths, least=0),
            pair("Mask.blocks", "block", block),
        )
        q0, k0 = np.arange(0, q, br)[:, None], np.arange(0, s, bc)[None]
        q1, k1 = np.minimum(q0 + br, q) - 1, np.minimum(k0 + bc, s) - 1
        shape = (math.ceil(q / br), math.ceil(s / bc))
        some, full = self._blocks(Spans(q0, q1, k0, k1))

        def whole(a: Any) -> Any:
            xp = np if is_concrete(a) else jnp
            return xp.broadcast_to(a, (*a.shape[:-2], *shape))

        return whole(some), whole(full)

    def pattern(
        self, lengths: Any, block: Any, *, capacity: int | None = None, only: Any = None
    ) -> tuple[BlockPattern, Bool[Array, "*h e"]]:
        """`(p, full)`: the blocks that the mask needs, and the slots in which it holds everywhere.

        Give both and the mask to `bsjax.attention`. `only[r, c]` leaves out all other blocks, such
        as those that `bsjax.patterns.bigbird` does not store. `capacity` makes room for more, and
        must be given where the mask was made from a traced array.
        """
        some, full = self.blocks(lengths, block)
        if only is not None:
            only = np.asarray(only) if is_concrete(only) else only
            if only.dtype != np.bool_ or only.shape[-2:] != some.shape[-2:]:
                raise ValueError(
                    f"Mask.pattern: `only` must be bool of shape {some.shape[-2:]}, the grid of "
                    f"these lengths and blocks, got {only.dtype} of shape {only.shape}."
                )
            some = some & only
        shape = np.broadcast_shapes(some.shape, full.shape)
        if some.ndim == 2:
            p = BlockPattern.from_mask(some, block, capacity=capacity)
        else:  # one for each head, of equal capacity
            if capacity is None and is_concrete(some):
                capacity = int(some.sum((-1, -2)).max(initial=0))
            each = [BlockPattern.from_mask(one, block, capacity=capacity) for one in some]
            p = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        full = (np if is_concrete(full) else jnp).broadcast_to(full, shape)
        return p, _flags(full, p)


def _flags(full: Any, p: BlockPattern) -> Array:
    """`full[..., r, c]` of every slot; False for a spare one."""
    row, col = p.row, p.col
    head = () if row.ndim == 1 else (np.arange(row.shape[0])[:, None],)
    if not is_concrete(full, row, col):
        full = jnp.asarray(full)
        return full.at[(*head, row, col)].get(mode="fill", fill_value=False)
    row, col = np.asarray(row), np.asarray(col)
    full = np.pad(full, (*((0, 0),) * len(head), (0, 1), (0, 1)))  # where spare slots are
    with jax.ensure_compile_time_eval():
        return jnp.asarray(full[(*head, row, col)])


def _both(a: Mask, b: Mask, sign: str) -> Mask:
    if not isinstance(b, Mask):
        raise TypeError(
            f"bsjax.masks: `{sign}` combines two masks, got {type(b).__name__} on the right: for a "
            "function of your own, pass `mask=(mask, function)` to bsjax.attention."
        )
    join = (lambda x, y: x & y) if sign == "&" else (lambda x, y: x | y)

    def blocks(at: Spans) -> tuple[Any, Any]:
        some, full = zip(a._blocks(at), b._blocks(at), strict=True)
        return join(*_ranks(*some)), join(*_ranks(*full))

    return Mask(lambda *at: join(a(*at), b(*at)), blocks, f"({a} {sign} {b})")


def _ranks(a: Any, b: Any) -> tuple[Any, Any]:
    """Of equal rank: one of them may be per head."""
    if a.ndim < b.ndim:
        return a[None], b
    return (a, b[None]) if b.ndim < a.ndim else (a, b)


def per_head(masks: Sequence[Mask]) -> Mask:
    """Mask `i` for head `i`: patterns with leaves `[h, e]`, of equal capacity."""
    masks = tuple(masks)
    if not masks or not all(isinstance(one, Mask) for one in masks):
        raise TypeError(
            "per_head: expected a sequence of masks, one for each head, got "
            f"{[type(one).__name__ for one in masks]}."
        )

    def see(head: Any, q: Any, k: Any) -> Any:
        found = False
        for i, one in enumerate(masks):
            found = found | ((head == i) & one(i, q, k))
        return found

    def blocks(at: Spans) -> tuple[Any, Any]:
        each = [one._blocks(at) for one in masks]
        shape = (at.q0.shape[0], at.k0.shape[1])
        some, full = ([_stacked(one, shape) for one in ones] for ones in zip(*each, strict=True))
        xp = np if all(map(is_concrete, (*some, *full))) else jnp
        return xp.stack(some), xp.stack(full)

    return Mask(see, blocks, f"per_head({list(masks)})")


def _stacked(a: Any, shape: tuple[int, int]) -> Any:
    if a.ndim > 2:
        raise TypeError("per_head: one of the masks is itself one for each head.")
    return (np if is_concrete(a) else jnp).broadcast_to(a, shape)
