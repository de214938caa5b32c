"""GPT-2 out of parts of bsjax, and its parameters from a safetensors file of Hugging Face.

After Radford, Wu, Child, Luan, Amodei and Sutskever 2019, "Language Models are Unsupervised
Multitask Learners": a decoder normalised before each part, with learned positions, biases
everywhere, the tanh form of GELU, and an output layer that is the embedding of tokens transposed.
Linear layers are `bsjax.nnx.BlockLinear`s where `models._prune` has pruned them.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bsjax
import bsjax.nnx
from models import _tensors
from models._cli import Mistake

EPSILON = 1e-5  # what GPT-2 was trained with
# Hugging Face's names; without approximation GELU is that of the error function
ACTIVATIONS: dict[str, Callable] = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
# what config.json may say in one way only
ONLY = {
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
CAUSAL = bsjax.masks.causal()  # one for all: models of a size are equal, and compile once
PREFIX = "transformer."
BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask of old files


class Size(NamedTuple):
    """What a model is made of."""

    vocabulary: int
    positions: int
    features: int
    hidden: int
    layers: int
    heads: int
    epsilon: float = EPSILON
    activation: str = "gelu_new"


class GPT2(nnx.Module):
    """`logits[n, l, vocabulary]` of the token after each of `ids[n, l]`."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        normal = {
            "embedding_init": nnx.initializers.normal(0.02),
            "features": size.features,
            "rngs": rngs,
        }
        self.tokens = nnx.Embed(size.vocabulary, **normal)
        self.positions = nnx.Embed(size.positions, **normal)
        self.layers: nnx.List = nnx.List(
            [
                bsjax.nnx.BlockTransformerLayer(
                    size.features,
                    size.heads,
                    attention={"mask": CAUSAL},
                    mlp={
                        "hidden_features": size.hidden,
                        "activation": ACTIVATIONS[size.activation],
                    },
                    norm="layer",
                    epsilon=size.epsilon,
                    residual_gain=(2 * size.layers) ** -0.5,
                    rngs=rngs,
                )
                for _ in range(size.layers)
            ]
        )
        self.norm = nnx.LayerNorm(size.features, epsilon=size.epsilon, rngs=rngs)
        for _, module in nnx.iter_modules(self):
            if isinstance(module, nnx.LayerNorm):
                # the mean of squares less the squared mean is noise where a few features are huge,
                # and in GPT-2 some are
                module.use_fast_variance = False

    def __call__(self, ids: jax.Array) -> jax.Array:
        positions = self.positions(jnp.arange(ids.shape[1]))
        x = self.tokens(ids) + positions[None]
        for layer in self.layers:
            x = layer(x)
        return self.tokens.attend(self.norm(x))


def load(path: Path, *, heads: int | None = None, epsilon: float = EPSILON) -> tuple[GPT2, Size]:
    """The model of a safetensors file, or of a folder with one; see `_tensors.Tensors`.

    Sizes are those of the tensors. What these cannot say, the heads, is in `config.json` beside
    them, or is given. Parameters are float32, also of files in 16 bits. The output layer must be
    the embedding, as it is in GPT-2.
    """
    return from_tensors(_tensors.Tensors(path), heads=heads, epsilon=epsilon)


def from_tensors(
    tensors: _tensors.Tensors, *, heads: int | None, epsilon: float
) -> tuple[GPT2, Size]:
    """`load`, of tensors that are open."""
    prefix = PREFIX if f"{PREFIX}wte.weight" in tensors else ""
    size = _size(tensors, prefix, heads, epsilon)
    wanted = {f"{prefix}{name}": shape for name, shape in _shapes(size)}
    found = {name for name in tensors.names if not name.endswith(BUFFERS)}
    _tensors.check_names(
        tensors.path, wanted, found - {"lm_head.weight"}, f"a GPT-2 of {size.layers} layers"
    )
    read = {name: tensors.floats(f"{prefix}{name}", shape) for name, shape in _shapes(size)}
    if "lm_head.weight" in found:
        table = read["wte.weight"]
        if not np.array_equal(tensors.floats("lm_head.weight", table.shape), table):
            raise Mistake(
                f"the output layer lm_head.weight in {tensors.path} is not the embedding of "
                "tokens, as in GPT-2 it is: models with one of its own are not supported"
            )
    return filled(nnx.eval_shape(lambda: GPT2(size, nnx.Rngs(0))), dict(_parameters(read))), size


def filled[T](model: T, arrays: Mapping[str, np.ndarray]) -> T:
    """A model, perhaps an abstract one, with these arrays as its parameters, by dotted paths."""
    graph, state = nnx.split(model)
    for path, variable in nnx.to_flat_state(state):
        if isinstance(variable, nnx.Param):
            variable.set_value(jnp.asarray(arrays[".".join(map(str, path))]))
    return nnx.merge(graph, state)


def _size(tensors: _tensors.Tensors, prefix: str, heads: int | None, epsilon: float) -> Size:
    config = _config(tensors.path.parent / "config.json")
    for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"):
        if f"{prefix}{name}" not in tensors or len(tensors.shape(f"{prefix}{name}")) != 2:
            raise Mistake(f"{tensors.path} has no matrix {name}: it does not hold a GPT-2")
    vocabulary, features = tensors.shape(f"{prefix}wte.weight")
    start = f"{prefix}h."
    layers = {name[len(start) :].split(".")[0] for name in tensors.names if name.startswith(start)}
    heads = config.get("n_head", heads)
    if heads is None:
        raise Mistake(f"no config.json beside {tensors.path} says how many heads: give --heads")
    if features % heads:
        raise Mistake(f"{features} features of {tensors.path} are no multiple of {heads} heads")
    return Size(
        vocabulary,
        tensors.shape(f"{prefix}wpe.weight")[0],
        features,
        tensors.shape(f"{prefix}h.0.mlp.c_fc.weight")[1],
        len(layers),
        heads,
        config.get("layer_norm_epsilon", epsilon),
        config.get("activation_function", "gelu_new"),
    )


def _config(path: Path) -> dict[str, Any]:
    """What `config.json` says, nothing where there is none. Refuses what `GPT2` does not do."""
    if not path.is_file():
        return {}
    try:
        config = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError):
        raise Mistake(f"{path} is no JSON object: get it again, or remove it") from None
    for name, only in ONLY.items():
        if config.get(name, only) != only:
            raise Mistake(f"{path} says {name} {config[name]!r}: only {only!r} is supported")
    if config.get("activation_function", "gelu_new") not in ACTIVATIONS:
        raise Mistake(
            f"{path} says activation_function {config['activation_function']!r}: supported are "
            f"{', '.join(ACTIVATIONS)}"
        )
    return config


def _shapes(size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors in a file. Weights are [in, out], as in a `Conv1D`."""
    d, hidden = size.features, size.hidden
    yield "wte.weight", (size.vocabulary, d)
    yield "wpe.weight", (size.positions, d)
    yield from _pair("ln_f", (d,), d)
    for i in range(size.layers):
        yield from _pair(f"h.{i}.ln_1", (d,), d)
        yield from _pair(f"h.{i}.attn.c_attn", (d, 3 * d), 3 * d)
        yield from _pair(f"h.{i}.attn.c_proj", (d, d), d)
        yield from _pair(f"h.{i}.ln_2", (d,), d)
        yield from _pair(f"h.{i}.mlp.c_fc", (d, hidden), hidden)
        yield from _pair(f"h.{i}.mlp.c_proj", (hidden, d), d)


def _pair(name: str, weight: tuple[int, ...], bias: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", weight
    yield f"{name}.bias", (bias,)


OURS = {
    "ln_1": "attention_norm",
    "ln_2": "mlp_norm",
    "attn.c_proj": "attention.out",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}


def _parameters(read: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters of a `GPT2`, by their dotted paths."""
    yield "tokens.embedding", read["wte.weight"]
    yield "positions.embedding", read["wpe.weight"]
    for name, array in read.items():
        module, _, kind = name.rpartition(".")
        if module in ("wte", "wpe"):
            continue
        layer = "norm"
        if module != "ln_f":
            _, i, theirs = module.split(".", 2)
            layer = f"layers.{i}.{OURS.get(theirs, theirs)}"
        if layer.endswith("attn.c_attn"):  # queries, keys and values lie beside each other
            parts = np.split(array, 3, axis=-1)
            named = {"bias": "bias", "weight": "kernel"}[kind]
            for product, part in zip(("query", "key", "value"), parts, strict=True):
                yield f"{layer.removesuffix('attn.c_attn')}attention.{product}.{named}", part
        elif kind == "bias":
            yield f"{layer}.bias", array
        else:
            yield f"{layer}.{'scale' if array.ndim == 1 else 'kernel'}", array
