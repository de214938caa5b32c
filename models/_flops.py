"""FLOPs of a training step of the Transformer of `models.transformer`, sampling included.

With n tokens a step, windows of l, d layers of width w, hidden layers of 4 w and 256 bytes:

    linears    6 n k m for each layer k x m: three products, y, dx and dw, a multiplication and an
               addition each. Of a sampled layer, 6 n s m, where s of its k features are taken:
               t = max(1, round(fraction * g)) of g = k / block groups, s = t * block
    attention  12 n l w a layer: scores and sums of values, and both gradients of each. The causal
               half that is masked is computed too
    head       6 n w 256
    norms      2 n k + 2 k m a sampled layer: the squares of x and of w, and their sums
    sampler    2 s m to scale the rows of w and of dw, and for the draw 3 g log2(g) (it sorts three
               times) + 20 g (running sums, inclusion probabilities)

Not counted, the same for every kind but for rounding: norms of layers, activations, the softmax,
embeddings (they are looked up), and the optimizer.
"""

import math
from typing import NamedTuple

BYTES = 256


class Flops(NamedTuple):
    """Of one training step."""

    linears: int
    attention: int
    head: int
    norms: int = 0
    sampler: int = 0

    @property
    def total(self) -> int:
        return sum(self)


def training_step(
    *, tokens: int, length: int, layers: int, width: int, fraction: float | None, block: int
) -> Flops:
    """The formulas above; `fraction=None` is the dense model."""
    sides = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    attention, head = 12 * tokens * length * width * layers, 6 * tokens * width * BYTES
    if fraction is None:
        return Flops(layers * sum(6 * tokens * k * m for k, m in sides), attention, head)
    linears = norms = sampler = 0
    for k, m in sides:
        groups = k // block
        taken = max(1, round(fraction * groups))
        linears += 6 * tokens * taken * block * m
        if taken < groups:  # else the layer is exact, and nothing is drawn
            norms += 2 * tokens * k + 2 * k * m
            sampler += 2 * taken * block * m + round(3 * groups * math.log2(groups)) + 20 * groups
    return Flops(layers * linears, attention, head, layers * norms, layers * sampler)
