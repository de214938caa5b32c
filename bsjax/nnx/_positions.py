"""`LearnedPositions` for Flax NNX."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from bsjax import _decoding, _positions
from bsjax._positions import LAYER


class LearnedPositions(nnx.Module):
    """`x + embedding[positions]`: a learned row of `features` for each of `length` positions.

    For the inputs of the first layer of a model. Positions are counted from 0, or given by
    `input_positions`. Decoding as in `BlockAttention`: `init_cache`, then calls with `decode=True`
    count on, those of each sequence if the cache is `ragged`. A position past the end is an error
    where it can be seen, and NaN where it is traced. After Vaswani et al. 2017, "Attention Is All
    You Need", section 3.5.
    """

    def __init__(
        self,
        length: int,
        features: int,
        *,
        embedding_init: Any = _positions.INIT,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        decode: bool | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype, self.decode = dtype, decode
        table = embedding_init(rngs.params(), (length, features), param_dtype)
        self.embedding = nnx.Param(table)
        self.cache_index: Any = nnx.data(None)

    def __call__(
        self,
        x: Any,
        *,
        input_positions: Any = None,
        kv_lengths: Any = None,
        decode: bool | None = None,
    ) -> Float[Array, "*n t d"]:
        """Of `x[..., positions, features]`; `input_positions` are `[positions]`, or for each
        sequence. `kv_lengths` as in decoding by a `BlockAttention`."""
        x, at = jnp.asarray(x), input_positions
        if self.decode if decode is None else decode:
            if self.cache_index is None:
                raise ValueError(
                    f"{LAYER}: there is no cache to decode with: call init_cache(input_shape) "
                    "first, with the shape of the whole sequence."
                )
            index = self.cache_index[...]
            next_ones, more = _decoding.coming(LAYER, index, x.shape[-2], kv_lengths)
            self.cache_index[...] = index + more
            at = next_ones if at is None else at
        elif at is None:
            at = np.arange(x.shape[-2])
        return _positions.added(x, self.embedding[...], at, self.dtype)

    def init_cache(
        self, input_shape: tuple[int, ...], dtype: Any = None, *, ragged: bool = False
    ) -> None:
        """Counts positions from 0 again. The arguments of `BlockAttention.init_cache`."""
        del dtype
        self.cache_index = nnx.Cache(jnp.zeros(input_shape[:-2] if ragged else (), jnp.int32))
