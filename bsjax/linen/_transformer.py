"""`BlockTransformerLayer` for Flax Linen."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bsjax import _transformer
from bsjax.linen._attention import BlockAttention
from bsjax.linen._mlp import BlockMLP
from bsjax.linen._products import DenseMLP, frozen

LAYER = "BlockTransformerLayer"


class BlockTransformerLayer(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`: normalised before each part.

    The fields of `bsjax.nnx.BlockTransformerLayer`, without `features` and `rngs`, and its
    submodules. `decode` as in `BlockAttention`.
    """

    num_heads: int
    _: dataclasses.KW_ONLY
    attention: Mapping[str, Any] | None = None
    mlp: Mapping[str, Any] | None = None
    cross_attention: Mapping[str, Any] | None = None
    sampling: Mapping[str, Any] | None = None
    norm: str = "rms"
    epsilon: float = 1e-6
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    residual_gain: float = 1.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    decode: bool = False

    def __post_init__(self) -> None:
        _transformer.check_layer(LAYER, norm=self.norm, attention=self.attention, mlp=self.mlp)
        for name in ("attention", "mlp", "cross_attention"):
            object.__setattr__(self, name, frozen(LAYER, getattr(self, name)))
        super().__post_init__()

    @nn.compact
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
    ) -> Float[Array, "*n q m"]:
        """As a call of `bsjax.nnx.BlockTransformerLayer`."""
        cached = self.variables.get("cache", {}).get("cross_attention", {})
        if encoded is not None or not (self.decode and "cached_key" in cached):
            _transformer.check_encoded(LAYER, encoded, self.cross_attention)
        if deterministic is None:
            deterministic = self.deterministic
        types: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def normalize(name: str, x: Array) -> Array:
            kind = nn.RMSNorm if self.norm == "rms" else nn.LayerNorm
            return kind(epsilon=self.epsilon, name=name, **types)(x)

        def attend(name: str, options: Any) -> BlockAttention:
            own: Any = {"sampling": self.sampling, "out_gain": self.residual_gain, **types}
            own |= {"decode": self.decode, "name": name} | dict(options or {})
            return BlockAttention(self.num_heads, **own)

        def dropped(y: Array) -> Array:
            if not self.dropout_rate:
                return y
            return nn.Dropout(self.dropout_rate)(y, deterministic=deterministic)

        x = jnp.asarray(x)
        y = attend("attention", self.attention)(
            normalize("attention_norm", x),
            q_segment_ids=q_segment_ids,
            kv_lengths=kv_lengths,
            bias=bias,
            input_positions=input_positions,
            deterministic=deterministic,
        )
        x = x + dropped(y)
        if self.cross_attention is not None:
            y = attend("cross_attention", self.cross_attention)(
                normalize("cross_norm", x),
                encoded,
                q_segment_ids=None if encoded_segment_ids is None else q_segment_ids,
                kv_segment_ids=encoded_segment_ids,
                kv_lengths=encoded_lengths,
                deterministic=deterministic,
            )
            x = x + dropped(y)
        if self.mlp is None:
            return x
        y = normalize("mlp_norm", x)
        sparse, options = _transformer.mlp_options(self.mlp, self.residual_gain)
        hidden = options.pop("hidden_features")
        if not sparse:
            dense = DenseMLP(hidden, sampling=self.sampling, name="mlp", **types, **options)
            return x + dropped(dense(y, deterministic=deterministic))
        mlp = BlockMLP(hidden, name="mlp", **types, **options)
        return x + dropped(mlp(y)) if self.dropout_rate else mlp(y, residual=x)
