"""What a translation model is made of, and the arithmetic of its parameters and FLOPs."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from bsjax import patterns
from models._cli import Mistake


class Size(NamedTuple):
    """What a model is made of."""

    vocabulary: int
    width: int = 128
    hidden: int = 512
    layers: int = 2  # of the encoder, and as many of the decoder
    heads: int = 4
    gated: bool = False
    activation: str = "relu"
    positions: str = "rotary"
    longest: int = 256  # positions that can be learnt
    density: float = 1.0  # stored share of the blocks of linear layers; 1: dense
    block: int = 16
    fraction: float = 1.0  # sampled share of the products of linear layers; 1: exact
    sample_block: int = 1
    policy: str = "forward"
    attention: str = "full"
    window: int = 16  # tokens to each side that sparse attention sees
    attention_block: int = 16
    dropout: float = 0.1
    dtype: str = "float32"  # to compute in; parameters are float32
    remat: bool = False

    @property
    def sparse(self) -> bool:
        return self.density < 1

    @property
    def sampled(self) -> bool:
        return self.fraction < 1


def blocks(size: Size, k: int, m: int, seed: int) -> np.ndarray:
    """Which blocks of a linear layer are stored."""
    grid = -(-k // size.block), -(-m // size.block)
    return patterns.balanced(grid, size.density, seed=seed)


class Linear(NamedTuple):
    """A linear layer `[k, m]`, and how many of its products are stored and computed."""

    k: int
    m: int
    stored: int
    computed: int
    on: str  # "source", "target"


def linears(size: Size) -> list[Linear]:
    """All of them but the embedding."""

    def one(k: int, m: int, on: str) -> Linear:
        stored = k * m
        if size.sparse:
            stored = int(blocks(size, k, m, 0).sum()) * size.block**2
        groups = k // size.sample_block
        taken = max(1, round(size.fraction * groups)) * size.sample_block
        return Linear(k, m, stored, taken * m if size.sampled and not size.sparse else stored, on)

    width, hidden = size.width, size.hidden
    mlp = [(width, hidden)] * (2 if size.gated else 1) + [(hidden, width)]
    square = (width, width)
    found = []
    encoder, decoder = [square] * 4 + mlp, [square] * 6 + mlp
    found += [one(*sides, "source") for sides in [*encoder, square, square]]  # and keys, values
    found += [one(*sides, "target") for sides in decoder]
    return found * size.layers


def parameters(size: Size) -> int:
    """How many there are: `v w` of the embedding, what linear layers store, gains of norms (two of
    each layer of the encoder, three of the decoder, and two), and learnt positions."""
    norms = (5 * size.layers + 2) * size.width
    places = size.longest * size.width if size.positions == "learned" else 0
    stored = sum(one.stored for one in linears(size))
    return size.vocabulary * size.width + stored + norms + places


def flops(size: Size, shapes: Mapping[tuple[int, int, int], int]) -> int:
    """Of training steps on so many batches of each shape (rows n, s, t). Of each batch::

        6 (n s, or n t) computed        of each linear layer: y, dx and dw; `computed` products are
                                        those of stored blocks, or of the sampled rows of w
        12 n w (s^2 + t^2 + 2 s t / 2)  of attention in each pair of layers: scores, sums of values,
                                        and both gradients of each; masked ones count too
        6 n t w v                       of the logits

    and of a sampled layer on `n` tokens the norms, 2 n k + 2 k m. Not counted, the same for all but
    for rounding: norms of layers, activations, softmax, look-ups, draws of samples, the optimizer.
    """
    total, width = 0, size.width
    for (n, s, t), count in shapes.items():
        tokens = {"source": n * s, "target": n * t}
        one = 12 * n * width * size.layers * (s * s + t * t + s * t)
        one += 6 * n * t * width * size.vocabulary
        for linear in linears(size):
            one += 6 * tokens[linear.on] * linear.computed
            if linear.computed < linear.stored:
                one += 2 * linear.k * (tokens[linear.on] + linear.m)
        total += count * one
    return total


def matched(size: Size, cost: Callable[[Size], int], wanted: int) -> Size:
    """`size` with the width at which `cost` is nearest below what is wanted, and hidden layers that
    make up for the rest. Raises `Mistake` if it stays 2% away."""
    unit = math.lcm(2 * size.heads, size.block if size.sparse else 1, size.sample_block)
    step = math.lcm(size.block if size.sparse else 8, size.sample_block)
    share = size.hidden / size.width

    def of(width: int) -> Size:
        return size._replace(width=width, hidden=max(1, round(share * width / step)) * step)

    width = unit
    while cost(of(width + unit)) <= wanted:
        width += unit
    best = of(width)
    more = best._replace(hidden=best.hidden + 8 * step)
    steps = round(8 * (wanted - cost(best)) / (cost(more) - cost(best)))
    hidden = max(step, best.hidden + step * steps)
    found = best._replace(hidden=hidden)
    if not near(cost(found), wanted):
        raise Mistake(
            f"no {kind(size)} model with {size.heads} heads costs the same as the dense one within "
            "2%: take a larger --width, a smaller --block or fewer --heads"
        )
    return found


def near(cost: int, wanted: int) -> bool:
    """Equal within 2%."""
    return abs(cost / wanted - 1) <= 0.02


def kind(size: Size) -> str:
    """In a word."""
    return "block-sparse" if size.sparse else "sampled" if size.sampled else "dense"
