"""Flax NNX modules: parameters only, the arithmetic is in `bsjax.ops`."""

import bsjax._serialization  # noqa: F401 - registers BlockPattern with flax.serialization
from bsjax.nnx._attention import BlockAttention as BlockAttention
from bsjax.nnx._conv import BlockConv as BlockConv
from bsjax.nnx._conv import fold_batch_norm as fold_batch_norm
from bsjax.nnx._linear import BlockLinear as BlockLinear
from bsjax.nnx._linear import Pattern as Pattern
from bsjax.nnx._mlp import BlockMLP as BlockMLP
from bsjax.nnx._positions import LearnedPositions as LearnedPositions
from bsjax.nnx._recurrent import BlockLSTMCell as BlockLSTMCell
from bsjax.nnx._recurrent import BlockMultiplicativeLSTMCell as BlockMultiplicativeLSTMCell
from bsjax.nnx._recurrent import SmallWorldLSTMCell as SmallWorldLSTMCell
from bsjax.nnx._rnn import RNN as RNN
from bsjax.nnx._sample_linears import sample_linears as sample_linears
from bsjax.nnx._sampled import SampledLinear as SampledLinear
from bsjax.nnx._transformer import BlockTransformerLayer as BlockTransformerLayer

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
    "Pattern",
    "SampledLinear",
    "SmallWorldLSTMCell",
    "fold_batch_norm",
    "sample_linears",
]
