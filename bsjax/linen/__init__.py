"""Flax Linen modules: parameters only, the arithmetic is in `bsjax.ops`."""

import bsjax._serialization  # noqa: F401 - registers BlockPattern with flax.serialization
from bsjax.linen._attention import BlockAttention as BlockAttention
from bsjax.linen._conv import BlockConv as BlockConv
from bsjax.linen._conv import fold_batch_norm as fold_batch_norm
from bsjax.linen._convert import from_nnx as from_nnx
from bsjax.linen._convert import to_nnx as to_nnx
from bsjax.linen._linear import BlockLinear as BlockLinear
from bsjax.linen._mlp import BlockMLP as BlockMLP
from bsjax.linen._positions import LearnedPositions as LearnedPositions
from bsjax.linen._recurrent import BlockLSTMCell as BlockLSTMCell
from bsjax.linen._recurrent import BlockMultiplicativeLSTMCell as BlockMultiplicativeLSTMCell
from bsjax.linen._recurrent import SmallWorldLSTMCell as SmallWorldLSTMCell
from bsjax.linen._rnn import RNN as RNN
from bsjax.linen._sampled import SampledLinear as SampledLinear
from bsjax.linen._transformer import BlockTransformerLayer as BlockTransformerLayer

__all__ = [
    "RNN",
    "BlockAttention",
    "BlockConv",
    "BlockLSTMCell",
    "BlockLinear",
    "BlockMLP",
    "BlockMultiplicativeLSTMCell",
    "BlockTransformerLayer",
    "LearnedPositions",
    "SampledLinear",
    "SmallWorldLSTMCell",
    "fold_batch_norm",
    "from_nnx",
    "to_nnx",
]
