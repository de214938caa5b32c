"""The operations on block-sparse matrices."""

from bsjax.ops._attention import attention as attention
from bsjax.ops._block_norms import block_norms as block_norms
from bsjax.ops._choose import Implementation as Implementation
from bsjax.ops._products import fromdense as fromdense
from bsjax.ops._products import glu as glu
from bsjax.ops._products import matmul as matmul
from bsjax.ops._products import sddmm as sddmm
from bsjax.ops._products import todense as todense
from bsjax.ops._sample import sample as sample
from bsjax.ops._sampled import Policy as Policy
from bsjax.ops._sampled import sampled_matmul as sampled_matmul
from bsjax.ops._sampled_conv import sampled_conv as sampled_conv
from bsjax.ops._samplers import Sampler as Sampler
from bsjax.ops._scan import scan as scan
from bsjax.ops._top_blocks import top_blocks as top_blocks

__all__ = [
    "Implementation",
    "Policy",
    "Sampler",
    "attention",
    "block_norms",
    "fromdense",
    "glu",
    "matmul",
    "sample",
    "sampled_conv",
    "sampled_matmul",
    "scan",
    "sddmm",
    "todense",
    "top_blocks",
]
