"""`BlockConv` for Flax Linen, and batch normalisation that is folded into it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bsjax import _conv_layer
from bsjax.linen._block import BlockLayer
from bsjax.linen._linear import BlockLinear
from bsjax.pattern import BlockPattern


class BlockConv(BlockLayer):
    """`y[..., *space, out] = conv(x[..., *space, in], S) + bias`, dense in the taps, where S stores
    only the blocks of channels that `pattern` has.

    The fields of `bsjax.nnx.BlockConv`, without `in_features` and `rngs`: the features in are
    those of the input, as many as end inside the last block-row. Two collections, as in
    `bsjax.linen.BlockLinear`: `params` with `values[e, *kernel_size, br, bc]` and `bias[out]`, and
    `patterns` with the coordinates `row[e]` and `col[e]` and the sizes `grid` and `block`.
    """

    LAYER = "BlockConv"

    kernel_size: int | tuple[int, ...]
    strides: int | tuple[int, ...] | None = 1
    _: dataclasses.KW_ONLY
    padding: Any = "SAME"
    kernel_dilation: int | tuple[int, ...] | None = 1

    @nn.compact
    def __call__(
        self, x: Any, *, activation: Any = None, residual: Any = None
    ) -> Float[Array, "..."]:
        """`activation(conv(x) + bias) + residual`: the last two where they are given."""
        window = _conv_layer.as_window(self.LAYER, self.kernel_size)
        features, p, values, bias = self.weights(x, window)
        return _conv_layer.conv(
            x,
            values,
            bias,
            p,
            features=features,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            dtype=self.dtype,
            precision=self.precision,
            implementation=self.implementation,
            activation=activation,
            residual=residual,
        )


def fold_batch_norm[L: (BlockConv, BlockLinear)](
    layer: L, variables: Mapping[str, Any], norm: nn.BatchNorm, norm_variables: Mapping[str, Any]
) -> tuple[L, dict[str, Any]]:
    """One layer for inference, and its variables, that does what `norm(layer(x))` does with running
    averages: `bsjax.nnx.fold_batch_norm` in Linen.

    `variables` are those of the layer alone, `{"params": ..., "patterns": ...}`, and
    `norm_variables` those of the normalisation, `{"params": ..., "batch_stats": ...}`. The new
    layer always has a bias.
    """
    _conv_layer.check_foldable(layer, norm, (BlockConv, BlockLinear), nn.BatchNorm)
    params, coordinates = _own("variables", variables, params="values", patterns="col")
    stats, gains = _own("norm_variables", norm_variables, batch_stats="mean", params=None)
    _conv_layer.check_normalised(layer.out_features, stats["mean"].shape[-1])
    p: BlockPattern = layer.pattern
    values, bias = _conv_layer.folded(
        params["values"],
        params.get("bias"),
        BlockPattern(coordinates["row"], coordinates["col"], p.grid, p.block),
        stats["mean"],
        stats["var"],
        gains.get("scale"),
        gains.get("bias"),
        norm.epsilon,
    )
    new = {**variables, "params": {"values": values, "bias": bias}}
    return layer.clone(use_bias=True), new


def _own(name: str, variables: Mapping[str, Any], **leaves: str | None) -> list[Any]:
    """Collections of one layer, each with the leaf that it must have."""
    for collection, leaf in leaves.items():
        if leaf is not None and leaf not in variables.get(collection, ()):
            raise ValueError(
                f"fold_batch_norm: `{name}` lack {collection}/{leaf}: give the variables of this "
                "layer alone, a mapping of collections."
            )
    return [jax.tree.map(jnp.asarray, variables.get(one, {})) for one in leaves]
