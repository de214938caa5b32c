"""Initialisers that count stored blocks.

An initialiser made for dense layers, `(key, shape, dtype) -> array`, counts every input feature as
fan-in; a block-sparse output feature sums only over the stored ones, and its activations would
shrink by the square root of the density per layer. The initialisers here have one more form,
`(key, pattern, dtype) -> values[e, br, bc]`, and `from_dense` gives it to any standard one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bsjax.pattern import BlockPattern, is_concrete

type Initializer = Callable[..., Array]


def from_dense(init: Initializer) -> Initializer:
    """Any `(key, shape, dtype)` initialiser, applied to what each block-column stores.

    A block-column with `d` stored blocks is drawn as `d * br` inputs by `d' * bc` outputs, where
    `d'` is the mean number of stored blocks of a block-row. So fan-in is exact per block-column,
    fan-out is right on average, and a full pattern gets what the dense layer would.
    """

    def values(key: Array, p: BlockPattern, dtype: Any = jnp.float32) -> Float[Array, "e br bc"]:
        row, col = _coords("from_dense", p)
        (r, c), (br, bc) = p.grid, p.block
        degree = np.bincount(col, minlength=c)
        group = max(1, round(len(row) / max(1, r)))
        out = np.full((p.capacity,), -1)
        drawn, base = [], 0
        for d in np.unique(degree[degree > 0]):
            columns = np.flatnonzero(degree == d)
            draws = -(-len(columns) // group)
            keys = jax.random.split(jax.random.fold_in(key, d), draws)
            tall = jnp.stack([init(k, (d * br, group * bc), dtype) for k in keys])
            blocks = tall.reshape(draws, d, br, group, bc).transpose(0, 3, 1, 2, 4)
            drawn.append(blocks.reshape(-1, br, bc))
            for i, j in enumerate(columns):
                out[np.flatnonzero(col == j)] = base + i * d + np.arange(d)
            base += draws * group * d
        if not drawn:
            return jnp.zeros((p.capacity, br, bc), dtype)
        return (
            jnp.concatenate(drawn)
            .at[out]
            .get(mode="fill", fill_value=0, wrap_negative_indices=False)
        )

    return values


def stored_fan_in(gain: float = 1.0) -> Initializer:
    """Normal with variance `gain^2 / (br * d_col)`, `d_col` the stored blocks of the block-column.

    Keeps the variance of activations; use `gain=2**0.5` before a ReLU. After He et al. 2015, with
    the stored fan-in in the place of the dense one.
    """

    def values(key: Array, p: BlockPattern, dtype: Any = jnp.float32) -> Float[Array, "e br bc"]:
        degree = jnp.zeros(p.grid[1] + 1).at[p.col].add(1.0)
        variance = gain**2 / (p.block[0] * degree[p.col])
        return _normal(key, p, variance, dtype)

    return values


def sinkhorn(gain: float = 1.0, *, steps: int = 200) -> Initializer:
    """Normal with a variance per block that keeps both activations and gradients.

    Hub rows and columns make a fan-in rule unfair to the backward pass. The mask is scaled to rows
    and columns of equal sums (Sinkhorn and Knopp 1967) and the variance is `gain^2 V / br` with
    columns of V that sum to 1, so `Var(y) = Var(x)`, and rows that sum to `c / r`, so that
    gradients keep `Var(dx) = Var(dy) * (c bc) / (r br)`, as a dense layer's do. A pattern without
    such a scaling (an empty row, say) gets the nearest after `steps` rounds, columns exact.
    """

    def values(key: Array, p: BlockPattern, dtype: Any = jnp.float32) -> Float[Array, "e br bc"]:
        r, c = p.grid
        stored = jnp.asarray(p.mask(), jnp.float32)

        def balance(_: Any, v: Array) -> Array:
            v = v * (c / r) / jnp.maximum(v.sum(1, keepdims=True), 1e-30)
            return v / jnp.maximum(v.sum(0, keepdims=True), 1e-30)

        v = jax.lax.fori_loop(0, steps, balance, stored)
        variance = gain**2 / p.block[0] * v.at[p.row, p.col].get(mode="fill", fill_value=0)
        return _normal(key, p, variance, dtype)

    return values


def identity(scale: float = 1.0) -> Initializer:
    """`scale * I` in the blocks `(i, j)` with `i % c == j % r`, zeros elsewhere.

    A square pattern with its diagonal starts as the identity; a rectangular one as stacked
    identities, scaled by `sqrt(c / r)` where several are summed so that variance is kept. A
    block-column that stores none of these blocks starts as zeros. After Gray, Radford and Kingma
    2017 (`identity_init`).
    """

    def values(key: Array, p: BlockPattern, dtype: Any = jnp.float32) -> Float[Array, "e br bc"]:
        del key  # nothing is drawn
        (r, c), (br, bc) = p.grid, p.block
        on = (p.row % max(1, c) == p.col % max(1, r)) & (p.row < r)
        gain = scale * min(1.0, (c / max(1, r)) ** 0.5)
        return jnp.where(on[:, None, None], gain * jnp.eye(br, bc), 0).astype(dtype)

    return values


def orthogonal(gain: float = 1.0) -> Initializer:
    """Orthonormal columns in each block-column: its stored blocks, stacked, are `d br x bc`.

    Where a block-column stores fewer inputs than outputs (`d br < bc`) its rows are orthonormal
    instead. After Saxe et al. 2014, per block-column as in Gray, Radford and Kingma 2017.
    """

    def values(key: Array, p: BlockPattern, dtype: Any = jnp.float32) -> Float[Array, "e br bc"]:
        _, col = _coords("orthogonal", p)
        (br, bc), out = p.block, jnp.zeros((p.capacity, *p.block), dtype)
        degree = np.bincount(col, minlength=p.grid[1])
        draw = jax.nn.initializers.orthogonal(gain)
        for d in np.unique(degree[degree > 0]):
            slots = np.flatnonzero(degree[col] == d)  # whole block-columns, in order
            keys = jax.random.split(jax.random.fold_in(key, d), len(slots) // d)
            tall = jax.vmap(lambda k, d=d: draw(k, (d * br, bc), jnp.float32))(keys)
            out = out.at[slots].set(tall.reshape(-1, br, bc).astype(dtype))
        return out

    return values


def initialize(init: Initializer, key: Array, p: BlockPattern, dtype: Any) -> Array:
    """Values of `p` from an initialiser of either form."""
    ours = getattr(init, "__module__", None) == __name__
    return (init if ours else from_dense(init))(key, p, dtype)


def _normal(key: Array, p: BlockPattern, variance: Array, dtype: Any) -> Array:
    draw = jax.random.normal(key, (p.capacity, *p.block), jnp.float32)
    stored = (p.col < p.grid[1])[:, None, None]
    return jnp.where(stored, draw * jnp.sqrt(variance)[:, None, None], 0).astype(dtype)


def _coords(name: str, p: BlockPattern) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the stored blocks, which must be visible: their counts are shapes here."""
    if not is_concrete(p.row, p.col):
        raise ValueError(
            f"inits.{name}: the pattern is traced, and the shapes drawn depend on it: build the "
            "layer with a pattern known outside jit, or use inits.stored_fan_in or inits.sinkhorn."
        )
    row, col = np.asarray(p.row), np.asarray(p.col)
    return row[col < p.grid[1]], col[col < p.grid[1]]
