"""Which keys the positions of a decoder see, by the name of a pattern: the masks of
`bsjax.nnx.BlockAttention`.

`config` is that of a recipe; `--window`, `--stride` and so on mean the same in each of them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bsjax
from bsjax import masks
from bsjax.masks import Mask
from models._cli import Mistake

type Masks = list[Mask]  # of one head each: heads take them in turn


def _window(config: Any) -> Masks:
    return [masks.causal() & masks.window(config.window - 1)]


def _strided(config: Any) -> Masks:
    stride = config.stride
    if config.per_head:
        return [masks.causal() & masks.window(stride - 1), masks.causal() & masks.every(stride)]
    return [masks.strided(stride)]


def _fixed(config: Any) -> Masks:
    stride, count = config.stride, config.summary
    if count > stride:
        raise Mistake(
            f"--summary {count} columns do not fit into a chunk of --stride {stride}: give fewer"
        )
    if config.per_head:
        return [
            masks.causal() & masks.chunks(stride),
            masks.causal() & masks.summary(stride, count),
        ]
    return [masks.fixed(stride, count)]


# "dense" is not among them: it is jax.nn.dot_product_attention
MASKS: dict[str, Callable[[Any], Masks]] = {
    "causal": lambda c: [masks.causal()],
    "window": _window,
    "window_sinks": lambda c: [masks.streaming(c.window, c.sinks)],
    "chunks": lambda c: [masks.causal() & masks.chunks(c.window)],
    "local_global": lambda c: [masks.causal() & masks.longformer(c.window - 1, c.sinks)],
    "bigbird": lambda c: [masks.causal()],
    "strided": _strided,
    "fixed": _fixed,
    "dilated": lambda c: [masks.causal() & masks.dilated(c.window * c.dilation - 1, c.dilation)],
    "top_blocks": lambda c: [masks.causal()],
}
PATTERNS = ("dense", *MASKS)


def options(config: Any, heads: int, layer: int) -> dict[str, Any]:
    """The arguments of a `BlockAttention` with so many heads that say what is seen.

    Bigbird draws blocks, by the seed and the layer: a pattern of `--length` positions. Every other
    mask is good for any length. With top_blocks queries choose among the blocks of theirs.
    """
    found: dict[str, Any] = {"mask": mask(config, heads), "block": config.attention_block}
    if config.attention == "bigbird":
        found["pattern"] = _bigbird(config, 1000 * config.seed + layer)
    if config.attention == "top_blocks":
        found["top_blocks"] = config.top_blocks
    return found


@functools.cache  # models of one mask are equal, and compile once
def mask(config: Any, heads: int) -> Mask:
    """What the pattern `--attention` shows to so many heads."""
    each = MASKS[config.attention](config)
    if heads % len(each):
        raise Mistake(
            f"--per_head gives {len(each)} parts of the pattern to heads in turn, but there are "
            f"{heads} on a device: give a multiple of {len(each)} with --heads, or --no-per_head"
        )
    return each[0] if len(each) == 1 else masks.per_head(each * (heads // len(each)))


def _bigbird(config: Any, seed: int) -> bsjax.BlockPattern:
    side = math.ceil(config.length / config.attention_block)
    near = math.ceil(config.window / config.attention_block)
    ends = math.ceil(config.sinks / config.attention_block)
    drawn = bsjax.patterns.bigbird(
        (side, side), window=2 * near + 1, ends=ends, random=config.random_blocks, seed=seed
    )
    return bsjax.BlockPattern.from_mask(drawn & np.tri(side, dtype=bool), config.attention_block)


def stored(config: Any, heads: int) -> float:
    """The stored share of the blocks that causal attention has. With top_blocks, that which could
    be stored: the queries of a block may all choose others."""
    grid = (config.length, config.length)
    found = options(config, heads, 0)
    blocks, whole = (
        m.blocks(grid, config.attention_block)[0] for m in (found["mask"], masks.causal())
    )
    if "top_blocks" in found:
        return _room(config) / float(whole.sum())
    if "pattern" in found:
        blocks = found["pattern"].mask()
    return float(np.mean(blocks.reshape(-1, *whole.shape).sum((1, 2)) / whole.sum()))


def _room(config: Any) -> int:
    """Slots for the blocks that the queries of one head choose, whatever these are."""
    x = jnp.zeros((config.length, 1, 1))
    how = {"block": config.attention_block, "count": config.top_blocks}
    return jax.eval_shape(lambda x: bsjax.top_blocks(x, x, **how)[0].row, x).shape[-1]
