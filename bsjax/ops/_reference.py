"""What each operation means: dense, plain autodiff, no speed. This is the law for the others.

The axis glossary. A letter means one thing in the whole library.

n          tokens (all leading axes of x, flattened)
k, m       features in, features out:  y[n, m] = x[n, k] @ S[k, m]
br, bc     sides of one block
r, c       block-rows and block-columns of S:  k == r * br,  m == c * bc
e          slots, ordered by block-column, then by block-row
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bsjax.pattern import BlockPattern


def todense(values: Float[Array, "e br bc"], p: BlockPattern) -> Float[Array, "k m"]:
    """`S[k, m]`: zero but for the stored blocks. Spare slots are dropped."""
    (r, c), (br, bc) = p.grid, p.block
    blocks = jnp.zeros((r, c, br, bc), values.dtype).at[p.row, p.col].add(values, mode="drop")
    return blocks.swapaxes(1, 2).reshape(r * br, c * bc)


def fromdense(array: Float[Array, "k m"], p: BlockPattern) -> Float[Array, "e br bc"]:
    """The stored blocks of `array[k, m]`; zeros in spare slots."""
    (r, c), (br, bc) = p.grid, p.block
    blocks = array.reshape(r, br, c, bc).swapaxes(1, 2)
    return blocks.at[p.row, p.col].get(mode="fill", fill_value=0)


def matmul(
    x: Float[Array, "n i"],
    values: Float[Array, "e br bc"],
    p: BlockPattern,
    *,
    transpose: bool,
    precision: Any,
    out_dtype: Any,
) -> Float[Array, "n o"]:
    """`x @ S`, or `x @ S^T`."""
    options = {"transpose": transpose, "precision": precision, "out_dtype": out_dtype}
    return dense_product(x, todense(values, p), **options)


def dense_product(
    x: Float[Array, "n i"],
    w: Float[Array, "k m"],
    *,
    transpose: bool,
    precision: Any,
    out_dtype: Any,
) -> Float[Array, "n o"]:
    """`x @ w`, or `x @ w^T`."""
    return jax.lax.dot_general(
        x,
        w,
        (((1,), (1 if transpose else 0,)), ((), ())),
        precision=precision,
        preferred_element_type=accumulator(x, w),
    ).astype(out_dtype)


def sddmm(
    x: Float[Array, "n k"],
    y: Float[Array, "n m"],
    p: BlockPattern,
    *,
    precision: Any,
    out_dtype: Any,
) -> Float[Array, "e br bc"]:
    """The stored blocks of `x^T y`."""
    dense = jax.lax.dot_general(
        x,
        y,
        (((0,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=accumulator(x, y),
    )
    return fromdense(dense, p).astype(out_dtype)


def sampled_matmul(
    x: Float[Array, "*n k"], w: Float[Array, "k m"], weights: Float[Array, " i"], policy: str
) -> Float[Array, "*n m"]:
    """`sum_i weights_i x_i w_i`, over features; with policy "weight" `x @ w`, and the gradient of w
    is `sum_i weights_i x_i dy_i`, over tokens (which autodiff differentiates once only)."""
    kept = accumulator(x, w)
    wide, w, weights = (a.astype(kept) for a in (x, w, weights))

    def product(x: Array, w: Array) -> Array:
        return jnp.einsum("...k,km->...m", x, w, precision="highest")

    if policy == "forward":
        y = product(wide, jnp.expand_dims(weights, 1) * w)
    else:
        constant = jax.lax.stop_gradient(w)
        tokens = jax.lax.stop_gradient(wide) * weights.reshape(*x.shape[:-1], 1)
        y = product(wide, constant) + product(tokens, w - constant)
    return y.astype(x.dtype)


def sampled_conv(
    x: Float[Array, "n *space k"],
    w: Float[Array, "*window k m"],
    weights: Float[Array, " k"],
    conv: Callable[..., Array],
) -> Float[Array, "n ..."]:
    """`sum_c weights_c x_c * w_c`, over channels in, by the convolution `conv`."""
    kept = accumulator(x, w)
    scaled = w.astype(kept) * weights.astype(kept).reshape(*[1] * (w.ndim - 2), -1, 1)
    return conv(x.astype(kept), scaled, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)


def common_dtype(*dtypes: Any) -> Any:
    """The dtype that holds all of them, also where JAX is told to promote nothing silently."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def accumulator(*arrays: Any) -> Any:
    """The dtype sums are kept in: at least float32, float64 where an operand has it."""
    return common_dtype(*(a.dtype for a in arrays), jnp.float32)
