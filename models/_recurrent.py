"""A recurrent language model of bytes, its dense twin, and the arithmetic of their parameters.

`Embed(256) -> RNN(SmallWorldLSTMCell) -> Linear(256)`. After Gray, Radford and Kingma 2017, "GPU
Kernels for Block-Sparse Weights": a state several times as wide at the same number of parameters,
whose recurrent weights are block-sparse graphs, mixed over a few internal steps.
"""

import bisect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bsjax.nnx
from bsjax import BlockPattern, patterns
from models._cli import Mistake

BYTES = 256
SPARSE, DENSE = "small-world", "dense"  # the two that are compared, by name
type Carry = tuple[jax.Array, jax.Array]  # (c, h), each [n, hidden]


class Size(NamedTuple):
    """What a model is made of. `graph="dense"` stores every weight; `block` is not read then."""

    hidden: int  # features of the state
    embedding: int = 64
    depth: int = 5  # internal steps
    block: int = 32
    graph: str = "barabasi_albert"
    links: int = 2  # of a block to others: m of Barabasi-Albert, k_half of Watts-Strogatz
    rewired: float = 0.2  # share of the links of Watts-Strogatz
    in_stride: int = 2  # every so many features of the state see the input,
    out_stride: int = 2  # and are seen by the readout
    shared: bool = False  # one pattern for all internal steps
    layer_norm: bool = True
    dropout: float = 0.0
    dtype: str = "float32"  # to compute in; parameters are float32
    remat: bool = False

    @property
    def dense(self) -> bool:
        return self.graph == "dense"

    @property
    def outputs(self) -> int:
        """Features that the readout sees."""
        return -(-self.hidden // self.out_stride)


PARAMETERS: dict[str, Callable[[Size, int], dict[str, Any]]] = {
    "barabasi_albert": lambda size, n: {"m": size.links},
    "watts_strogatz": lambda size, n: {"k_half": size.links, "p": size.rewired},
    "strides": lambda size, n: {},
}


def masks(size: Size, seed: int) -> list[np.ndarray]:
    """Which blocks each internal step stores, and last the four gates: `depth + 1` masks."""
    if size.dense:
        return [np.ones((1, 1), bool)] * (size.depth + 1)
    n = size.hidden // size.block
    own = PARAMETERS[size.graph](size, n)
    return patterns.step_masks(n, size.depth, size.graph, own, share=size.shared, seed=seed)


class LanguageModel(nnx.Module):
    """`(logits[n, l, 256], carry)` of the byte after each of `data[n, l]`, int32. Logits are in
    float32 at least."""

    def __init__(self, size: Size, seed: int):
        rngs, dtype = nnx.Rngs(seed), jnp.dtype(size.dtype)
        embedding = nnx.initializers.orthogonal(size.embedding**0.5)
        self.size = size
        self.embed = nnx.Embed(
            BYTES, size.embedding, embedding_init=embedding, dtype=dtype, rngs=rngs
        )
        self.rnn = bsjax.nnx.RNN(_cell(size, seed, rngs), remat=size.remat)
        self.readout = nnx.Linear(size.outputs, BYTES, dtype=dtype, rngs=rngs)

    def __call__(self, data: jax.Array, carry: Carry) -> tuple[jax.Array, Carry]:
        carry, y = self.rnn(self.embed(data), initial_carry=carry, return_carry=True)
        logits = self.readout(y)
        return logits.astype(np.promote_types(logits.dtype, np.float32)), carry

    def initial_carry(self, n: int) -> Carry:
        """The state of `n` streams before their first byte: zeros."""
        return self.rnn.cell.initialize_carry((n, self.size.embedding))

    def states(
        self,
        data: jax.Array,
        carry: Carry | None = None,
        *,
        lengths: jax.Array | None = None,
    ) -> Carry:
        """(c, h) after each byte of `data[n, l]`, [n, l, hidden].

        With `lengths[n]` the state of text i stays as it is after `lengths[i]` bytes, so that the
        last ones are those at the end of texts of unequal lengths. The backward pass of a call of
        the model is the faster one.
        """
        cell, rest = nnx.split(self.rnn.cell)
        carry = self.initial_carry(data.shape[0]) if carry is None else carry

        def step(carry: Carry, at: Any) -> tuple[Carry, Carry]:
            x, i = at
            after, _ = nnx.merge(cell, rest)(carry, x)
            if lengths is not None:
                goes_on = (i < lengths)[:, None]
                after = jax.tree.map(lambda new, old: jnp.where(goes_on, new, old), after, carry)
            return after, after

        x = self.embed(data).swapaxes(0, 1)
        _, every = jax.lax.scan(step, carry, (x, jnp.arange(data.shape[1])))
        return jax.tree.map(lambda a: a.swapaxes(0, 1), every)


def _cell(size: Size, seed: int, rngs: nnx.Rngs) -> bsjax.nnx.SmallWorldLSTMCell:
    return bsjax.nnx.SmallWorldLSTMCell(
        size.embedding,
        size.hidden,
        pattern=masks(size, seed),
        block=size.hidden if size.dense else size.block,
        depth=size.depth,
        in_stride=size.in_stride,
        out_stride=size.out_stride,
        use_layer_norm=size.layer_norm,
        dropout_rate=size.dropout,
        dtype=jnp.dtype(size.dtype),
        rngs=rngs,
    )


def make(size: Size, seed: int = 0) -> LanguageModel:
    """The model of that size, with the weights and patterns of that seed."""
    return LanguageModel(size, seed)


# --------------------------------------------------------------------- the arithmetic of parameters


def parameters(size: Size) -> int:
    """How many there are, counted whole. With D internal steps and then four gates, of stored
    blocks `e_0 .. e_D`, v vectors (gain and bias, or bias alone) of every product::

        256 embedding                                   of the embedding
        2 ceil(hidden / in_stride) (embedding + v)      of the two maps of the input
        block^2 (sum_(j < D) e_j + 4 e_D)               of the recurrent matrices,
        (D + 4) v hidden                                and of their norms
        256 (ceil(hidden / out_stride) + 1)             of the readout
    """
    *steps, gates = (int(mask.sum()) for mask in masks(size, 0))  # as many for every seed
    vectors = 2 if size.layer_norm else 1
    block = size.hidden if size.dense else size.block
    projected = 2 * -(-size.hidden // size.in_stride) * (size.embedding + vectors)
    recurrent = block**2 * (sum(steps) + 4 * gates)
    norms = (size.depth + 4) * vectors * size.hidden
    return BYTES * size.embedding + projected + recurrent + norms + BYTES * (size.outputs + 1)


def density(size: Size) -> float:
    """Stored share of the recurrent weights, the mask of the gates counted four times."""
    *steps, gates = (float(mask.mean()) for mask in masks(size, 0))
    return (sum(steps) + 4 * gates) / (size.depth + 4)


def matching_dense(size: Size, wanted: int | None = None) -> Size:
    """The dense model with as many parameters as `size` (or with `wanted`), within 1%.

    Its every feature sees the input and is seen by the readout; all else is as in `size`. The width
    is the roundest that comes close enough. Raises `Mistake` where no width does.
    """
    wanted = parameters(size) if wanted is None else wanted
    dense = size._replace(graph="dense", in_stride=1, out_stride=1)
    width = _most(lambda width: parameters(dense._replace(hidden=width)), 1, wanted)
    for unit in (32, 16, 8, 4, 2, 1):
        near = [w for w in (width // unit * unit, width // unit * unit + unit) if w]
        sizes = [dense._replace(hidden=width) for width in near]
        best = min(sizes, key=lambda one: abs(parameters(one) - wanted))
        if abs(parameters(best) / wanted - 1) <= 0.01:
            return best
    raise Mistake(
        f"no dense model has {wanted:,} parameters within 1%: take a larger --hidden, or a smaller "
        "--embedding"
    )


def widest(size: Size, wanted: int) -> Size:
    """`size` with the widest state, in whole blocks, that has at most `wanted` parameters."""

    def of(blocks: int) -> Size:
        return size._replace(hidden=blocks * size.block)

    # a graph needs more blocks than each has links
    least = size.links + 1 if size.graph == "barabasi_albert" else 2 * size.links + 1
    if parameters(of(least)) > wanted:
        raise Mistake(
            f"the smallest model of blocks of {size.block} has {parameters(of(least)):,} "
            f"parameters, more than the {wanted:,} wanted: take a smaller --block, or fewer --links"
        )
    return of(_most(lambda blocks: parameters(of(blocks)), least, wanted))


def _most(count: Callable[[int], int], low: int, wanted: int) -> int:
    """The largest number, at least `low`, whose growing `count` is at most `wanted`."""
    while count(2 * low) <= wanted:
        low *= 2
    return bisect.bisect_right(range(2 * low), wanted, low + 1, key=count) - 1


# ------------------------------------------------------------------------------ models on the disk


def save(folder: Path, model: LanguageModel, about: dict[str, Any]) -> None:
    """`model.json`, its size and what is said `about` it, and `model.npz`, all variables."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays, record = _arrays(model), {"size": model.size._asdict()}
    aside = folder / f"model.{os.getpid()}.npz"
    np.savez(aside, **arrays)  # pyright: ignore[reportArgumentType]
    aside.replace(folder / "model.npz")
    (folder / "model.json").write_text(json.dumps(record | about, indent=2) + "\n", "utf-8")


def load(folder: Path) -> LanguageModel:
    """The model that `save` wrote into `folder`, ready to be evaluated."""
    try:
        record = json.loads((folder / "model.json").read_text("utf-8"))
        size = Size(**record["size"])
        with np.load(folder / "model.npz") as found:
            arrays = dict(found)
    except FileNotFoundError:
        raise Mistake(
            f"no model in {folder}: `python -m models.lstm` writes one to --out"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Mistake(
            f"the model in {folder} cannot be read ({type(error).__name__}): it was damaged or "
            "made by something else; train it again"
        ) from error
    model = make(size)
    if {n: a.shape for n, a in _arrays(model).items()} != {n: a.shape for n, a in arrays.items()}:
        raise Mistake(
            f"the model in {folder} has other variables than its size says: train it again"
        )
    state = nnx.state(model, _stored)
    leaves = jax.tree_util.tree_map_with_path(lambda at, _: jnp.asarray(arrays[_name(at)]), state)
    nnx.update(model, leaves)
    model.eval()
    return model


def stored_patterns(model: LanguageModel) -> list[BlockPattern]:
    """The patterns in a model: one for each internal step and one for the gates, or one shared."""
    leaves = jax.tree.leaves(nnx.state(model), is_leaf=lambda x: isinstance(x, BlockPattern))
    return [leaf for leaf in leaves if isinstance(leaf, BlockPattern)]


def _stored(path: Any, variable: Any) -> bool:
    """Parameters and patterns: all but the state of generators of random numbers."""
    del path
    return not isinstance(variable, nnx.RngState)


def _arrays(model: LanguageModel) -> dict[str, np.ndarray]:
    named = jax.tree_util.tree_leaves_with_path(nnx.state(model, _stored))
    return {_name(path): np.array(leaf) for path, leaf in named}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
