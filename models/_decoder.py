"""The decoder of `models.transformer`, its linear layers, and its positions.

`config` is that of a recipe.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bsjax
import bsjax.nnx
from models import _sparse_attention as sparse_attention
from models._train import parameter_count

ORDER = 4  # bytes that one position sees before any attention
BYTES = 256
MODEL = "model"  # the mesh axis over which one model is cut
NORMAL = nnx.initializers.normal(1.0)
type Linear = Callable[..., nnx.Module]  # (features in, features out, gain=1.0) -> layer


class Size(NamedTuple):
    """What one model is made of."""

    width: int
    hidden: int
    linear: Callable[[Any, nnx.Rngs], Linear]
    project: Callable[[Any, nnx.Rngs], Linear] | None = None  # around attention: as `linear`
    sparse_attention: bool = False  # the pattern `--attention`, in a `BlockAttention`
    sample: float = 0.0  # the share of outer products that dense layers compute
    image: tuple[int, int, int] | None = None  # rows, columns, channels: learned positions
    parts: int = 1  # devices over which it is cut, of which this is one


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`.

    Rotary positions, unless images have learned ones; the MLP has squared ReLUs, or with `--gated`
    `silu(gate(x)) * up(x)` (Shazeer 2020). Cut over devices, each has some heads and some hidden
    features, and what they add to x is summed (Shoeybi et al. 2019, "Megatron-LM").
    """

    def __init__(self, config: Any, size: Size, linear: Linear, rngs: nnx.Rngs, layer: int = 0):
        self.heads, self.parts = config.heads // size.parts, size.parts
        inner, hidden = size.width // size.parts, math.ceil(size.hidden / size.parts)
        self.turn = size.image is None
        project = linear if size.project is None else size.project(config, rngs)
        norm = functools.partial(nnx.RMSNorm, size.width, dtype=computed(config), rngs=rngs)
        gain = (2 * config.layers) ** -0.5
        self.before_attention = norm()
        self.attention: bsjax.nnx.BlockAttention | None = nnx.data(None)
        if size.sparse_attention:
            self.attention = attention(config, size, layer, project, rngs)
        else:
            self.qkv = project(size.width, 3 * inner)
            self.projection = project(inner, size.width, gain=gain)
        self.before_mlp = norm()
        self.up = linear(size.width, hidden)
        self.gate = nnx.data(linear(size.width, hidden) if config.gated else None)
        self.down = linear(hidden, size.width, gain=gain)

    def __call__(self, x: jax.Array, decode: bool = False) -> jax.Array:
        x = x + self.summed(self.attend(self.before_attention(x), decode))
        return x + self.summed(self.mlp(self.before_mlp(x)))

    def attend(self, x: jax.Array, decode: bool) -> jax.Array:
        if self.attention is not None:
            return self.attention(x, decode=decode)
        n, length, _ = x.shape
        qkv = self.qkv(x).reshape(n, length, 3 * self.heads, -1)
        q, k, v = jnp.split(qkv, 3, axis=2)
        q, k = (rotate(q), rotate(k)) if self.turn else (q, k)
        seen = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.projection(seen.reshape(n, length, -1))

    def mlp(self, x: jax.Array) -> jax.Array:
        if self.gate is not None:
            return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
        return self.down(jnp.square(jax.nn.relu(self.up(x))))

    def summed(self, x: jax.Array) -> jax.Array:
        return x if self.parts == 1 else jax.lax.psum(x, MODEL)


class Transformer(nnx.Module):
    """`logits[n, l, 256]` of the byte after each of `data[n, l]`.

    A position is embedded by its byte and the three before it, side by side: at this size attention
    would spend most of the run learning to look one byte back. In images it is the byte before,
    and the row, the column and the channel of the one to come (Child et al. 2019).

    Compute is in `--dtype`; parameters, the last norm and the head are float32.
    """

    def __init__(self, config: Any, size: Size, rngs: nnx.Rngs):
        linear = size.linear(config, rngs)
        self.image, self.remat, width = size.image, config.remat, size.width
        dtype = computed(config)

        def embed(count: int, features: int, init: Any = NORMAL) -> nnx.Embed:
            return nnx.Embed(count, features, embedding_init=init, dtype=dtype, rngs=rngs)

        if size.image is None:
            parts = [width // ORDER + (i < width % ORDER) for i in range(ORDER)]
            self.embeddings = nnx.List([embed(BYTES, part) for part in parts])
        else:  # four of them are summed
            half = nnx.initializers.normal(0.5)
            self.embeddings = nnx.List([embed(n, width, half) for n in (BYTES, *size.image)])
        self.blocks: nnx.List = nnx.List(
            [Block(config, size, linear, rngs, layer) for layer in range(config.layers)]
        )
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, BYTES, kernel_init=by_fan_in(0.3), rngs=rngs)
        self.recent, self.index = nnx.data(None), nnx.data(None)
        if size.sample:
            how = {"sampler": config.sampler, "block": config.sample_block}
            how |= {"policy": config.sample_policy, "fraction": size.sample}
            bsjax.nnx.sample_linears(self.blocks, rngs=rngs, **how)

    def __call__(self, data: jax.Array, decode: bool = False) -> jax.Array:
        x = self.embed(data, decode)
        for block in self.blocks:
            if decode:
                x = block(x, decode=True)
            else:
                x = nnx.remat(run)(block, x) if self.remat else block(x)
        return self.head(self.norm(x.astype(jnp.float32)))

    def embed(self, data: jax.Array, decode: bool) -> jax.Array:
        length, start = data.shape[1], 0
        known = jnp.pad(data, ((0, 0), (ORDER - 1, 0)))
        if decode and self.recent is not None and self.index is not None:
            known = jnp.concatenate([self.recent[...], data], axis=1)
            start = self.index[...]
            self.recent[...], self.index[...] = known[:, length:], start + length
        if self.image is None:
            before = [known[:, ORDER - 1 - i :][:, :length] for i in range(ORDER)]
            pairs = zip(self.embeddings, before, strict=True)
            return jnp.concatenate([embed(at) for embed, at in pairs], axis=-1)
        _, columns, channels = self.image
        at = start + jnp.arange(length, dtype=jnp.int32)
        places = (at // (columns * channels), at // channels % columns, at % channels)
        of_byte, *of_place = self.embeddings
        x = of_byte(data)
        for embed, place in zip(of_place, places, strict=True):
            x = x + embed(place)[None]
        return x

    def init_cache(self, count: int, length: int) -> None:
        """Room to decode `count` sequences of up to `length` bytes, with `decode=True`."""
        width = self.head.in_features
        for block in self.blocks:
            block.attention.init_cache((count, length, width))
        self.recent = nnx.Cache(jnp.zeros((count, ORDER - 1), jnp.int32))
        self.index = nnx.Cache(jnp.int32(0))


def run(block: Block, x: jax.Array) -> jax.Array:
    return block(x)


def computed(config: Any) -> Any:
    """What to compute in. None follows the parameters: who casts these computes in their type."""
    return None if config.dtype == "float32" else jnp.dtype(config.dtype)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions: pairs of features of `x[n, l, h, d]` turn with l. After Su et al. 2021."""
    _, length, _, features = x.shape
    turns = 10_000.0 ** -(np.arange(0, features, 2) / features)
    angle = (np.arange(length)[:, None] * turns)[None, :, None].astype(np.float32)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


@functools.cache  # two models of a size must be made of the same functions, or both compile
def by_fan_in(gain: float) -> nnx.Initializer:
    """Weights that keep the variance of features, times `gain` squared."""
    return nnx.initializers.variance_scaling(gain**2, "fan_in", "normal")


def dense(config: Any, rngs: nnx.Rngs) -> Linear:
    """Linear layers that store every weight."""
    dtype = computed(config)

    def linear(k: int, m: int, gain: float = 1.0) -> nnx.Module:
        return nnx.Linear(k, m, kernel_init=by_fan_in(gain), dtype=dtype, rngs=rngs)

    return linear


def block_sparse(config: Any, rngs: nnx.Rngs) -> Linear:
    """Linear layers that store a share of their blocks, another one in each layer."""
    mask = {"balanced": bsjax.patterns.balanced, "random": bsjax.patterns.random}[config.pattern]
    seeds = itertools.count(1000 * config.seed)

    def linear(k: int, m: int, gain: float = 1.0) -> nnx.Module:
        blocks = mask((k // config.block, m // config.block), config.density, seed=next(seeds))
        return bsjax.nnx.BlockLinear(
            k,
            m,
            pattern=blocks,
            block=config.block,
            kernel_init=bsjax.inits.stored_fan_in(gain),
            dtype=computed(config),
            rngs=rngs,
        )

    return linear


def attention(
    config: Any, size: Size, layer: int, project: Linear, rngs: nnx.Rngs
) -> bsjax.nnx.BlockAttention:
    """Block-sparse attention between projections that `project` makes."""
    heads, inner = config.heads // size.parts, size.width // size.parts
    made = bsjax.nnx.BlockAttention(
        heads,
        size.width,
        inner,
        rotary=size.image is None,
        dtype=computed(config),
        rngs=rngs,
        **sparse_attention.options(config, heads, layer),
    )
    made.query, made.key, made.value = (project(size.width, inner) for _ in range(3))
    made.out = project(inner, size.width, gain=(2 * config.layers) ** -0.5)
    return made


def parameters(config: Any, size: Size) -> int:
    """The number of parameters."""
    return parameter_count(nnx.eval_shape(lambda: Transformer(config, size, nnx.Rngs(0))))
