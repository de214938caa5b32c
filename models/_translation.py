"""An encoder-decoder Transformer, and the arithmetic of its parameters and FLOPs.

Vaswani et al. 2017, "Attention Is All You Need", of `bsjax.nnx.BlockTransformerLayer`s: normalised
before each part, one matrix of embeddings for both languages and for the logits.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bsjax.nnx
from bsjax import masks, patterns
from models import _beam as beams
from models._cli import Mistake
from models._parallel_text import PAD

PROJECTIONS = ("query", "key", "value", "out")


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


def self_attention(size: Size, causal: bool) -> dict[str, Any]:
    """What a position sees of its own sentence."""
    seen = masks.causal() if causal else None
    if size.attention != "full":
        near = masks.window(size.window, size.window)
        if size.attention == "longformer":  # and the first token sees all, and is seen
            near = masks.longformer(size.window, 1)
        seen = near & seen if seen is not None else near
    block = size.attention_block
    return {"mask": seen, "block": block, "rotary": size.positions == "rotary"}


def layer(size: Size, seeds: Any, rngs: nnx.Rngs, *, decoder: bool) -> Any:
    """One layer of the encoder, or of the decoder."""
    width, hidden = size.width, size.hidden
    mlp: dict[str, Any] = {"hidden_features": hidden, "gated": size.gated, "use_bias": False}
    mlp["activation"] = size.activation
    cross: dict[str, Any] = {"block": size.attention_block}
    own, common = self_attention(size, decoder), {"use_bias": False}
    if size.sparse:
        mlp |= {"pattern": blocks(size, width, hidden, next(seeds)), "block": size.block}
        for attention in (own, cross):
            square = {name: blocks(size, width, width, next(seeds)) for name in PROJECTIONS}
            attention |= {"projection_pattern": square, "projection_block": size.block}
    sampling = {"fraction": size.fraction, "block": size.sample_block, "policy": size.policy}
    return bsjax.nnx.BlockTransformerLayer(
        width,
        size.heads,
        attention=own | common,
        cross_attention=cross | common if decoder else None,
        mlp=mlp,
        sampling=sampling if size.sampled else None,
        dropout_rate=size.dropout,
        residual_gain=(2 * size.layers) ** -0.5,
        dtype=jnp.dtype(size.dtype),
        rngs=rngs,
    )


def call(layer: Any, *args: Any, **options: Any) -> jax.Array:
    return layer(*args, **options)


class Translator(nnx.Module):
    """`logits[n, t, v]` of the token after each of `target[n, t]`, for `source[n, s]`, of which
    `lengths[n]` tokens are text and the others padding that nothing sees."""

    def __init__(self, size: Size, seed: int):
        rngs = nnx.Rngs(seed, dropout=seed + 1, sampling=seed + 2)
        seeds, normal = itertools.count(1000 * seed), nnx.initializers.normal(size.width**-0.5)
        self.size = size
        # tables are small where they make logits, and large where they are looked up
        self.embedding = nnx.Param(normal(rngs.params(), (size.vocabulary, size.width)))
        learnt = size.positions == "learned"
        self.places = nnx.data(
            nnx.Param(normal(rngs.params(), (size.longest, size.width))) if learnt else None
        )
        make = functools.partial(layer, size, seeds, rngs)
        self.encoder: nnx.List = nnx.List([make(decoder=False) for _ in range(size.layers)])
        self.decoder: nnx.List = nnx.List([make(decoder=True) for _ in range(size.layers)])
        dtype = jnp.dtype(size.dtype)
        self.encoder_norm = nnx.RMSNorm(size.width, dtype=dtype, rngs=rngs)
        self.decoder_norm = nnx.RMSNorm(size.width, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(size.dropout, rngs=rngs if size.dropout else None)

    def __call__(self, source: jax.Array, lengths: jax.Array, target: jax.Array) -> jax.Array:
        return self.decode(target, self.encode(source, lengths), lengths)

    def encode(self, source: jax.Array, lengths: jax.Array) -> jax.Array:
        """`[n, s, width]`."""
        x = self._embed(source, 0)
        run = self._layer()
        for one in self.encoder:
            x = run(one, x, kv_lengths=lengths)
        return self.encoder_norm(x)

    def decode(
        self,
        target: jax.Array,
        encoded: jax.Array,
        lengths: jax.Array,
        *,
        at: Any = None,
    ) -> jax.Array:
        """Logits, float32. With `at` the target is the tokens from that position on, and those
        before it are in the cache."""
        x, cached = self._embed(target, 0 if at is None else at), at is not None
        run = call if cached else self._layer()
        for one in self.decoder:
            x = run(one, x, encoded, encoded_lengths=lengths, decode=cached)
        x = self.decoder_norm(x)
        return (x @ self.embedding[...].astype(x.dtype).T).astype(jnp.float32)

    def init_cache(self, n: int, length: int) -> None:
        """An empty cache for `n` targets of that length."""
        for one in self.decoder:
            one.init_cache((n, length, self.size.width))

    def _layer(self) -> Callable[..., Any]:
        return nnx.remat(call) if self.size.remat else call

    def _embed(self, tokens: jax.Array, start: Any) -> jax.Array:
        x = self.embedding[...][tokens]
        if self.places is not None:
            at = start + jnp.arange(tokens.shape[1])
            x = x + self.places[...].at[at].get(mode="clip")[None]
        return self.dropout((x * self.size.width**0.5).astype(jnp.dtype(self.size.dtype)))


# ---------------------------------------------------------------------------------- translating


@functools.partial(jax.jit, static_argnames=("graph", "beam", "length", "alpha"))
def _translate(
    graph: Any, state: Any, source: Any, lengths: Any, limits: Any,
    *, beam: int, length: int, alpha: float,
) -> jax.Array:  # fmt: skip
    model = nnx.merge(graph, state)
    n, many = source.shape[0], max(1, beam)
    encoded = jnp.repeat(model.encode(source, lengths), many, axis=0)
    repeated = jnp.repeat(lengths, many)
    model.init_cache(n * many, length)
    whole, cache, rest = nnx.split(model, nnx.Cache, ...)

    def step(cache: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        at, cache = cache
        model = nnx.merge(whole, cache, rest)
        logits = model.decode(tokens[:, None], encoded, repeated, at=at)
        return logits[:, 0], (at + 1, nnx.state(model, nnx.Cache))

    start = (jnp.int32(0), cache)
    if beam == 0:
        return beams.greedy(step, start, n, length=length, limits=limits)
    found = beams.search(
        step, start, n, beam=beam, length=length, limits=limits, alpha=alpha
    )  # fmt: skip
    return found.tokens[:, 0]


def limits(lengths: np.ndarray) -> np.ndarray:
    """The most tokens of a translation, EOS included. Of the source alone, not of its batch."""
    return 2 * lengths + 10


def translate(
    model: Translator, source: np.ndarray, lengths: np.ndarray, *, beam: int, alpha: float = 0.6
) -> list[list[int]]:
    """The tokens of each translation, without EOS; `beam=0` is greedy search. The model must not
    train: `model.eval()`."""
    graph, state = nnx.split(model)
    length = int(limits(np.int32(source.shape[1])))
    tokens = _translate(
        graph, state, source, lengths, np.int32(limits(lengths)),
        beam=beam, length=length, alpha=alpha,
    )  # fmt: skip
    kept = [row[row != PAD].tolist() for row in np.asarray(tokens)]
    return [row[:-1] for row in kept]


# --------------------------------------------------------------- parameters, FLOPs, equal sizes


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
