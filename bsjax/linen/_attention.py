"""`BlockAttention` for Flax Linen."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bsjax import _attention, _decoding, _memory
from bsjax.linen._pattern import stored
from bsjax.linen._products import call, frozen, product
from bsjax.ops import Implementation

LAYER = _attention.LAYER


class BlockAttention(nn.Module):
    """Multi-head attention that stores some blocks of scores, and computes only those.

    The fields of `bsjax.nnx.BlockAttention`, without `in_features`, `in_kv_features`, `rngs` and
    `keep_rngs`, with the submodules `query`, `key`, `value` and `out`. Random numbers as in
    `nn.MultiHeadDotProductAttention`: streams "dropout", or the key `dropout_rng`, and "sampling".

    Decoding as there: with `decode=True`, `init` with inputs of the whole sequence makes a
    collection `cache`, and `apply(..., mutable=["cache"])` takes one position or several. The field
    `ragged` gives each sequence positions of its own. A call with `inputs_k` keeps their keys and
    values in a mutable cache, and calls without `inputs_k` then attend to these.
    """

    num_heads: int
    _: dataclasses.KW_ONLY
    qkv_features: int | None = None
    out_features: int | None = None
    num_kv_heads: int | None = None
    mask: Any = None
    pattern: Any = None
    block: int | tuple[int, int] | None = None
    top_blocks: int | None = None
    rotary: bool = False
    rotary_base: float = 10_000.0
    sinks: bool = False
    softcap: float | None = None
    persistent: int = 0
    projection_pattern: Any = None
    projection_block: int | tuple[int, int] | None = None
    projection_implementation: Implementation = "auto"
    sampling: Mapping[str, Any] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    precision: Any = None
    kernel_init: Any = None
    out_kernel_init: Any = None
    out_gain: float = 1.0
    bias_init: Any = jax.nn.initializers.zeros
    out_bias_init: Any = None
    use_bias: bool = True
    decode: bool = False
    ragged: bool = False
    normalize_qk: bool = False
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        names = ("pattern", "block", "projection_pattern", "projection_block")
        fields = frozen(LAYER, {name: getattr(self, name) for name in names})
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs_q: Any,
        inputs_k: Any = None,
        inputs_v: Any = None,
        *,
        q_segment_ids: Any = None,
        kv_segment_ids: Any = None,
        kv_lengths: Any = None,
        bias: Any = None,
        input_positions: Any = None,
        deterministic: bool | None = None,
        dropout_rng: Any = None,
    ) -> Float[Array, "*n q m"]:
        """As a call of `bsjax.nnx.BlockAttention`."""
        inputs = _attention.inputs(inputs_q, inputs_k, inputs_v)
        width = jnp.shape(inputs_q)[-1]
        shared = ("num_heads", "num_kv_heads", "mask", "pattern", "block", "rotary", "rotary_base")
        shared += ("top_blocks", "softcap", "persistent", "dropout_rate", "implementation")
        o, pattern = _attention.options(
            qkv_features=self.qkv_features or width,
            **{name: getattr(self, name) for name in shared},
        )
        sampled = self.deterministic if deterministic is None else deterministic
        kv = o.num_kv_heads * o.head_dim
        norm: Any = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}

        def made(name: str, size: int, count: int, x: Any) -> Array:
            found = _attention.heads(call(self._projection(name, size), x, sampled), count)
            if not self.normalize_qk or name == "value":
                return found
            return nn.LayerNorm(name=f"{name}_ln", **norm)(found)

        q = made("query", o.num_heads * o.head_dim, o.num_heads, inputs[0])
        kept = self.decode and inputs_k is None and self._has_keys()
        own = inputs_k is None and not kept
        if kept:
            k, v = (self.get_variable("cache", name) for name in _decoding.CACHE[:2])
        else:
            k, v = (
                made(name, kv, o.num_kv_heads, x)
                for name, x in zip(("key", "value"), inputs[1:], strict=True)
            )
        params = self._params(o, pattern) | {"bias": bias}
        # `init` makes a cache as long as its inputs, and does not decode
        if self.decode and own and self._cache(o, k):
            others = (q_segment_ids, kv_segment_ids, kv_lengths)
            y = self._decoded(o, q, k, v, input_positions, others, params)
        else:
            if self.decode and not own:
                _decoding.check_cross(o, pattern)
                if not kept and self.is_mutable_collection("cache"):
                    for name, one in zip(_decoding.CACHE[:2], (k, v), strict=True):
                        self.put_variable("cache", name, one)
            y = _attention.attend(
                o, q, k, v, input_positions, own,
                q_segment_ids=q_segment_ids,
                kv_segment_ids=kv_segment_ids,
                kv_lengths=kv_lengths,
                key=self._dropout_key(deterministic, dropout_rng),
                **params,
            )  # fmt: skip
        out = self._projection("out", self.out_features or width, self.out_gain)
        return call(out, y, sampled)

    def _projection(self, name: str, features: int, gain: float = 1.0) -> Any:
        last = name == "out"
        return product(
            features,
            pattern=(self.projection_pattern or {}).get(name),
            sampling=self.sampling,
            kernel_init=(self.out_kernel_init if last else None) or self.kernel_init,
            bias_init=(self.out_bias_init if last else None) or self.bias_init,
            gain=gain,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            implementation=self.projection_implementation,
            name=name,
        )

    def _params(self, o: _attention.Options, pattern: Any) -> dict[str, Any]:
        sinks = memory = None
        if self.sinks:
            shape = (self.num_heads,)
            sinks = self.param("sinks", nn.initializers.zeros, shape, self.param_dtype)
        if self.persistent:
            shape = (o.persistent, o.num_kv_heads, o.head_dim)
            key_init, value_init = _memory.inits(o.head_dim, o.persistent)
            memory = _memory.Memory(
                self.param("persistent_key", key_init, shape, self.param_dtype),
                self.param("persistent_value", value_init, shape, self.param_dtype),
            )
        pattern = None if pattern is None else stored(self, pattern)
        return {"pattern": pattern, "sinks": sinks, "memory": memory}

    def _has_keys(self) -> bool:
        """Whether the cache has those of other inputs, which have no positions that count."""
        has = (self.has_variable("cache", name) for name in ("cached_key", "cache_index"))
        return tuple(has) == (True, False)

    def _cache(self, o: _attention.Options, k: Array) -> bool:
        """Whether there was a cache; if not, there is one now."""
        if self.has_variable("cache", "cached_key"):
            return True
        state = _decoding.empty(o, (*k.shape[:-2], 0), k.dtype, self.ragged)
        for name, value in zip(_decoding.CACHE, state, strict=True):
            if value is not None:
                self.variable("cache", name, lambda value=value: value)
        return False

    def _decoded(
        self, o: Any, q: Array, k: Array, v: Array, positions: Any, others: Any, params: Any
    ) -> Array:
        state = _decoding.State(*(self.get_variable("cache", name) for name in _decoding.CACHE))
        y, state = _decoding.step(o, state, q, k, v, positions, others, **params)
        for name, value in zip(_decoding.CACHE, state, strict=True):
            if value is not None:
                self.put_variable("cache", name, value)
        return y

    def _dropout_key(self, deterministic: bool | None, key: Any) -> Any:
        if not self.dropout_rate:
            return None
        if nn.merge_param("deterministic", self.deterministic, deterministic):
            return None
        return self.make_rng("dropout") if key is None else key
