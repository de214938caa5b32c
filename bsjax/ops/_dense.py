"""The products by way of the dense matrix: what `auto` runs where so many blocks are stored that
leaving the others out does not pay."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from bsjax.ops import _reference
from bsjax.ops._reference import sddmm as sddmm
from bsjax.pattern import BlockPattern


def todense(values: Float[Array, "e br bc"], p: BlockPattern) -> Float[Array, "k m"]:
    """`S[k, m]`, by a gather that knows for every block which slot it is, if any: three times as
    fast on a CPU as the scatter that the reference is."""
    (r, c), (br, bc), e = p.grid, p.block, p.capacity
    if not e:
        return jnp.zeros(p.shape, values.dtype)
    slot = (
        jnp.full((r, c), e, jnp.int32)
        .at[p.row, p.col]
        .set(jnp.arange(e, dtype=jnp.int32), mode="drop")
    )
    blocks = jnp.where(slot[:, :, None, None] < e, values.at[slot].get(mode="clip"), 0)
    return blocks.swapaxes(1, 2).reshape(r * br, c * bc)


def matmul(
    x: Float[Array, "n i"], values: Float[Array, "e br bc"], p: BlockPattern, **options: Any
) -> Float[Array, "n o"]:
    """`x @ S`, or `x @ S^T`."""
    return _reference.dense_product(x, todense(values, p), **options)
