"""bsjax: sparse networks in JAX that are faster than dense ones on the wall clock.

    p = bsjax.BlockPattern.from_mask(mask, block=64)      which blocks exist
    y = bsjax.matmul(x, values, p)                        values[e, 64, 64]: an ordinary array

Flax modules live in `bsjax.nnx` and `bsjax.linen`, pictures in `bsjax.plot`; each is imported by
name, since `import bsjax` itself needs only jax, numpy and jaxtyping.
"""

from bsjax import inits as inits
from bsjax import masks as masks
from bsjax import patterns as patterns
from bsjax.ops import attention as attention
from bsjax.ops import block_norms as block_norms
from bsjax.ops import fromdense as fromdense
from bsjax.ops import glu as glu
from bsjax.ops import matmul as matmul
from bsjax.ops import sample as sample
from bsjax.ops import sampled_conv as sampled_conv
from bsjax.ops import sampled_matmul as sampled_matmul
from bsjax.ops import scan as scan
from bsjax.ops import sddmm as sddmm
from bsjax.ops import todense as todense
from bsjax.ops import top_blocks as top_blocks
from bsjax.pattern import BlockPattern as BlockPattern
from bsjax.pattern import check as check
from bsjax.pattern import partition as partition

__all__ = [
    "BlockPattern",
    "attention",
    "block_norms",
    "check",
    "fromdense",
    "glu",
    "inits",
    "masks",
    "matmul",
    "partition",
    "patterns",
    "sample",
    "sampled_conv",
    "sampled_matmul",
    "scan",
    "sddmm",
    "todense",
    "top_blocks",
]
