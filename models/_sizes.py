"""The models that are compared: a sparse one, and dense ones of its size and of its width.

`config` is that of `models.transformer`.
"""

import math
from typing import Any

from models._cli import Mistake
from models._decoder import Size, block_sparse, dense, parameters


def hidden(config: Any, width: int, unit: int = 1) -> int:
    """Hidden features of a layer, a multiple of `unit`: as many weights with a gate as without."""
    return math.ceil(8 * width / 3 / unit) * unit if config.gated else 4 * width


def wide(config: Any, image: Any = None) -> Size:
    """The sparse model."""
    width, some = config.width, config.sparse != "none"
    return Size(
        width,
        hidden(config, width, 4 * config.block if some else config.sample_block),
        block_sparse if some else dense,
        dense if config.sparse == "mlp" else None,
        sparse_attention=config.attention != "dense",
        sample=config.sample,
        image=image,
    )


def full(config: Any, width: int, like: Size) -> Size:
    """A model that stores and computes everything, for the same data."""
    return Size(width, hidden(config, width), dense, image=like.image)


def narrower(config: Any, sparse: Size) -> Size:
    """The dense model with as many parameters as the sparse one."""
    wanted = parameters(config, sparse)
    step = 2 * config.heads  # rotary positions turn pairs of features
    size = full(config, step, sparse)
    while size.width < sparse.width:
        wider = full(config, size.width + step, sparse)
        if parameters(config, wider) > wanted:
            break
        size = wider
    # what the width leaves over goes into the hidden layers
    one, more = (parameters(config, size._replace(hidden=size.hidden + i)) for i in range(2))
    size = size._replace(hidden=max(1, size.hidden + round((wanted - one) / (more - one))))
    if abs(parameters(config, size) / wanted - 1) > 0.02:
        raise Mistake(
            f"no dense model with {config.heads} heads has as few as {wanted:,} parameters: give a "
            "larger --density or --width, or fewer --heads"
        )
    return size


def called(config: Any) -> str:
    """The name of the sparse model."""
    words = [] if config.sparse == "none" else ["block-sparse"]
    words += [] if config.attention == "dense" else [config.attention]
    return ", ".join(words + ([f"sampled {config.sample:g}"] if config.sample else []))
