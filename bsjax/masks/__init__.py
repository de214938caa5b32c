"""Which keys a query sees: element masks for `bsjax.attention`, and the blocks that they need.

    mask = masks.causal() & (masks.window(511) | masks.prefix(4))
    p, full = mask.pattern((4096, 4096), block=64)          in milliseconds, from arithmetic
    y = bsjax.attention(q, k, v, p, mask=mask, full=full)

Masks compose with `&`, `|` and `~`. With `block=1`, `mask.blocks` is a generator of patterns.
"""

from bsjax.masks._bigbird import bigbird as bigbird
from bsjax.masks._mask import Mask as Mask
from bsjax.masks._mask import per_head as per_head
from bsjax.masks._named import causal as causal
from bsjax.masks._named import chunks as chunks
from bsjax.masks._named import dilated as dilated
from bsjax.masks._named import documents as documents
from bsjax.masks._named import every as every
from bsjax.masks._named import fixed as fixed
from bsjax.masks._named import longformer as longformer
from bsjax.masks._named import prefix as prefix
from bsjax.masks._named import prefix_lm as prefix_lm
from bsjax.masks._named import streaming as streaming
from bsjax.masks._named import strided as strided
from bsjax.masks._named import summary as summary
from bsjax.masks._named import window as window

__all__ = [
    "Mask",
    "bigbird",
    "causal",
    "chunks",
    "dilated",
    "documents",
    "every",
    "fixed",
    "longformer",
    "per_head",
    "prefix",
    "prefix_lm",
    "streaming",
    "strided",
    "summary",
    "window",
]
