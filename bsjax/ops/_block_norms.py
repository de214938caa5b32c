"""`block_norms`: how large each block of a dense gradient is, without forming it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bsjax.ops import _mesh, _reference
from bsjax.ops import _validate as validate
from bsjax.pattern._validate import pair, size


def block_norms(
    x: Any, dy: Any, block: int | tuple[int, int], *, key: Array, rank: int = 8
) -> Float[Array, "r c"]:
    """Estimate `||x^T dy||_F` of every block `(br, bc)` of the dense gradient, in float32.

    Each block-row of features is projected by a random `R[br, rank]` and each block-column by
    `Q[bc, rank]`, with N(0, 1 / rank) entries, and `M = (x R)^T (dy Q)` is `rank x rank` per block:
    `E ||M||_F^2 = ||x^T dy||_F^2`. The cost is `(rank / b)^2` of the dense gradient. A side that is
    not longer than `rank` is used as it is, so `rank >= max(block)` is exact.

    Leading axes of `x[..., k]` and `dy[..., m]` are summed over. This is the score by which
    patterns grow; it has no derivative. After the block-reduced gradient of Gray, Radford and
    Kingma 2017, whose norm products are replaced here by a random sketch, which sees cancellation.
    """
    op = "block_norms"
    x, dy = validate.array(op, "x", x), validate.array(op, "dy", dy)
    br, bc = pair(op, "block", block)
    rank = size(op, "rank", rank, least=1)
    key = validate.key(op, key)
    for name, array, side in (("x", x, br), ("dy", dy, bc)):
        if array.ndim == 0 or array.shape[-1] % side:
            raise ValueError(
                f"{op}: the features of `{name}`, shape {array.shape}, must be a multiple of the "
                f"block side {side}: pad them with zeros."
            )
    validate.same_lead(op, x, dy, "dy")
    x, dy = jax.lax.stop_gradient((x, dy))
    left, right = jax.random.split(key)
    sides = (br, bc)
    projections = _projection(x, br, rank, left), _projection(dy, bc, rank, right)

    def sketch(x: Array, dy: Array, projections: Any) -> Float[Array, "r a c b"]:
        left, right = (
            _project(a, side, q) for a, side, q in zip((x, dy), sides, projections, strict=True)
        )
        return jnp.einsum("nra,ncb->racb", left, right, precision="highest")

    m = _mesh.over_tokens(sketch, x, dy, projections)
    return jnp.sqrt(jnp.square(m).sum((1, 3))).astype(jnp.float32)


def _projection(x: Array, side: int, rank: int, key: Array) -> Float[Array, "b side rank"] | None:
    """One random projection per block, or None where a side is short enough to be used as it is."""
    if rank >= side:
        return None
    shape, dtype = (x.shape[-1] // side, side, rank), _reference.accumulator(x)
    return jax.random.normal(key, shape, dtype) / jnp.asarray(rank, dtype) ** 0.5


def _project(x: Array, side: int, projection: Array | None) -> Float[Array, "n b rank"]:
    blocks = x.astype(_reference.accumulator(x)).reshape(x.shape[0], x.shape[1] // side, side)
    if projection is None:
        return blocks
    return jnp.einsum("nbs,bsr->nbr", blocks, projection, precision="highest")
