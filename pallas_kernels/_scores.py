"""What becomes of `q k^T` in the attention kernels: scale, cap, bias, mask and dropout.

Scores are kept in the units in which they come out of the tensor cores as long as nothing but a
positive scale is asked for: `exp2(s * factor - m)` is then one multiply-add before the exponential.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

LOG2E = math.log2(math.e)

type OfIndices = Callable[[Any, Any, Any], Any]


class Dropout(NamedTuple):
    """`kept(first, second, key)` of words `[n, h, q]` of each query, on arrays of equal shape."""

    kept: OfIndices
    rate: float


class Data(NamedTuple):
    """Arrays in global memory that scores depend on, as far as there are: `slots` are those of the
    lists, `arrays` masks by slot, `numbers` a bias of each slot, `words` those of a dropout."""

    slots: Any = None
    lengths: Any = None
    segments: Any = None  # of queries and of keys
    arrays: Any = ()
    numbers: Any = None
    words: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """`s = softcap * tanh(q k^T * scale / softcap) + bias`, or -inf where something forbids it.

    `mask(head, q_index, k_index)`, on index arrays of equal shape, is traced into the kernels, and
    so is `bias`. Keys from `keys` on do not exist (they fill a last block), nor those from
    `lengths[n]` on; tokens of different `segments` do not see each other; there are so many masks
    by slot, `arrays`. All this is asked in partial blocks only. With `numbers` every stored block
    has a bias of its own. A `dropout` drops weights, not what they are divided by.
    """

    scale: float
    softcap: float | None = None
    mask: OfIndices | None = None
    keys: int | None = None
    lengths: bool = False
    segments: bool = False
    arrays: int = 0
    bias: OfIndices | None = None
    numbers: bool = False
    dropout: Dropout | None = None

    @property
    def masked(self) -> bool:
        """Whether partial blocks differ from full ones."""
        data = self.lengths or self.segments or self.keys is not None or self.arrays > 0
        return data or self.mask is not None

    @property
    def biased(self) -> bool:
        """Whether something is added to scores."""
        return self.bias is not None or self.numbers

    @property
    def everywhere(self) -> bool:
        """Whether full blocks need to know where they are."""
        return self.biased or self.dropout is not None

    @property
    def by_slot(self) -> bool:
        """Whether it matters where a block is stored."""
        return self.arrays > 0 or self.numbers

    @property
    def apart(self) -> bool:
        """Whether dq needs weights and the slope of scores each by itself: numbers by slot are
        added behind a softcap."""
        return self.numbers and self.softcap is not None

    @property
    def crowded(self) -> bool:
        """Whether they take many registers."""
        many = self.everywhere or self.arrays > 0 or self.segments
        return many or (self.masked and self.softcap is not None)

    @property
    def unit(self) -> float:
        """Of what `of` returns, in exponents of two."""
        if self.softcap is not None:
            return self.softcap * LOG2E
        return self.scale * LOG2E if self.scale > 0 else LOG2E

    @property
    def factor(self) -> float:
        """Of scores, biased or not, to be the exponent of two."""
        return 1.0 if self.biased else self.unit

    @property
    def spread(self) -> float:
        """What weights that are kept are multiplied by."""
        return 1 if self.dropout is None else 1 / (1 - self.dropout.rate)

    def of(self, products: Array) -> Array:
        """Over `unit`, before anything is added or masked."""
        if self.softcap is not None:
            return _tanh(products * (self.scale / self.softcap))
        return products if self.scale > 0 else products * self.scale

    def slope(self, scores: Array) -> Array | float:
        """Of the scores by the products, over the `scale`; `scores` are those of `of`."""
        return 1.0 if self.softcap is None else 1 - scores * scores

    def thinned(self, gradient: Array, weights: Array) -> Array:
        """The gradient of weights, from that of what is kept of them: dropped ones are negative."""
        if self.dropout is None:
            return gradient
        return jnp.where(weights > 0, gradient * self.spread, 0.0)

    def whole(self, weights: Array) -> Array:
        """Weights, dropped or not."""
        return weights if self.dropout is None else jnp.abs(weights)

    def data(self, arrays: Any) -> Data:
        """The arrays by their names, in the order in which they are passed."""
        left = list(arrays)

        def take(yes: bool) -> Any:
            return left.pop(0) if yes else None

        slots, lengths = take(self.by_slot), take(self.lengths)
        segments = (take(True), take(True)) if self.segments else None
        masks = tuple(take(True) for _ in range(self.arrays))
        numbers, words = take(self.numbers), take(self.dropout is not None)
        return Data(slots, lengths, segments, masks, numbers, words)


def _tanh(x: Array) -> Array:
    """By the exponential: the instruction for it has 11 bits."""
    return 1 - 2 / (1 + jnp.exp2(x * (2 * LOG2E)))
