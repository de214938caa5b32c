"""Initialisers that count stored blocks.

An initialiser made for dense layers, `(key, shape, dtype) -> array`, counts every input feature as
fan-in; a block-sparse output feature sums only over the stored ones, and its activations would
shrink by the square root of the density per layer. The initialisers here take the pattern:

    values[e, br, bc] = init(key, p, dtype=float32, features=p.shape)

`features` are the real sizes `(in, out)` where blocks do not divide them: the rows and columns of
padding count nowhere, and are zeros. Spare slots are zeros too. `from_dense` makes such an
initialiser out of any standard one, `by_pattern` out of a function of your own.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bsjax.ops import _validate as validate
from bsjax.pattern import BlockPattern, is_concrete

type Initializer = Callable[..., Any]
type Features = tuple[int, int]


def by_pattern(function: Initializer) -> Initializer:
    """Mark `function(key, p, dtype, features) -> values[e, br, bc]` as one that takes the pattern.

    A layer calls an initialiser with this mark as it is, and any other through `from_dense`. The
    result checks its arguments, fills in `dtype=float32` and `features=p.shape`, and sets padding
    and spare slots to zero, so `function` need not.
    """
    name = function.__qualname__.split(".<locals>")[0]

    @functools.wraps(function)
    def init(
        key: Any,
        p: Any,
        dtype: Any = jnp.float32,
        features: Features | None = None,
        **options: Any,
    ) -> Float[Array, "e br bc"]:
        p = validate.pattern(name, p)
        features = _check_features(name, p, features)
        _check_key(name, key)
        values = function(key, p, dtype, features, **options)
        if jnp.shape(values) != (p.capacity, *p.block):
            raise ValueError(
                f"{name}: returned shape {jnp.shape(values)} for a pattern whose values are "
                f"(e, br, bc) = {(p.capacity, *p.block)}: return one block for each slot."
            )
        return _without_padding(values, p, features).astype(dtype)

    init.by_pattern = True  # type: ignore[attr-defined]
    return init


def initialize(
    init: Initializer,
    key: Any,
    p: BlockPattern,
    dtype: Any,
    features: Features | None = None,
    window: tuple[int, ...] = (),
) -> Any:
    """Values `[e, *window, br, bc]` from any initialiser: marked by `by_pattern`, or a standard
    one.

    Of a convolution, each tap of a stored input counts as an input. A standard initialiser gets
    shapes `(*window, fan, out)`, as in Flax. `identity` fills the middle tap, and the others with
    zeros: with stride 1 and padding "SAME" that is the identity.
    """
    inner = init
    while isinstance(inner, functools.partial):
        inner = inner.func
    takes_pattern = getattr(inner, "by_pattern", False)
    if not window:
        return (init if takes_pattern else from_dense(init))(key, p, dtype, features)
    if getattr(inner, "pointwise", False):
        values = init(key, p, dtype, features)
        empty = jnp.zeros((p.capacity, *window, *p.block), values.dtype)
        return empty.at[:, *((size - 1) // 2 for size in window)].set(values)
    # the taps of an input are rows below each other, so that the last inputs may be padding
    taps, (br, bc) = math.prod(window), p.block
    tall = BlockPattern(p.row, p.col, p.grid, (br * taps, bc))
    k, m = _check_features("initialize", p, features)
    rows = (init if takes_pattern else from_dense(_by_tap(init, window)))(
        key, tall, dtype, (k * taps, m)
    )
    return jnp.moveaxis(rows.reshape(p.capacity, br, *window, bc), 1, -2)


def _by_tap(init: Initializer, window: tuple[int, ...]) -> Initializer:
    """An initialiser of kernels `(*window, fan, out)`, as one of matrices `(fan * taps, out)`."""
    taps = math.prod(window)

    def by_tap(key: Any, shape: tuple[int, int], dtype: Any) -> Any:
        full = (*window, shape[0] // taps, shape[1])
        return jnp.moveaxis(_checked(init(key, full, dtype), full), -2, 0).reshape(shape)

    return by_tap


def stored_fan_in(gain: float = 1.0) -> Initializer:
    """Normal with variance `gain^2 / fan`, `fan` the stored inputs of the block-column.

    Keeps the variance of activations; use `gain=2**0.5` before a ReLU. After He et al. 2015, with
    the stored fan-in in the place of the dense one.
    """

    @by_pattern
    def stored_fan_in(key: Any, p: BlockPattern, dtype: Any, features: Features) -> Array:
        fan = _stored_inputs(p, features).at[p.col].get(mode="fill", fill_value=1)
        return _normal(key, gain**2 / fan, p.block)

    return stored_fan_in


def sinkhorn(gain: float = 1.0, *, steps: int = 200) -> Initializer:
    """Normal with a variance per block that keeps both activations and gradients.

    Hub rows and columns make a fan-in rule unfair to the backward pass. Here the variances `V` of
    the stored blocks are scaled (Sinkhorn and Knopp 1967) until each output sums over `gain^2` of
    them, so that `Var(y) = gain^2 Var(x)`, and each of the k inputs is summed over by the m outputs
    with `gain^2 m / k`, so that `Var(dx) = gain^2 Var(dy) m / k`, as in a dense layer. A pattern
    without such a scaling (an empty row, say) gets the nearest after `steps` rounds, columns exact.
    """

    @by_pattern
    def sinkhorn(key: Any, p: BlockPattern, dtype: Any, features: Features) -> Array:
        (r, c), (br, bc), (k, m) = p.grid, p.block, features
        height = jnp.asarray(_sides(r, br, k), jnp.float32)[:, None]
        width = jnp.asarray(_sides(c, bc, m), jnp.float32)[None]

        def balance(_: Any, v: Array) -> Array:
            v = v * (m / max(1, k)) / jnp.maximum((v * width).sum(1, keepdims=True), 1e-30)
            return v / jnp.maximum((v * height).sum(0, keepdims=True), 1e-30)

        v = jax.lax.fori_loop(0, steps, balance, jnp.asarray(p.mask(), jnp.float32))
        v = v.at[p.row, p.col].get(mode="fill", fill_value=0)
        return _normal(key, gain**2 * v, p.block)

    return sinkhorn


def identity(scale: float = 1.0) -> Initializer:
    """`scale * I` in the blocks `(i, j)` with `i % c == j % r`, zeros elsewhere.

    A square pattern with its diagonal starts as the identity. A wide one copies each input to
    several outputs, a tall one sums several inputs into each output, divided by the square root of
    their number so that variance is kept. An output that stores none of its ones starts as zero.
    Blocks need not be square: the ones are those of the whole matrix. After Gray, Radford and
    Kingma 2017 (`identity_init`, which does not divide).
    """

    @by_pattern
    def identity(key: Any, p: BlockPattern, dtype: Any, features: Features) -> Array:
        del key  # nothing is drawn
        k, m = p.shape
        row, col = _places(p)
        ones = ((row % max(1, m))[:, :, None] == (col % max(1, k))[:, None]) & _real(p, features)
        count = jnp.zeros((p.grid[1], p.block[1]), jnp.float32)
        count = count.at[p.col].add(ones.sum(1).astype(jnp.float32), mode="drop")
        share = scale / jnp.sqrt(jnp.maximum(count, 1)).at[p.col].get(mode="fill", fill_value=1)
        return jnp.where(ones, share[:, None], 0)

    identity.pointwise = True  # type: ignore[attr-defined]
    return identity


def orthogonal(gain: float = 1.0) -> Initializer:
    """Orthonormal columns in each block-column: its stored inputs are a `(fan, bc)` matrix.

    Where a block-column stores fewer inputs than outputs, its rows are orthonormal instead. Costs
    memory for as many rows as the fullest block-column has, times all columns (of a traced pattern:
    a dense matrix). After Saxe et al. 2014, per block-column as in Gray, Radford and Kingma 2017.
    """

    @by_pattern
    def orthogonal(key: Any, p: BlockPattern, dtype: Any, features: Features) -> Array:
        most = p.mask().sum(0).max(initial=0) if is_concrete(p.row, p.col) else p.grid[0]
        return gain * _orthonormal(key, p, features, max(int(most), -(-p.block[1] // p.block[0])))

    return orthogonal


def from_dense(init: Initializer) -> Initializer:
    """Any `(key, shape, dtype)` initialiser, applied to what each block-column stores.

    Block-columns with as many stored inputs `fan` are drawn together as dense matrices `(fan,
    out)`, with `out` the mean number of stored outputs of an input, in whole blocks. So fan-in is
    exact, fan-out is right on average, and a full pattern gets the very numbers of a dense layer.
    The numbers of stored blocks are shapes here: the pattern must not be traced, and each distinct
    `fan` compiles `init` once.
    """

    @by_pattern
    def from_dense(key: Any, p: BlockPattern, dtype: Any, features: Features) -> Array:
        br, bc = p.block
        fan, start = _fans(p, features)
        group = max(1, round(p.nnz / max(1, p.grid[0])))
        draws = []
        for f in np.unique(fan[fan > 0]).tolist():
            columns = np.flatnonzero(fan == f)
            draws += [(f, columns[i : i + group]) for i in range(0, len(columns), group)]
        keys = jax.random.split(key, len(draws)) if len(draws) > 1 else [key]
        # all draws as one list of rows [bc], the first one zero, and where each of ours is in it
        drawn, size, source = [jnp.zeros((1, bc), dtype)], 1, np.zeros(p.capacity * br, np.int32)
        for k, (f, columns) in zip(keys, draws, strict=False):
            # a draw as wide as the matrix leaves the padding out
            width = min(group * bc, features[1])
            tall = _checked(init(k, (f, width), dtype), (f, width))
            drawn.append(jnp.pad(tall, ((0, 0), (0, group * bc - width))).reshape(-1, bc))
            lane = np.arange(len(columns))[:, None]
            source[start[columns][:, None] + np.arange(f)] = size + np.arange(f) * group + lane
            size += f * group
        return jnp.concatenate(drawn)[source].reshape(-1, br, bc)

    return from_dense


@functools.partial(jax.jit, static_argnames="block")
def _normal(key: Any, variance: Array, block: tuple[int, int]) -> Array:
    draw = jax.random.normal(key, (len(variance), *block), jnp.float32)
    return draw * jnp.sqrt(variance)[:, None, None]


def _sides(blocks: int, side: int, features: int) -> np.ndarray:
    """How many of the `side` rows (columns) of each block-row (block-column) are features."""
    return np.clip(features - side * np.arange(blocks), 0, side)


def _places(p: BlockPattern) -> tuple[Array, Array]:
    """Row and column in the whole matrix of each row [e, br] and column [e, bc] of a slot."""
    a, b = (np.arange(side, dtype=np.int32)[None] for side in p.block)
    return p.row[:, None] * p.block[0] + a, p.col[:, None] * p.block[1] + b


def _real(p: BlockPattern, features: Features) -> Bool[Array, "e br bc"]:
    """True but for padding and spare slots."""
    row, col = _places(p)
    return (row < features[0])[:, :, None] & (col < features[1])[:, None]


@functools.partial(jax.jit, static_argnames="features")
def _without_padding(values: Array, p: BlockPattern, features: Features) -> Array:
    return jnp.where(_real(p, features), values, 0)


@functools.partial(jax.jit, static_argnames="features")
def _stored_inputs(p: BlockPattern, features: Features) -> Float[Array, " c"]:
    """How many inputs each block-column stores."""
    height = jnp.asarray(_sides(p.grid[0], p.block[0], features[0]), jnp.float32)
    height = height.at[p.row].get(mode="fill", fill_value=0)
    return jnp.zeros(p.grid[1], jnp.float32).at[p.col].add(height, mode="drop")


@functools.partial(jax.jit, static_argnames=("features", "most"))
def _orthonormal(key: Any, p: BlockPattern, features: Features, most: int) -> Array:
    """One QR decomposition for all block-columns: zero rows below a matrix stay zero in Q."""
    c, (br, bc), height = p.grid[1], p.block, most * p.block[0]
    fan = _stored_inputs(p, features).astype(jnp.int32)
    width = jnp.asarray(_sides(c, bc, features[1]), jnp.int32)
    long, short = (f(fan, width)[:, None, None] for f in (jnp.maximum, jnp.minimum))
    row, col = (np.arange(size, dtype=np.int32) for size in (height, bc))
    inside = (row[None, :, None] < long) & (col[None, None] < short)
    # rows first, so that more of them add to what is drawn and change nothing
    drawn = jax.random.normal(key, (height, c, bc), jnp.float32).swapaxes(0, 1)
    q, upper = jnp.linalg.qr(jnp.where(inside, drawn, 0))
    # the signs make Q uniform over all orthonormal matrices
    q = q * jnp.sign(jnp.diagonal(upper, axis1=1, axis2=2))[:, None]
    lying = jnp.pad(q[:, :bc].swapaxes(1, 2), ((0, 0), (0, height - bc), (0, 0)))
    q = jnp.where((fan >= width)[:, None, None], q, lying).reshape(c, most, br, bc)
    start = jnp.searchsorted(p.col, jnp.arange(c + 1, dtype=jnp.int32)).astype(jnp.int32)
    place = jnp.arange(p.capacity, dtype=jnp.int32) - start[p.col]
    return q.at[p.col, place].get(mode="fill", fill_value=0)


def _fans(p: BlockPattern, features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Of each block-column: its stored inputs, and where they start among the rows [e * br, bc].

    They lie together and in order, so what the last block-row pads is at their end.
    """
    if not is_concrete(p.row, p.col):
        raise ValueError(
            "from_dense: the pattern is traced, and the shapes to draw depend on it: build the "
            "layer with a pattern known outside jit, or use stored_fan_in or another initialiser "
            "of bsjax.inits."
        )
    row, col, c = np.asarray(p.row), np.asarray(p.col), p.grid[1]
    height = np.append(_sides(p.grid[0], p.block[0], features[0]), 0)[row]
    fan = np.bincount(col, weights=height, minlength=c)[:c].astype(np.int64)
    return fan, np.searchsorted(col, np.arange(c)) * p.block[0]


def _checked(values: Any, shape: tuple[int, ...]) -> Array:
    if getattr(values, "shape", None) != shape:
        raise TypeError(
            f"from_dense: the initialiser must return an array of shape {shape}, got "
            f"{type(values).__name__}: put what wraps arrays, such as with_partitioning, around "
            "from_dense(init), not inside."
        )
    return jnp.asarray(values)


def _check_features(name: str, p: BlockPattern, features: Features | None) -> Features:
    if features is None:
        return p.shape
    for size, side, blocks in zip(features, p.block, p.grid, strict=True):
        if -(-size // side) != blocks:
            raise ValueError(
                f"{name}: `features` {tuple(features)} do not fit a grid {p.grid} of blocks "
                f"{p.block}: each size must end inside the last block."
            )
    return features


def _check_key(name: str, key: Any) -> None:
    # a raw key has an axis, a typed key has a dtype of its own: a number has neither
    if not getattr(key, "ndim", 0) and not jnp.issubdtype(
        jnp.result_type(key), jax.dtypes.prng_key
    ):
        raise TypeError(f"{name}: `key` must be a key, got {key!r}: write jax.random.key({key!r}).")
