"""What the recurrent cells of both Flax dialects share: the equations, and what they are made of.

A cell is `carry, y = step(carry, project(x))`: `project` is what depends on the input alone, so
that a loop over time can compute it for all steps at once, before the first.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bsjax import _layers, inits, patterns
from bsjax.ops._reference import accumulator
from bsjax.pattern import BlockPattern, is_concrete

GATES = 4  # input, forget, update, output: in the order of Flax's cells
FORGET = 1
EPSILON = 1e-6

type Carry = tuple[Array, Array]  # (c, h), as in Flax's LSTMCell


# ------------------------------------------------------------------------------- the equations


class Kind(NamedTuple):
    """What sets one cell apart from another."""

    cell: str
    inputs: int  # maps of the input
    steps: int  # internal ones
    small_world: bool = False

    def with_depth(self, depth: int) -> "Kind":
        """With so many internal steps."""
        check_sizes(self.cell, depth=depth)
        return self._replace(steps=depth)

    def projected(self, features: int, stride: int) -> tuple[int, int]:
        """How many maps of the input there are, and of how many features each."""
        return self.inputs, -(-features // stride)


LSTM = Kind("BlockLSTMCell", GATES, 0)
MULTIPLICATIVE = Kind("BlockMultiplicativeLSTMCell", 1 + GATES, 1)
SMALL_WORLD = Kind("SmallWorldLSTMCell", 2, 5, small_world=True)


def project(cell: Any, x: Any) -> Float[Array, "*n i p"]:
    """All maps of the input, next to each other, and normalised."""
    y = cell.inputs(x)
    return cell.input_norm(parts(y, cell.kind.inputs, y.shape[-1] // cell.kind.inputs))


def step(cell: Any, carry: Any, inputs: Float[Array, "*n i p"]) -> tuple[Carry, Array]:
    """The next carry and the output, from what `project` gave.

    c and h keep the dtypes of the carry: where products are in 16 bits, c may sum up in 32.
    """
    c, h = carry
    m, stride, small_world = cell.hidden_features, cell.in_stride, cell.kind.small_world

    def product(index: int, h: Array, activation: str | None = None) -> Array:
        linear = cell.steps[index]
        if not cell.step_norms:
            return linear(h, activation=activation)  # one kernel, where one runs
        y = cell.step_norms[index](linear(h)[..., None, :])[..., 0, :]
        return jax.nn.relu(y) if activation else y

    # inputs enter at every stride-th feature; the others pass as they are
    multiply = spread(inputs[..., 0, :], m, stride, 1.0)
    if small_world:
        h = product(0, h) * multiply
        add = spread(inputs[..., 1, :], m, stride, 0.0)
        # where there is one internal step only, it does both
        h = jax.nn.relu((product(1, h) if cell.kind.steps > 1 else h) + add)
        for index in range(2, cell.kind.steps):
            h = product(index, h, "relu")
    elif cell.kind.steps:
        h = product(0, h) * multiply
    z = cell.gate_norm(parts(cell.gates(h), GATES, m))
    if not small_world:
        z = z + spread(inputs[..., -GATES:, :], m, stride, 0.0)
    i, f, u, o = (z[..., part, :] for part in range(GATES))
    i, f, o = (cell.gate_fn(gate) for gate in (i, f, o))
    u = cell.dropout(cell.activation_fn(u))
    c = f.astype(c.dtype) * c + i.astype(c.dtype) * u.astype(c.dtype)
    new = o * cell.activation_fn(c).astype(o.dtype)
    return (c, new.astype(carry[1].dtype)), new[..., :: cell.out_stride]


def normalize(
    x: Float[Array, "*n m"], scale: Array | None, bias: Array | None
) -> Float[Array, "*n m"]:
    """Layer norm over the last axis, `(x - mean) / sqrt(var + 1e-6) * scale + bias`, computed in
    float32 at least; without a scale `x + bias`. Both may have leading axes. Ba et al. 2016."""
    dtype = x.dtype
    if scale is not None:
        x = x.astype(accumulator(x))
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON)
        x = x * _lead(scale, x)
    if bias is not None:
        x = x + _lead(bias, x)
    return x.astype(dtype)


def spread(x: Float[Array, "*n p"], features: int, stride: int, fill: float) -> Array:
    """x at every `stride`-th of so many features, `fill` between."""
    if stride == 1:
        return x
    end = features - 1 - (x.shape[-1] - 1) * stride
    edges = [(0, 0, 0)] * (x.ndim - 1) + [(0, end, stride - 1)]
    return jax.lax.pad(x, jnp.asarray(fill, x.dtype), edges)


def parts(y: Array, count: int, features: int) -> Array:
    """`y[..., count, features]` of products side by side, the padding of each left out."""
    return y.reshape(*y.shape[:-1], count, -1)[..., :features]


def _lead(a: Array, x: Array) -> Array:
    return jnp.expand_dims(a, range(x.ndim - a.ndim)).astype(x.dtype)


# -------------------------------------------------------------------------------- what is built


def check_cell(kind: Kind, dropout_rate: float, **sizes: int) -> None:
    """Sizes and rates in their bounds."""
    check_sizes(kind.cell, **sizes)
    if not 0 <= dropout_rate < 1:
        raise ValueError(
            f"{kind.cell}: `dropout_rate` must be at least 0 and below 1, got {dropout_rate}: it "
            "is the share of the updates that is dropped."
        )


def check_sizes(cell: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(
                f"{cell}: `{name}` must be a whole number of at least 1, got {size!r}."
            )


def step_patterns(kind: Kind, pattern: Any, block: Any, features: int) -> list[BlockPattern]:
    """One for each internal step, and the last for the gates: those given, or the one given.

    The blocks of the diagonal are added to masks, and demanded of patterns, by a small world.
    """
    cell, count = kind.cell, kind.steps + 1
    listed = list(pattern) if isinstance(pattern, list | tuple) else [pattern] * count
    if len(listed) != count:
        raise ValueError(
            f"{cell}: `pattern` has {len(listed)} patterns, but {count} are needed, one for each "
            f"of the {kind.steps} internal steps and one for the gates: give a single pattern to "
            "share it."
        )

    def made(one: Any) -> BlockPattern:
        if kind.small_world and not isinstance(one, BlockPattern):
            one = _with_diagonal(one)
        p = _layers.as_pattern(cell, one, block)
        _layers.check_features(cell, p, (features, features))
        if kind.small_world:
            _check_diagonal(cell, p)
        return p

    each = {id(one): made(one) for one in listed}
    return [each[id(one)] for one in listed]


def side_by_side(p: BlockPattern, features: int, init: Any) -> tuple[BlockPattern, Any]:
    """The pattern of the matrices of all gates next to each other, which are one product, and an
    initialiser that draws each of them by `init`. A single block becomes a wider one."""
    (r, c), (br, bc) = p.grid, p.block
    whole = p.grid == (1, 1) and p.capacity == 1 and is_concrete(p.row) and p.nnz == 1
    xp = np if is_concrete(p.row, p.col) else jnp
    row, col = xp.asarray(p.row), xp.asarray(p.col)
    col = xp.concatenate([xp.where(col < c, col + i * c, GATES * c) for i in range(GATES)])
    order = col.argsort(stable=True)  # spare slots last, all others as they are
    row, col = (jnp.asarray(a[order], jnp.int32) for a in (xp.concatenate([row] * GATES), col))
    if whole:
        wide = BlockPattern(p.row, p.col, p.grid, (br, GATES * bc))
    else:
        wide = BlockPattern(row, col, (r, GATES * c), (br, bc))

    @inits.by_pattern
    def joined(key: Any, wide: BlockPattern, dtype: Any, _: Any) -> Array:
        keys = jax.random.split(key, GATES)
        each = [inits.initialize(init, k, p, dtype, (features, features)) for k in keys]
        return jnp.concatenate(each, axis=2) if whole else jnp.concatenate(each)[order]

    return wide, joined


def gate_bias(bias_init: Any, forget_bias: float) -> Any:
    """An initialiser of `bias[4, features]`, whose forget gate begins with `forget_bias` more."""

    def init(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
        bias = bias_init(key, shape, dtype)
        return bias.at[FORGET].add(jnp.asarray(forget_bias, dtype))

    return init


def initial_carry(cell: Any, input_shape: Sequence[int], init: Any, keys: Sequence[Any]) -> Carry:
    """c and h before the first step."""
    shape = (*input_shape[:-1], cell.hidden_features)
    dtypes = (cell.param_dtype, cell.dtype or cell.param_dtype)
    c, h = (init(key, shape, dtype) for key, dtype in zip(keys, dtypes, strict=True))
    return c, h


def _with_diagonal(mask: Any) -> Any:
    if getattr(mask, "ndim", None) != 2 or mask.dtype != bool:
        return mask  # from_mask says what is wrong with it
    return mask | patterns.banded(mask.shape, 0)


def _check_diagonal(cell: str, p: BlockPattern) -> None:
    if is_concrete(p.row, p.col) and (patterns.banded(p.grid, 0) & ~np.asarray(p.mask())).any():
        raise ValueError(
            f"{cell}: `pattern` lacks blocks of the diagonal, so that a part of the state would "
            "begin dead: make it of `mask | bsjax.patterns.banded(grid, 0)`."
        )
