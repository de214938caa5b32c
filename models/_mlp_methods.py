"""How an MLP is trained: the methods that are compared, and what a step of each costs."""

import dataclasses
import itertools
from collections.abc import Sequence

from models._images import CLASSES

POLICIES = ("forward", "backward", "weight")
SAMPLERS = (
    "systematic",
    "uniform",
    "with_replacement",
    "bernoulli",
    "priority",
    "top_k",
    "wta",
)
MEPROP = ("meProp", "meProp by rows")
NOISES = ("gradient noise", "input noise", "weight noise")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How the layers below the classifier are trained; the classifier is always exact.

    `fraction`, `sampler` and `block` belong to a policy of `bsjax.sampled_matmul`, a fraction also
    to meProp; `strength` is the eta of gradient noise, or a deviation.
    """

    kind: str = "dense"
    fraction: float = 1.0
    sampler: str = ""
    block: int = 1
    strength: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What all methods share."""

    layers: int  # hidden ones
    batch: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    average: float

    def sizes(self, inputs: int, width: int) -> list[tuple[int, int]]:
        """Features in and out of each layer."""
        features = [inputs, *[width] * self.layers, CLASSES]
        return list(itertools.pairwise(features))


# -------------------------------------------------------------------------------------- the costs


def taken(fraction: float, groups: int) -> int:
    """How many of some groups a fraction is."""
    return max(1, round(fraction * groups))


def flops(method: Method, sizes: Sequence[tuple[int, int]], batch: int) -> float:
    """Floating-point operations of one step: all products that are needed, and the norms that
    samples are drawn by.

    A layer has the product forward, dw and, but for the first layer, dx. Of a sampled one the terms
    that count are counted, also where an implementation multiplies the others by zero. Sorting,
    activations and the optimizer are left out: they are the same order for all methods, and small.
    """
    total, n = 0.0, batch
    for i, (k, m) in enumerate(sizes):
        product, first, last = 2.0 * n * k * m, i == 0, i == len(sizes) - 1
        y, dw, dx, scores = 1.0, 1.0, float(not first), 0.0
        if method.fraction < 1 and not last:
            unscored = method.sampler == "uniform"
            if method.kind == "forward":
                y = dw = _share(method, k)
                dx *= y
                scores = 2.0 * (n * k + k * m)
            elif method.kind == "backward":
                dw = _share(method, n)
                scores = 2.0 * (n * k + n * m) + dx * 2 * (n * m + k * m)
                dx *= _share(method, m)
            elif method.kind == "weight":
                dw, scores = _share(method, n), 2.0 * n * k
            else:
                dw = taken(method.fraction, m) / m
                dx, scores = dx * dw, 1.0 * n * m
            scores *= not unscored
        if method.kind == "direct feedback":
            # in the place of dx the error comes down through fixed weights
            dx, scores = 0.0, 0.0 if last else 2.0 * n * sizes[-1][1] * m
        total += product * (y + dw + dx) + scores
    return total


def _share(method: Method, length: int) -> float:
    groups = -(-length // method.block)
    return taken(method.fraction, groups) / groups
