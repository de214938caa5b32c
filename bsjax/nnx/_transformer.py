"""`BlockTransformerLayer` for Flax NNX."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bsjax import _transformer
from bsjax.nnx._attention import BlockAttention
from bsjax.nnx._mlp import BlockMLP
from bsjax.nnx._products import DenseMLP

LAYER = "BlockTransformerLayer"


class BlockTransformerLayer(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`: normalised before each part.

    * `attention`: the arguments of `BlockAttention` beyond features and heads, such as `mask`,
      `block`, `rotary`, `num_kv_heads`.
    * `mlp`: the arguments of `BlockMLP` beyond features, `hidden_features` at least; without a
      `pattern` it is dense. None where `attention["persistent"]` memory takes its place, as in the
      all-attention network of Sukhbaatar et al. 2019.
    * `cross_attention`: the arguments of a second `BlockAttention`, between the two, whose keys are
      the second argument of a call: for decoders of encoder-decoder models (Vaswani et al. 2017).
    * `sampling`: options of `SampledLinear`, `{"fraction": 0.5}`, for all products that are dense.
    * `norm`: "rms" (`nnx.RMSNorm`) or "layer" (`nnx.LayerNorm`), of `epsilon`.
    * `dropout_rate`: of what each part adds; `attention["dropout_rate"]` is that of probabilities.
    * `residual_gain`: what the initial weights of the last product of each part are multiplied by:
      `(2 * layers) ** -0.5` keeps the sum of all at the size of one (Radford et al. 2019).

    Submodules `attention_norm`, `attention`, `cross_norm`, `cross_attention`, `mlp_norm`, `mlp`.
    Positions that are learned belong to the model, before its first layer: `LearnedPositions`.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        attention: Mapping[str, Any] | None = None,
        mlp: Mapping[str, Any] | None = None,
        cross_attention: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
        norm: str = "rms",
        epsilon: float = 1e-6,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        residual_gain: float = 1.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        _transformer.check_layer(LAYER, norm=norm, attention=attention, mlp=mlp)
        self.dropout_rate, self.deterministic = dropout_rate, deterministic
        types: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def normalize() -> Any:
            kind = nnx.RMSNorm if norm == "rms" else nnx.LayerNorm
            return kind(features, epsilon=epsilon, **types)

        def attend(options: Mapping[str, Any] | None) -> BlockAttention:
            own: Any = {"sampling": sampling, "out_gain": residual_gain, **types}
            own |= {"deterministic": deterministic} | dict(options or {})
            return BlockAttention(num_heads, features, **own)

        self.attention_norm, self.attention = normalize(), attend(attention)
        self.cross_norm = self.cross_attention = nnx.data(None)
        if cross_attention is not None:
            self.cross_norm, self.cross_attention = normalize(), attend(cross_attention)
        self.mlp_norm = self.mlp = nnx.data(None)
        if mlp is not None:
            sparse, options = _transformer.mlp_options(mlp, residual_gain)
            self.mlp_norm, hidden = normalize(), options.pop("hidden_features")
            if sparse:
                self.mlp = BlockMLP(features, hidden, **types, **options)
            else:
                self.mlp = DenseMLP(features, hidden, sampling=sampling, **types, **options)
        self.dropout = nnx.Dropout(
            dropout_rate, deterministic=False, rngs=rngs if dropout_rate else None
        )

    def __call__(
        self,
        x: Any,
        encoded: Any = None,
        *,
        q_segment_ids: Any = None,
        kv_lengths: Any = None,
        encoded_segment_ids: Any = None,
        encoded_lengths: Any = None,
        bias: Any = None,
        input_positions: Any = None,
        deterministic: bool | None = None,
        rngs: Any = None,
        decode: bool | None = None,
    ) -> Float[Array, "*n q m"]:
        """The layer's output for `x[..., positions, features]`, and the output of an encoder if the
        layer attends to one and has not kept its keys in the cache. `encoded_lengths` and
        `encoded_segment_ids` are of the latter; the other arguments are those of a call of
        `BlockAttention`."""
        cross = self.cross_attention
        kept = (
            cross is not None and cross.has_keys() and (cross.decode if decode is None else decode)
        )
        if encoded is not None or not kept:
            _transformer.check_encoded(LAYER, encoded, cross)
        if deterministic is None:
            deterministic = self.deterministic
        common: Any = {"deterministic": deterministic, "rngs": rngs}

        def dropped(y: Array) -> Array:
            return self.dropout(y, **common) if self.dropout_rate else y

        x = jnp.asarray(x)
        y = self.attention(
            self.attention_norm(x),
            q_segment_ids=q_segment_ids,
            kv_lengths=kv_lengths,
            bias=bias,
            input_positions=input_positions,
            decode=decode,
            **common,
        )
        x = x + dropped(y)
        if self.cross_attention is not None and self.cross_norm is not None:
            y = self.cross_attention(
                self.cross_norm(x),
                encoded,
                q_segment_ids=None if encoded_segment_ids is None else q_segment_ids,
                kv_segment_ids=encoded_segment_ids,
                kv_lengths=encoded_lengths,
                decode=decode,
                **common,
            )
            x = x + dropped(y)
        if self.mlp is None or self.mlp_norm is None:
            return x
        y = self.mlp_norm(x)
        if isinstance(self.mlp, BlockMLP):
            if not self.dropout_rate:
                return self.mlp(y, residual=x)
            return x + dropped(self.mlp(y))
        streams = rngs if isinstance(rngs, nnx.Rngs) else None
        return x + dropped(self.mlp(y, deterministic=deterministic, rngs=streams))

    def init_cache(
        self,
        input_shape: tuple[int, ...],
        dtype: Any = None,
        *,
        encoded: Any = None,
        ragged: bool = False,
    ) -> None:
        """An empty cache for inputs of this shape, `(..., positions, features)`. With the output of
        an encoder, its keys and values are computed now, and calls with `decode=True` need no
        `encoded`. `ragged` as in `BlockAttention`."""
        self.attention.init_cache(input_shape, dtype, ragged=ragged)
        if encoded is not None:
            _transformer.check_encoded(LAYER, encoded, self.cross_attention)
        if (cross := self.cross_attention) is not None:
            cross.cached_key = cross.cached_value = nnx.data(None)
            if encoded is not None:
                cross.cache_keys(encoded)

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` calls, for the attribute `deterministic`."""
        if deterministic is not None:
            self.deterministic = deterministic
