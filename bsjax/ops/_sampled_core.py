"""Sampled products and their derivatives.

What is sampled is copied side by side, so that what follows is one smaller dense product: on a CPU
the copies cost a few percent of it, also for groups of one. Cores never see a bad shape.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from bsjax.ops import _core, _mesh, _reference, _samplers
from bsjax.ops._scores import Reader

type Index = Int32[Array, " t"] | None  # the groups that are taken, or None: all of them
type Scale = Float[Array, " t"] | None  # what each of them counts, or None: 1


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """An axis of `length`, cut into groups of `block` neighbours; the last may be smaller."""

    length: int
    block: int
    fraction: float

    @property
    def groups(self) -> int:
        return math.ceil(self.length / self.block)

    @property
    def taken(self) -> int:
        return min(self.groups, max(1, round(self.fraction * self.groups)))

    def norms(self, squares: Float[Array, " i"]) -> Float[Array, " g"]:
        """The root of the sum of each group."""
        padded = jnp.pad(squares, (0, -self.length % self.block))
        return jnp.sqrt(padded.reshape(self.groups, self.block).sum(1))

    def rows(self, a: Float[Array, "i m"], index: Index) -> Float[Array, "s m"]:
        """The rows that are taken; a smaller last group is filled up with zeros."""
        if index is None:
            return a
        m = a.shape[1]
        padded = jnp.pad(a, ((0, -self.length % self.block), (0, 0)))
        groups = padded.reshape(self.groups, self.block * m)
        return groups.at[index].get(mode="clip").reshape(index.size * self.block, m)

    def features(self, a: Float[Array, "n i"], index: Index) -> Float[Array, "n s"]:
        """The columns that are taken."""
        if index is None:
            return a
        n = a.shape[0]
        groups = a.reshape(n, self.groups, self.block)
        return groups.at[:, index].get(mode="clip").reshape(n, index.size * self.block)

    def rows_back(self, taken: Float[Array, "s m"], index: Index) -> Float[Array, "i m"]:
        """Rows where they came from, and zeros elsewhere."""
        if index is None:
            return taken
        m, slot = taken.shape[1], self._slot(index)
        groups = taken.reshape(index.size, self.block * m).at[slot].get(mode="clip")
        return jnp.where(slot[:, None] < index.size, groups, 0).reshape(self.length, m)

    def features_back(self, taken: Float[Array, "n s"], index: Index) -> Float[Array, "n i"]:
        """Columns where they came from, and zeros elsewhere."""
        if index is None:
            return taken
        n, slot = taken.shape[0], self._slot(index)
        groups = taken.reshape(n, index.size, self.block).at[:, slot].get(mode="clip")
        return jnp.where(slot[:, None] < index.size, groups, 0).reshape(n, self.length)

    def _slot(self, index: Array) -> Int32[Array, " g"]:
        """Which of the taken groups each group is, or their number: a gather by it copies in
        parallel what a scatter would write in a loop."""
        slots = jnp.arange(index.size, dtype=jnp.int32)
        return jnp.full(self.groups, index.size, jnp.int32).at[index].set(slots)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """The static part of a sampled product."""

    policy: str
    sampler: _samplers.Sampler
    fraction: float
    block: int
    compact: bool  # whether what is sampled is copied, or the rest multiplied by zero
    features: int  # k
    x_dtype: Any
    w_dtype: Any
    score_slice: int | None = None
    kernel: str = ""  # "asked" for, or chosen: where a "gpu" runs it

    @property
    def dtypes(self) -> tuple[Any, Any]:
        return self.x_dtype, self.w_dtype

    def cut(self, length: int) -> Cut:
        """How an axis is sampled."""
        return Cut(length, self.block, self.fraction)

    def reading(self, key: Array) -> tuple[Array, Reader]:
        """The key of the sample, and what its scores are read by."""
        if self.score_slice is None:
            return key, Reader()
        key, for_slice = jax.random.split(key)
        return key, Reader(self.score_slice, for_slice)

    def weigh(self, cut: Cut, key: Array, scores: Callable[[], Array]) -> Array | None:
        """The weight of every group, or None if all are taken."""
        if cut.taken == cut.groups:
            return None
        # what is not read is not computed
        scored = jnp.ones(cut.groups) if self.sampler == "uniform" else scores()
        return _samplers.weigh(self.sampler, key, scored, cut.taken)

    def sample(self, cut: Cut, weights: Array | None) -> tuple[Index, Scale]:
        """What is taken and what it counts."""
        if weights is None or not self.compact:
            return None, weights
        return _samplers.chosen(weights, cut.taken)

    def dot(self, a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
        """A product over one axis of each, not rounded.

        Scaled operands are in float32. Where x and w have 16 bits, a GPU rounds them to these once
        more, for products that are twice as fast.
        """
        dtype, own = (_reference.common_dtype(*pair) for pair in ((a.dtype, b.dtype), self.dtypes))
        full = own.itemsize > 2
        if not full and jax.default_backend() == "gpu":
            dtype = own
        return lax.dot_general(
            a.astype(dtype),
            b.astype(dtype),
            (((contract_a,), (contract_b,)), ((), ())),
            precision=lax.Precision.HIGHEST if full else lax.Precision.DEFAULT,
            preferred_element_type=_reference.accumulator(a, b),
        )


def squares(a: Array) -> Array:
    """In float32 at least, and constant: nothing is differentiated through a sample."""
    return jnp.square(lax.stop_gradient(a).astype(_reference.accumulator(a)))


def of_features(x: Array) -> Float[Array, " k"]:
    """The sum of squares of every feature, over all tokens."""
    return _mesh.over_tokens(lambda x, _, __: squares(x).sum(0), x, x)


def of_tokens(x: Array) -> Float[Array, " n"]:
    """The sum of squares of every token."""
    found = squares(x).sum(-1)
    if _mesh.is_sharded(x):  # samplers sort them all, on every device
        found = jax.sharding.reshard(found, PartitionSpec())
    return found.reshape(_mesh.tokens(x))


def tokens(cut: Cut, x: Array, index: Index) -> Float[Array, "s m"]:
    """The tokens that are taken, wherever they are; a smaller last group is filled with zeros."""
    if index is None or not _mesh.is_sharded(x):
        return cut.rows(_flat(x), index)
    items = index[:, None] * cut.block + jnp.arange(cut.block, dtype=jnp.int32)[None]
    return _mesh.take(x, items.reshape(items.size))


def times(taken: Array, cut: Cut, scale: Scale, axis: int = 0) -> Array:
    """Rows (or columns) that were taken, each times what it counts, in float32."""
    if scale is None:
        return taken
    dtype = _reference.accumulator(taken)
    scales = jnp.repeat(scale, cut.block)[: taken.shape[axis]].astype(dtype)
    return taken.astype(dtype) * jnp.expand_dims(scales, 1 - axis)


def _flat(x: Array) -> Array:
    return x.reshape(_mesh.tokens(x), x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def forward(spec: Spec, x: Array, w: Array, weights: Array | None) -> Array:
    """`x @ w` from one sample of the features in, which its gradients share."""
    return _forward_fwd(spec, x, w, weights)[0]


def _forward_fwd(spec, x, w, weights):
    cut = spec.cut(spec.features)
    index, scale = spec.sample(cut, weights)
    xs = _mesh.per_token(cut.features, x, index)
    ws = times(cut.rows(w, index), cut, scale)
    y = _mesh.per_token(lambda xs, ws: spec.dot(xs, ws, 1, 0).astype(spec.x_dtype), xs, ws)
    return y, (*_core.saved(xs, ws), index, scale)


def _forward_bwd(spec, residuals, dy):
    xs, ws, index, scale = residuals
    dy = jnp.asarray(dy)  # a cotangent may be a NumPy array
    cut = spec.cut(spec.features)

    def to_x(dy: Array, weights: Any) -> Array:
        ws, index = weights
        return cut.features_back(spec.dot(dy, ws, 1, 1).astype(spec.x_dtype), index)

    dx = _mesh.per_token(to_x, dy, (ws, index))
    dws = _mesh.over_tokens(lambda xs, dy, _: spec.dot(xs, dy, 0, 0), xs, dy)
    dw = cut.rows_back(times(dws, cut, scale).astype(spec.w_dtype), index)
    return dx, dw, None


forward.defvjp(_forward_fwd, _forward_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def exact(spec: Spec, x: Array, w: Array, drawn: Any) -> Array:
    """`x @ w` with sampled gradients: `drawn` are weights of tokens ("weight"), or the key of the
    samples that the backward pass draws ("backward")."""
    return _exact_fwd(spec, x, w, drawn)[0]


def _exact_fwd(spec, x, w, drawn):
    y = _mesh.per_token(lambda x, w: spec.dot(x, w, 1, 0).astype(spec.x_dtype), x, w)
    if spec.policy == "backward":
        return y, (*_core.saved(x, w), drawn)
    cut = spec.cut(_mesh.tokens(x))
    index, scale = spec.sample(cut, drawn)
    return y, (*_core.saved(tokens(cut, x, index), w), index, scale)


def _exact_bwd(spec, residuals, dy):
    back = _from_sampled_dy if spec.policy == "backward" else _from_kept_tokens
    dx, dw = back(spec, residuals, jnp.asarray(dy))
    return dx, dw, None


def _from_kept_tokens(spec: Spec, residuals: Any, dy: Array) -> tuple[Array, Array]:
    """dx as it is, and dw from the tokens that were kept."""
    xs, w, index, scale = residuals
    cut = spec.cut(_mesh.tokens(dy))
    dw = _over_taken(spec, times(xs, cut, scale), tokens(cut, dy, index))
    dx = _mesh.per_token(lambda dy, w: spec.dot(dy, w, 1, 1).astype(spec.x_dtype), dy, w)
    return dx, dw.astype(spec.w_dtype)


def _from_sampled_dy(spec: Spec, residuals: Any, dy: Array) -> tuple[Array, Array]:
    """dx from a sample of the features of dy, and dw from a sample of its tokens."""
    x, w, key = residuals
    for_x, for_w = jax.random.split(key)
    cut = spec.cut(w.shape[1])
    for_x, some = spec.reading(for_x)

    def of_columns() -> Array:
        of_dy, of_w = of_features(some.tokens(dy, 0)), squares(some.tokens(w, 1)).sum(0)
        return some.mixed(cut.norms(of_dy) * cut.norms(of_w))

    weights = spec.weigh(cut, for_x, of_columns)
    index, scale = spec.sample(cut, weights)
    ws = times(cut.features(w, index), cut, scale, axis=1)

    def to_x(dy: Array, weights: Any) -> Array:
        ws, index = weights
        return spec.dot(cut.features(dy, index), ws, 1, 1).astype(spec.x_dtype)

    dx = _mesh.per_token(to_x, dy, (ws, index))
    rows = spec.cut(_mesh.tokens(dy))
    for_w, some_of_each = spec.reading(for_w)

    def of_rows() -> Array:
        of_x, of_dy = (of_tokens(some_of_each.features(a, at)) for at, a in enumerate((x, dy)))
        return some_of_each.mixed(rows.norms(of_x) * rows.norms(of_dy))

    weights = spec.weigh(rows, for_w, of_rows)
    index, scale = spec.sample(rows, weights)
    xs, dys = (tokens(rows, a, index) for a in (x, dy))
    dw = _over_taken(spec, times(xs, rows, scale), dys)
    return dx, dw.astype(spec.w_dtype)


def _over_taken(spec: Spec, xs: Array, dys: Array) -> Array:
    """The sum of the outer products of tokens that were taken."""
    return _mesh.over_tokens(lambda xs, dys, _: spec.dot(xs, dys, 0, 0), xs, dys)


exact.defvjp(_exact_fwd, _exact_bwd)
