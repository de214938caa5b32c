"""Masks for the internal steps of a recurrent cell."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bsjax.patterns import _check as check
from bsjax.patterns._check import Count, Mask
from bsjax.patterns._graphs import barabasi_albert, strides, watts_strogatz
from bsjax.patterns._grids import balanced, random

if TYPE_CHECKING:
    type Graph = str | Callable[..., Any]
    type Parameters = Mapping[str, Any] | None
else:
    Graph = Parameters = object

GRAPHS: dict[str, Callable[..., Mask]] = {
    "balanced": lambda n, **parameters: balanced((n, n), **parameters),
    "barabasi_albert": barabasi_albert,
    "random": lambda n, **parameters: random((n, n), **parameters),
    "watts_strogatz": watts_strogatz,
}


def step_masks(
    n: Count,
    depth: Count,
    graph: Graph = "barabasi_albert",
    parameters: Parameters = None,
    *,
    share: bool = False,
    seed: Count = 0,
) -> list[Mask]:
    """`depth + 1` masks (n, n): one for each internal step of a cell, and one for its gates.

    Each is another draw of the graph, or, with `share=True`, all are the first one. The diagonal is
    in every mask. `graph` is the name of a generator, whose parameters are those of that function:
    "barabasi_albert" (m), "watts_strogatz" (k_half, p), "balanced" and "random" (density),
    "strides" (none: its masks connect all blocks in `depth` steps, and the gates have the first
    one); or a function `graph(n, seed=..., **parameters) -> mask`.

    `mixing_profile(masks[:-1])` says how many of the blocks are connected after each internal step.
    After Gray, Radford and Kingma 2017, "GPU Kernels for Block-Sparse Weights".
    """
    where = "step_masks"
    n, depth = check.count(where, "n", n, 1), check.count(where, "depth", depth, 1)
    seed = check.count(where, "seed", seed, 0)
    parameters = dict(parameters or {})  # pyright: ignore[reportArgumentType, reportCallIssue]
    if graph == "strides":
        if share or parameters:
            raise ValueError(
                f'{where}: the masks of `graph="strides"` differ by design and have no parameters: '
                f"got share={share}, parameters={parameters}; leave both out."
            )
        masks = strides(n, depth)
        return [*masks, masks[0]]
    draw = GRAPHS.get(graph) if isinstance(graph, str) else graph
    if not callable(draw):
        names = ", ".join(f'"{name}"' for name in sorted([*GRAPHS, "strides"]))
        raise ValueError(
            f"{where}: `graph` must be one of {names}, or a function (n, seed=...) -> mask, got "
            f"{graph!r}."
        )
    count = 1 if share else depth + 1
    # neighbouring seeds of the caller have no draw in common
    seeds = np.random.SeedSequence(seed).generate_state(count).tolist()
    masks = [_with_diagonal(draw(n, seed=s, **parameters), n) for s in seeds]
    return masks * (depth + 1) if share else masks


def _with_diagonal(mask: Any, n: int) -> Mask:
    mask = check.mask("step_masks", "graph", mask, square=True)
    if mask.shape != (n, n):
        raise ValueError(
            f"step_masks: `graph` gave a mask of shape {mask.shape} for n={n}: return ({n}, {n})."
        )
    return mask | np.eye(n, dtype=bool)
