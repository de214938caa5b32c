"""Small-world cells from graphs of blocks: masks, parameters, and how wide they get."""

import bisect
from collections.abc import Sequence
from typing import Any

from bsjax import patterns
from bsjax._recurrent import GATES, SMALL_WORLD, check_sizes


def graph_masks(
    hidden_features: int,
    *,
    block: int,
    depth: int,
    graph: Any,
    parameters: Any,
    share_pattern: bool,
    seed: int,
) -> list[Any]:
    """A mask of blocks for each internal step and one for the gates."""
    check_sizes(SMALL_WORLD.cell, hidden_features=hidden_features, block=block, depth=depth)
    n = -(-hidden_features // block)
    parameters = _parameters(graph, parameters)
    return patterns.step_masks(n, depth, graph, parameters, share=share_pattern, seed=seed)


def small_world_parameters(
    in_features: int,
    hidden_features: int,
    masks: Sequence[Any],
    block: int,
    *,
    in_stride: int = 1,
    use_layer_norm: bool = True,
) -> int:
    """`2 p (in + v) + block^2 (sum_{j < D} e_j + 4 e_D) + (D + 4) v m`: the parameters of a cell
    with D internal steps. p is `ceil(m / in_stride)`; v, the vectors of each product, is 2 with
    layer norm and 1 without."""
    vectors, depth = 1 + use_layer_norm, len(masks) - 1
    count, projected = SMALL_WORLD.projected(hidden_features, in_stride)
    *steps, gates = (int(mask.sum()) for mask in masks)
    inputs = count * projected * (in_features + vectors)
    matrices = block**2 * (sum(steps) + GATES * gates)
    return inputs + matrices + (depth + GATES) * vectors * hidden_features


def hidden_within(
    budget: int,
    in_features: int,
    *,
    block: int,
    depth: int = 5,
    graph: Any = "barabasi_albert",
    parameters: Any = None,
    share_pattern: bool = False,
    seed: int = 0,
    in_stride: int = 1,
    use_layer_norm: bool = True,
    **_: Any,
) -> int:
    """The most hidden features, in whole blocks, with which a cell has at most `budget`
    parameters. The options are those of `from_graph`; all others do not change the number."""
    drawn: Any = {"block": block, "depth": depth, "graph": graph, "parameters": parameters}
    drawn |= {"share_pattern": share_pattern, "seed": seed}
    norms = {"in_stride": in_stride, "use_layer_norm": use_layer_norm}

    def count(n: int) -> int:
        masks = graph_masks(n * block, **drawn)
        return small_world_parameters(in_features, n * block, masks, block, **norms)

    low = least = _smallest(graph, _parameters(graph, parameters))
    if count(least) > budget:
        raise ValueError(
            f"{SMALL_WORLD.cell}: a state of {least} blocks of {block} has {count(least):,} "
            f"parameters, more than the {budget:,} given: raise `budget`, or take smaller blocks, "
            "a smaller depth or a sparser graph."
        )
    while count(2 * low) <= budget:
        low *= 2
    return block * (bisect.bisect_right(range(2 * low), budget, low + 1, key=count) - 1)


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
