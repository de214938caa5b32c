"""Small-world cells from graphs of blocks: patterns, parameters, and how wide they get."""

import math
from collections.abc import Sequence
from typing import Any

from bsjax import patterns
from bsjax._recurrent import GATES, SMALL_WORLD, check_sizes
from bsjax.pattern import BlockPattern


def graph_patterns(
    hidden_features: int, block: int, depth: int, graph: Any, parameters: Any, **drawn: Any
) -> list[BlockPattern]:
    """A pattern for each internal step and one for the gates, of graphs of blocks."""
    check_sizes(SMALL_WORLD.cell, hidden_features=hidden_features, block=block, depth=depth)
    n = -(-hidden_features // block)
    masks = patterns.step_masks(n, depth, graph, _parameters(graph, parameters), **drawn)
    made = {id(mask): BlockPattern.from_mask(mask, block) for mask in masks}
    return [made[id(mask)] for mask in masks]


def small_world_parameters(
    in_features: int,
    hidden_features: int,
    step_patterns: Sequence[BlockPattern],
    *,
    in_stride: int = 1,
    use_layer_norm: bool = True,
) -> int:
    """`2 p (in + v) + br bc (sum_{j < D} e_j + 4 e_D) + (D + 4) v m`: the parameters of a cell with
    D internal steps. p is `ceil(m / in_stride)`; v, the vectors of each product, is 2 with layer
    norm and 1 without."""
    vectors, depth = 1 + use_layer_norm, len(step_patterns) - 1
    count, projected = SMALL_WORLD.projected(hidden_features, in_stride)
    stored = [p.capacity * math.prod(p.block) for p in step_patterns]
    matrices = sum(stored[:-1]) + GATES * stored[-1]
    inputs = count * projected * (in_features + vectors)
    return inputs + matrices + (depth + GATES) * vectors * hidden_features


def hidden_within(
    budget: int,
    in_features: int,
    block: int,
    depth: int,
    graph: Any,
    parameters: Any,
    drawn: Any,
    *,
    in_stride: int = 1,
    use_layer_norm: bool = True,
    **_: Any,
) -> int:
    """The most hidden features, in whole blocks, with which a cell has at most `budget`
    parameters."""

    def count(n: int) -> int:
        found = graph_patterns(n * block, block, depth, graph, parameters, **drawn)
        return small_world_parameters(
            in_features, n * block, found, in_stride=in_stride, use_layer_norm=use_layer_norm
        )

    low = least = _smallest(graph, _parameters(graph, parameters))
    if count(least) > budget:
        raise ValueError(
            f"{SMALL_WORLD.cell}: a state of {least} blocks of {block} has {count(least):,} "
            f"parameters, more than the {budget:,} given: raise `budget`, or take smaller blocks, "
            "a smaller depth or a sparser graph."
        )
    high = 2 * low
    while count(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= budget else (low, middle)
    return low * block


def _parameters(graph: Any, parameters: Any) -> Any:
    return {"m": 4} if parameters is None and graph == "barabasi_albert" else parameters


def _smallest(graph: Any, parameters: Any) -> int:
    """The fewest nodes that a graph with these parameters has."""
    parameters = parameters or {}
    if graph == "barabasi_albert":
        return int(parameters.get("m", 0)) + 1
    if graph == "watts_strogatz":
        return 2 * int(parameters.get("k_half", 0)) + 1
    return 1
