"""An encoder-decoder Transformer, and how it translates.

Vaswani et al. 2017, "Attention Is All You Need", of `bsjax.nnx.BlockTransformerLayer`s: normalised
before each part, one matrix of embeddings for both languages and for the logits.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bsjax.nnx
from bsjax import masks
from models import _beam as beams
from models._parallel_text import PAD
from models._translation_size import Size, blocks

PROJECTIONS = ("query", "key", "value", "out")


@functools.cache  # models of a size must be made of the same functions, or each compiles
def seen(attention: str, window: int, causal: bool) -> Any:
    """Which tokens of its own sentence a position sees; None: all."""
    if attention == "full":
        return masks.causal() if causal else None
    near = masks.window(window, window)
    if attention == "longformer":  # and the first token sees all, and is seen
        near = masks.longformer(window, 1)
    return near & masks.causal() if causal else near


def self_attention(size: Size, causal: bool) -> dict[str, Any]:
    """The options of attention inside a sentence."""
    mask, block = seen(size.attention, size.window, causal), size.attention_block
    return {"mask": mask, "block": block, "rotary": size.positions == "rotary"}


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


def call(layer: Any, x: jax.Array, encoded: jax.Array | None, lengths: jax.Array) -> jax.Array:
    """A layer of the encoder, or of the decoder, on a whole sequence."""
    if encoded is None:
        return layer(x, kv_lengths=lengths)
    return layer(x, encoded, encoded_lengths=lengths)


CALLS = {False: call, True: nnx.remat(call)}  # by remat


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
        for one in self.encoder:
            x = CALLS[self.size.remat](one, x, None, lengths)
        return self.encoder_norm(x)

    def decode(
        self,
        target: jax.Array,
        encoded: jax.Array | None,
        lengths: jax.Array,
        *,
        at: Any = None,
    ) -> jax.Array:
        """Logits, float32. With `at` the target is the tokens from that position on, and those
        before it are in the cache, with what is attended to of `encoded`."""
        x, cached = self._embed(target, 0 if at is None else at), at is not None
        for one in self.decoder:
            if cached:
                x = one(x, encoded_lengths=lengths, decode=True)
            else:
                x = CALLS[self.size.remat](one, x, encoded, lengths)
        x = self.decoder_norm(x)
        return (x @ self.embedding[...].astype(x.dtype).T).astype(jnp.float32)

    def init_cache(self, encoded: jax.Array, length: int) -> None:
        """An empty cache for targets of that length, one for each source that is encoded."""
        for one in self.decoder:
            one.init_cache((len(encoded), length, self.size.width), encoded=encoded)

    def _embed(self, tokens: jax.Array, start: Any) -> jax.Array:
        x = self.embedding[...][tokens]
        if self.places is not None:
            at = start + jnp.arange(tokens.shape[1])
            x = x + self.places[...].at[at].get(mode="clip")[None]
        return self.dropout((x * self.size.width**0.5).astype(jnp.dtype(self.size.dtype)))


# ---------------------------------------------------------------------------------- translating


@functools.partial(jax.jit, static_argnames=("graph", "beam", "length"))
def _translate(
    graph: Any, state: Any, source: Any, lengths: Any, limits: Any,
    *, beam: int, length: int, alpha: Any,
) -> jax.Array:  # fmt: skip
    model = nnx.merge(graph, state)
    n, many = source.shape[0], max(1, beam)
    encoded = jnp.repeat(model.encode(source, lengths), many, axis=0)
    repeated = jnp.repeat(lengths, many)
    model.init_cache(encoded, length)
    # beams of one source share its keys, so that these need not follow when beams change places
    own = nnx.All(nnx.Cache, nnx.Not(nnx.PathContains("cross_attention")))
    whole, cache, rest = nnx.split(model, own, ...)

    def step(cache: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        at, cache = cache
        model = nnx.merge(whole, cache, rest)
        logits = model.decode(tokens[:, None], None, repeated, at=at)
        return logits[:, 0], (at + 1, nnx.state(model, own))

    start = (jnp.int32(0), cache)
    if beam == 0:
        return beams.greedy(step, start, n, length=length, limits=limits)
    found = beams.search(
        step, start, n, beam=beam, length=length, limits=limits, alpha=alpha
    )  # fmt: skip
    return found.tokens[:, 0]


def limits(lengths: Any) -> Any:
    """The most tokens of a translation, EOS included. Of the source alone, not of its batch."""
    return 2 * lengths + 10


def translate(
    model: Translator, source: np.ndarray, lengths: np.ndarray, *, beam: int, alpha: float = 0.6
) -> list[list[int]]:
    """The tokens of each translation, without EOS; `beam=0` is greedy search. The model must not
    train: `model.eval()`."""
    graph, state = nnx.split(model)
    length = limits(source.shape[1])
    tokens = _translate(
        graph, state, source, lengths, np.int32(limits(lengths)),
        beam=beam, length=length, alpha=alpha,
    )  # fmt: skip
    kept = [row[row != PAD].tolist() for row in np.asarray(tokens)]
    return [row[:-1] for row in kept]
