"""The programs of `models.widths`: a whole run each, from the draw of the weights to its losses.

`config` is that of the recipe.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import bsjax.nnx
from models import transformer
from models._language import bits, late_bits
from models._train import parameter_count


class Kind(NamedTuple):
    """A model: its width, and the share of outer products that it computes (None: dense)."""

    width: int
    fraction: float | None

    @property
    def name(self) -> str:
        return "dense" if self.fraction is None else f"sampled {self.fraction:g}"


class Run(NamedTuple):
    """One training run of a kind."""

    learning_rate: float
    seed: int


class Result(NamedTuple):
    """Bits per byte: mean of the last tenth of the steps, and of texts that were not trained on,
    computed exactly and with sampling left on."""

    training: Any
    validation: Any
    heldout: Any
    heldout_sampled: Any


class Stack(nnx.Module):
    """The blocks of a Transformer as one, parameters stacked, [layers, ...]: the program holds
    a block once, and compiles in a fraction of the time."""

    def __init__(self, make: Callable[[jax.Array], nnx.Module], keys: jax.Array):
        graph = nnx.graphdef(nnx.eval_shape(make, keys[0]))
        self.block = nnx.merge(graph, jax.vmap(lambda key: nnx.split(make(key))[1])(keys))

    def __call__(self, x: jax.Array) -> jax.Array:
        graph, *states = nnx.split(self.block, nnx.Param, ...)

        def one(x: jax.Array, states: Any) -> Any:
            block = nnx.merge(graph, *states, copy=True)
            return block(x), nnx.split(block, nnx.Param, ...)[2]

        x, rest = jax.lax.scan(one, x, tuple(states))
        nnx.update(self.block, rest)  # the counters of samples
        return x


def make(config: Any, kind: Kind, seed: Any) -> transformer.Transformer:
    """The model, its weights drawn by the seed: the same for all kinds of a width."""
    shape = transformer.Config(layers=config.layers, heads=kind.width // config.head)
    size = transformer.Size(kind.width, 4 * kind.width, transformer.dense)

    def block(key: jax.Array) -> nnx.Module:
        rngs = nnx.Rngs(key, sampling=jax.random.fold_in(key, 1))
        made = transformer.Block(shape, size, size.linear(shape, rngs), rngs)
        if kind.fraction is not None:
            how = {"sampler": config.sampler, "block": config.block, "policy": "forward"}
            bsjax.nnx.sample_linears(made, fraction=kind.fraction, rngs=rngs, **how)
        return made

    ends, blocks = jax.random.split(jax.random.key(seed))
    model = transformer.Transformer(dataclasses.replace(shape, layers=0), size, nnx.Rngs(ends))
    for embedding in model.embeddings:  # the only layers that would not follow their parameters
        embedding.dtype = jnp.dtype(config.dtype)
    model.blocks = nnx.List([Stack(block, jax.random.split(blocks, config.layers))])
    return model


def program(config: Any, kind: Kind) -> Callable[..., Result]:
    """`(learning rate, seed, train[bytes], validation and heldout[batches, batch, length + 1])` to
    the result of a run, all of it in one program."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(config, kind, 0)))
    # the update of AdamW is proportional to its rate, so the rate can be data
    adam = transformer.adam(1.0, config.warmup, config.steps, config.weight_decay)

    def whole(parameters: Any, rest: Any) -> Any:
        # a copy: the counter of samples changes at a trace level other than that it came from
        return nnx.merge(graph, computed_in(config.dtype, parameters), rest, copy=True)

    def loss(parameters: Any, rest: Any, data: jax.Array) -> Any:
        model = whole(parameters, rest)
        return bits(model, data).mean(), nnx.split(model, nnx.Param, ...)[2]

    def measure(parameters: Any, rest: Any, batches: jax.Array, exact: bool) -> jax.Array:
        def one(rest: Any, data: jax.Array) -> Any:
            model = whole(parameters, rest)
            if exact:
                model.eval()
            value = late_bits(model, data)
            model.train()
            return nnx.split(model, nnx.Param, ...)[2], value

        return jax.lax.scan(one, rest, batches)[1]

    def run(rate: Any, seed: Any, train: Any, validation: Any, heldout: Any) -> Result:
        tx = optax.chain(adam, optax.scale(rate))
        _, parameters, rest = nnx.split(make(config, kind, seed), nnx.Param, ...)
        batches = jax.random.fold_in(jax.random.key(seed), 2)

        def step(carry: Any, i: jax.Array) -> Any:
            parameters, rest, state = carry
            key = jax.random.fold_in(batches, i)
            starts = jax.random.randint(key, (config.batch, 1), 0, len(train) - config.length)
            data = train[starts + jnp.arange(config.length + 1)[None]].astype(jnp.int32)
            grad = jax.value_and_grad(loss, has_aux=True)
            (value, rest), gradient = grad(parameters, rest, data)
            updates, state = tx.update(gradient, state, parameters)
            return (optax.apply_updates(parameters, updates), rest, state), value

        carry = parameters, rest, tx.init(parameters)
        (parameters, rest, _), losses = jax.lax.scan(step, carry, jnp.arange(config.steps))
        both = measure(parameters, rest, jnp.concatenate([validation, heldout]), exact=True)
        chosen_on, reported = jnp.split(both, [len(validation)])
        left_on = reported
        if kind.fraction is not None:
            left_on = measure(parameters, rest, heldout, exact=False)
        last = losses[-max(1, config.steps // 10) :]
        return Result(*(found.mean() for found in (last, chosen_on, reported, left_on)))

    return run


def parameters(config: Any, kind: Kind) -> int:
    """The number of parameters: sampling adds none."""
    return parameter_count(nnx.eval_shape(lambda: make(config, kind, 0)))


def computed_in(dtype: str, parameters: Any) -> Any:
    """The parameters as the model computes with them; the last norm and the head, where logits come
    from, stay in float32."""
    cast = functools.partial(jax.tree.map, lambda a: a.astype(dtype))
    return nnx.State({**parameters, **{n: cast(parameters[n]) for n in ("embeddings", "blocks")}})


def compiled(config: Any, kind: Kind, data: Sequence[jax.Array]) -> Callable[..., Result]:
    """The program for `at_once` runs side by side."""
    run = program(config, kind)
    # one alone runs faster, and compiles twice as fast, where there is no axis of runs
    side = config.at_once if config.at_once > 1 else None

    def together(rates: jax.Array, seeds: jax.Array, *data: jax.Array) -> Result:
        return jax.lax.map(lambda of_run: run(*of_run, *data), (rates, seeds), batch_size=side)

    rates, seeds = (jax.ShapeDtypeStruct((config.at_once,), t) for t in (jnp.float32, jnp.int32))
    return jax.jit(together).lower(rates, seeds, *data).compile()
