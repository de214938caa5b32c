"""`BlockAttention` for Flax NNX."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bsjax import _attention, _decoding, _memory, _transformer
from bsjax.nnx._linear import Pattern
from bsjax.nnx._products import call, product
from bsjax.ops import Implementation

LAYER = _attention.LAYER


class BlockAttention(nnx.Module):
    """Multi-head attention that stores some blocks of scores, and computes only those.

    The arguments of `nnx.MultiHeadAttention`, submodules `query`, `key`, `value` and `out` (whose
    kernels are matrices: heads lie beside each other), and:

    * `mask`, one of `bsjax.masks`, says which keys a query sees; the blocks follow from the lengths
      when the layer is traced. Or `pattern` gives the blocks, a `BlockPattern` for sequences of one
      length, kept in a variable `pattern`, and `mask` (of `bsjax.masks` or any function of indices)
      what is seen inside them. With neither, everything is. `block` is that of queries and keys.
    * `top_blocks`: so many key blocks are chosen at run time, by every query and head: its own, and
      those before it whose mean key fits it best, of what the pattern or mask stores for its block
      of queries. Nothing behind a query is seen. After Lu et al. 2025, "MoBA: Mixture of Block
      Attention for Long-Context LLMs" (`bsjax.top_blocks`).
    * `num_kv_heads`: grouped-query attention. `rotary`: rotary positions, of `rotary_base`.
    * `sinks`: a learned logit `sinks[h]` for each head in the denominator. `softcap`: a bound.
    * `persistent`: so many learned keys and values for each head of keys, `persistent_key` and
      `persistent_value`, which every query sees, in one softmax with the others. After
      Sukhbaatar, Grave, Lample, Jegou and Joulin 2019, "Augmenting Self-attention with Persistent
      Memory", who put them in the place of feed-forward layers.
    * `projection_pattern`: block-sparse projections, a mask (with `projection_block`) or pattern
      for all, or a mapping of names to those; the others are dense, or `SampledLinear`s with the
      options `sampling` (`{"fraction": 0.5}`).
    * `out_gain`: what the initial weights of `out` are multiplied by.

    Dropout of probabilities and `deterministic`, `rngs` and `keep_rngs` as in Flax.

    Decoding as in Flax: `init_cache`, then calls with `decode=True`, each of one position or of
    several, a prompt in chunks for example. A position sees what it sees in the whole sequence, but
    nothing behind itself: where the mask is causal the results are those of the whole sequence.
    Only the key blocks are read that the new positions need. After `init_cache(..., ragged=True)`
    each sequence has positions of its own, and `kv_lengths` says how many of the new ones it has:
    prompts of unequal length, padded behind. After `cache_keys(inputs_k)`, calls with `decode=True`
    attend to keys and values of other inputs that are computed once.
    """

    cached_key: Any
    cached_value: Any
    cache_index: Any

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        mask: Any = None,
        pattern: Any = None,
        block: int | tuple[int, int] | None = None,
        top_blocks: int | None = None,
        rotary: bool = False,
        rotary_base: float = 10_000.0,
        sinks: bool = False,
        softcap: float | None = None,
        persistent: int = 0,
        projection_pattern: Any = None,
        projection_block: int | tuple[int, int] | None = None,
        projection_implementation: Implementation = "auto",
        sampling: Mapping[str, Any] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        precision: Any = None,
        kernel_init: Any = None,
        out_kernel_init: Any = None,
        out_gain: float = 1.0,
        bias_init: Any = jax.nn.initializers.zeros,
        out_bias_init: Any = None,
        use_bias: bool = True,
        decode: bool | None = None,
        normalize_qk: bool = False,
        implementation: Implementation = "auto",
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
    ) -> None:
        self.in_features, self.out_features = in_features, out_features or in_features
        self.qkv_features = qkv_features or in_features
        self.in_kv_features = in_kv_features or in_features
        self.dtype, self.param_dtype = dtype, param_dtype
        self.deterministic, self.decode, self.dropout_rate = deterministic, decode, dropout_rate
        self.options, pattern = _attention.options(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            qkv_features=self.qkv_features,
            mask=mask,
            pattern=pattern,
            block=block,
            top_blocks=top_blocks,
            rotary=rotary,
            rotary_base=rotary_base,
            softcap=softcap,
            persistent=persistent,
            dropout_rate=dropout_rate,
            implementation=implementation,
        )
        self.pattern: Pattern | None = nnx.data(None if pattern is None else Pattern.of(pattern))
        self._projections(
            _transformer.projections(LAYER, projection_pattern, projection_block),
            (kernel_init, out_kernel_init or kernel_init, out_gain),
            (bias_init, out_bias_init or bias_init),
            sampling=sampling,
            precision=precision,
            implementation=projection_implementation,
            use_bias=use_bias,
            rngs=rngs,
        )
        o, names = self.options, ("query_ln", "key_ln", "sinks", "persistent_key")
        for name in (*names, "persistent_value", *_decoding.CACHE):
            setattr(self, name, nnx.data(None))
        if normalize_qk:
            norm: Any = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype}
            self.query_ln = nnx.LayerNorm(o.head_dim, rngs=rngs, **norm)
            self.key_ln = nnx.LayerNorm(o.head_dim, rngs=rngs, **norm)
        if sinks:
            self.sinks = nnx.Param(jnp.zeros((num_heads,), param_dtype))
        if persistent:
            shape = (persistent, o.num_kv_heads, o.head_dim)
            key_init, value_init = _memory.inits(o.head_dim, persistent)
            self.persistent_key = nnx.Param(key_init(rngs.params(), shape, param_dtype))
            self.persistent_value = nnx.Param(value_init(rngs.params(), shape, param_dtype))
        kept = keep_rngs and dropout_rate > 0
        self.rngs = rngs.dropout.fork() if kept else nnx.data(None)

    def _projections(self, patterns: Any, kernels: Any, biases: Any, **common: Any) -> None:
        o = self.options
        (inner, outer, gain), (bias, out_bias) = kernels, biases
        kv = (self.in_kv_features, o.num_kv_heads * o.head_dim)
        common |= {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def layer(name: str, features: Any, init: Any, bias_init: Any, gain: float = 1.0) -> Any:
            p = patterns.get(name)
            return product(
                features, pattern=p, kernel_init=init, bias_init=bias_init, gain=gain, **common
            )

        self.query = layer("query", (self.in_features, self.qkv_features), inner, bias)
        self.key, self.value = (layer(name, kv, inner, bias) for name in ("key", "value"))
        self.out = layer("out", (self.qkv_features, self.out_features), outer, out_bias, gain)

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
        rngs: Any = None,
        decode: bool | None = None,
    ) -> Float[Array, "*n q m"]:
        """`out(attention(query(inputs_q), key(inputs_k), value(inputs_v)))`, inputs
        `[..., positions, features]`; keys are those of the queries, and values those of the keys,
        unless given.

        Segments and lengths as in `bsjax.attention`; keys as many as queries have the segments of
        these. `bias(head, q_index, k_index)` is added to scores: by distance for example, from a
        table that the model learns. `input_positions` are those of rotary queries, and of keys
        unless these are given.
        """
        o, decode = self.options, self.decode if decode is None else decode
        streams = rngs if isinstance(rngs, nnx.Rngs) else None
        inputs = _attention.inputs(inputs_q, inputs_k, inputs_v)
        q = _attention.heads(call(self.query, inputs[0], deterministic, streams), o.num_heads)
        q = q if self.query_ln is None else self.query_ln(q)
        kept = bool(decode) and inputs_k is None and self.has_keys()
        own = inputs_k is None and not kept
        if kept:
            k, v = self.cached_key[...], self.cached_value[...]
        else:
            k, v = self._keys(*inputs[1:], deterministic, streams)
        params: dict[str, Any] = {
            "pattern": None if self.pattern is None else self.pattern.get_value(),
            "sinks": None if self.sinks is None else self.sinks[...],
            "memory": None,
            "bias": bias,
        }
        if self.persistent_key is not None and self.persistent_value is not None:
            params["memory"] = _memory.Memory(self.persistent_key[...], self.persistent_value[...])
        if decode and own:
            others = (q_segment_ids, kv_segment_ids, kv_lengths)
            y = self._decoded(q, k, v, input_positions, others, params)
        else:
            if decode:
                _decoding.check_cross(o, self.pattern)
            y = _attention.attend(
                o, q, k, v, input_positions, own,
                q_segment_ids=q_segment_ids,
                kv_segment_ids=kv_segment_ids,
                kv_lengths=kv_lengths,
                key=self._dropout_key(deterministic, rngs),
                **params,
            )  # fmt: skip
        return call(self.out, y, deterministic, streams)

    def _decoded(
        self, q: Array, k: Array, v: Array, positions: Any, others: Any, params: Any
    ) -> Array:
        kept: list[Any] = [getattr(self, name) for name in _decoding.CACHE]
        if kept[0] is None:
            raise ValueError(
                f"{LAYER}: there is no cache to decode with: call init_cache(input_shape) first, "
                "with the shape of the whole sequence."
            )
        parts: list[Any] = [None if one is None else one[...] for one in kept]
        y, state = _decoding.step(
            self.options, _decoding.State(*parts), q, k, v, positions, others, **params
        )
        for one, value in zip(kept, state, strict=True):
            if one is not None:
                one[...] = value
        return y

    def _keys(self, k: Any, v: Any, deterministic: Any, streams: Any) -> tuple[Array, Array]:
        k, v = (
            _attention.heads(call(layer, x, deterministic, streams), self.options.num_kv_heads)
            for layer, x in ((self.key, k), (self.value, v))
        )
        return k if self.key_ln is None else self.key_ln(k), v

    def cache_keys(self, inputs_k: Any, inputs_v: Any = None) -> None:
        """Keeps the keys and values of other inputs, an encoder's output for example: calls with
        `decode=True` and without `inputs_k` attend to these. Values are those of the keys unless
        given."""
        _decoding.check_cross(self.options, self.pattern)
        k, v = self._keys(inputs_k, inputs_k if inputs_v is None else inputs_v, True, None)
        for name in _decoding.CACHE:
            setattr(self, name, nnx.data(None))
        self.cached_key, self.cached_value = nnx.Cache(k), nnx.Cache(v)

    def has_keys(self) -> bool:
        """Whether `cache_keys` has kept those of other inputs."""
        return self.cached_key is not None and self.cache_index is None

    def init_cache(
        self, input_shape: tuple[int, ...], dtype: Any = None, *, ragged: bool = False
    ) -> None:
        """An empty cache for inputs of this shape, `(..., positions, features)`: what may be
        decoded in all. `dtype` is that of the layer unless given. If `ragged`, `cache_index[...]`
        counts the positions of each sequence."""
        dtype = dtype or self.dtype or self.param_dtype
        state = _decoding.empty(self.options, input_shape, dtype, ragged)
        for name, value in zip(_decoding.CACHE, state, strict=True):
            setattr(self, name, nnx.data(None) if value is None else nnx.Cache(value))

    def set_view(
        self,
        deterministic: bool | None = None,
        decode: bool | None = None,
        batch_size: int | tuple[int, ...] | None = None,
        max_length: int | None = None,
    ) -> None:
        """What `nnx.view` calls, as in `nnx.MultiHeadAttention`."""
        if deterministic is not None:
            self.deterministic = deterministic
        if decode is not None:
            self.decode = decode
        if batch_size is not None and max_length is not None:
            lead = (batch_size,) if isinstance(batch_size, int) else tuple(batch_size)
            self.init_cache((*lead, max_length, self.in_features))

    def _dropout_key(self, deterministic: bool | None, rngs: Any) -> Any:
        if not self.dropout_rate:
            return None
        deterministic = self.deterministic if deterministic is None else deterministic
        if deterministic is None:
            raise ValueError(
                f"{LAYER}: `deterministic` is None here and in the layer, which has dropout: call "
                "it with deterministic=False to drop, or deterministic=True."
            )
        if deterministic:
            return None
        stream = self.rngs if rngs is None else rngs
        if stream is None:
            raise ValueError(
                f"{LAYER}: there is no stream to drop with, since the layer was made with "
                "keep_rngs=False: call it with rngs=."
            )
        return stream.dropout() if isinstance(stream, nnx.Rngs) else stream()
