"""`LearnedPositions` for Flax Linen."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from bsjax import _decoding, _positions
from bsjax._positions import LAYER


class LearnedPositions(nn.Module):
    """`x + embedding[positions]`: a learned row for each of `length` positions.

    As `bsjax.nnx.LearnedPositions`; `decode` and `ragged` as in `BlockAttention`.
    """

    length: int
    _: dataclasses.KW_ONLY
    embedding_init: Any = _positions.INIT
    dtype: Any = None
    param_dtype: Any = jnp.float32
    decode: bool = False
    ragged: bool = False

    @nn.compact
    def __call__(
        self, x: Any, *, input_positions: Any = None, kv_lengths: Any = None
    ) -> Float[Array, "*n t d"]:
        """As a call of `bsjax.nnx.LearnedPositions`."""
        x, at = jnp.asarray(x), input_positions
        shape = (self.length, x.shape[-1])
        table = self.param("embedding", self.embedding_init, shape, self.param_dtype)
        if self.decode and self.has_variable("cache", "cache_index"):
            index = self.get_variable("cache", "cache_index")
            next_ones, more = _decoding.coming(LAYER, index, x.shape[-2], kv_lengths)
            self.put_variable("cache", "cache_index", index + more)
            at = next_ones if at is None else at
        elif self.decode:  # `init` makes a cache, and does not decode
            lead = x.shape[:-2] if self.ragged else ()
            self.variable("cache", "cache_index", jnp.zeros, lead, jnp.int32)
        at = np.arange(x.shape[-2]) if at is None else at
        return _positions.added(x, table, at, self.dtype)
