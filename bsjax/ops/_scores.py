"""What scores are read from: all of an axis, or a slice of it that costs next to nothing."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bsjax.ops import _mesh

FLOOR = 0.1  # Adelman et al. mix their probabilities as 0.9 p + 0.1 / groups


class Reader(NamedTuple):
    """Norms over `length` neighbours from a random start, or over all where it is None.

    A group may be zero in the slice and not elsewhere. With a share of every budget spread evenly,
    each is taken with a probability of at least `FLOOR t / groups` (with replacement, in each
    draw), so that estimates stay unbiased and no weight exceeds `groups / (FLOOR t)`.
    """

    length: int | None = None
    key: Any = None

    def tokens(self, x: Float[Array, "*n k"], at: int) -> Array:
        """Neighbouring tokens; `at` tells the slices of one sample apart."""
        n = _mesh.tokens(x)
        if self.length is None or self.length >= n:
            return x
        start = self._start(n, at)
        if _mesh.is_sharded(x):
            return _mesh.take(x, start + jnp.arange(self.length, dtype=jnp.int32))
        return lax.dynamic_slice_in_dim(x.reshape(n, x.shape[-1]), start, self.length)

    def features(self, x: Float[Array, "*n k"], at: int) -> Array:
        """Neighbouring features of every token."""
        k = x.shape[-1]
        if self.length is None or self.length >= k:
            return x
        return lax.dynamic_slice_in_dim(x, self._start(k, at), self.length, x.ndim - 1)

    def mixed(self, scores: Float[Array, " g"]) -> Float[Array, " g"]:
        """Scores of which none is zero, if they are estimates. Where all are, all are equal."""
        if self.length is None:
            return scores
        top = scores.max()
        scores = scores / jnp.where(top == 0, 1, top)  # a sum of norms could overflow
        return (1 - FLOOR) * scores / jnp.maximum(1, scores.sum()) + FLOOR / scores.size

    def _start(self, size: int, at: int) -> Array:
        assert self.length is not None
        key = jax.random.fold_in(self.key, at)
        return jax.random.randint(key, (), 0, size - self.length + 1, jnp.int32)
