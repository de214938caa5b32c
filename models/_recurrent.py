"""A recurrent language model of bytes, its dense twin, and the arithmetic of their parameters.

`Embed(256) -> RNN(SmallWorldLSTMCell) -> Linear(256)`. After Gray, Radford and Kingma 2017, "GPU
Kernels for Block-Sparse Weights": a state several times as wide at the same number of parameters,
whose recurrent weights are block-sparse graphs, mixed over a few internal steps.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bsjax import BlockPattern, patterns
from models._cli import Mistake

BYTES = 256
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


GRAPHS: dict[str, Callable[[Size, int, int], np.ndarray]] = {
    "barabasi_albert": lambda s, n, seed: patterns.barabasi_albert(n, s.links, seed=seed),
    "watts_strogatz": lambda s, n, seed: patterns.watts_strogatz(n, s.links, s.rewired, seed=seed),
    "balanced": lambda s, n, seed: (
        patterns.balanced((n, n), min(1.0, 2 * s.links / n), seed=seed) | np.eye(n, dtype=bool)
    ),
}


def masks(size: Size, seed: int) -> list[np.ndarray]:
    """Which blocks each internal step stores, and last the four gates: `depth + 1` masks."""
    count = size.depth + 1
    if size.dense:
        return [np.ones((1, 1), bool)] * count
    blocks = size.hidden // size.block
    if size.graph == "strides":
        one = patterns.strides(blocks, size.depth if size.shared else count)
        return one[:1] * count if size.shared else one
    make_one = GRAPHS[size.graph]
    # 100 seeds apart: no two runs share a graph
    found = [make_one(size, blocks, 100 * seed + i) for i in range(1 if size.shared else count)]
    return found * count if size.shared else found


class LanguageModel(nnx.Module):
    """`(logits[n, l, 256], carry)` of the byte after each of `data[n, l]`, int32."""

    def __init__(self, size: Size, seed: int):
        rngs, dtype = nnx.Rngs(seed), jnp.dtype(size.dtype)
        embedding = nnx.initializers.orthogonal(size.embedding**0.5)
        self.size, self.seed = size, seed
        self.embed = nnx.Embed(
            BYTES, size.embedding, embedding_init=embedding, dtype=dtype, rngs=rngs
        )
        self.rnn = _rnn(size, seed, rngs)
        self.readout = nnx.Linear(_outputs(size), BYTES, dtype=dtype, rngs=rngs)

    def __call__(self, data: jax.Array, carry: Carry) -> tuple[jax.Array, Carry]:
        carry, y = self.rnn(self.embed(data), initial_carry=carry, return_carry=True)
        return self.readout(y).astype(jnp.float32), carry

    def initial_carry(self, n: int) -> Carry:
        """The state of `n` streams before their first byte: zeros."""
        carry = self.rnn.cell.initialize_carry((n, self.size.embedding), nnx.Rngs(0))
        return jax.tree.map(jnp.zeros_like, carry)

    def states(
        self,
        data: jax.Array,
        carry: Carry | None = None,
        *,
        lengths: jax.Array | None = None,
        last: bool = False,
    ) -> Carry:
        """(c, h) after each byte of `data[n, l]`, [n, l, hidden], or after the last, [n, hidden].

        With `lengths[n]` the state of text i stays as it is after `lengths[i]` bytes, so that
        `last` gives the state at the end of texts of unequal lengths. The backward pass of a call
        of the model is the faster one.
        """
        cell, rest = nnx.split(self.rnn.cell)
        carry = self.initial_carry(data.shape[0]) if carry is None else carry

        def step(carry: Carry, at: Any) -> tuple[Carry, Carry | None]:
            x, i = at
            after, _ = nnx.merge(cell, rest)(carry, x)
            if lengths is not None:
                goes_on = (i < lengths)[:, None]
                after = jax.tree.map(lambda new, old: jnp.where(goes_on, new, old), after, carry)
            return after, None if last else after

        x = self.embed(data).swapaxes(0, 1)
        end, every = jax.lax.scan(step, carry, (x, jnp.arange(data.shape[1])))
        return end if last else jax.tree.map(lambda a: a.swapaxes(0, 1), every)


def _rnn(size: Size, seed: int, rngs: nnx.Rngs) -> Any:
    """Flax's own LSTM, in the place of the small-world one."""
    cell = nnx.OptimizedLSTMCell(
        size.embedding, size.hidden, dtype=jnp.dtype(size.dtype), rngs=rngs
    )
    return nnx.RNN(cell, rngs=rngs)


def _outputs(size: Size) -> int:
    return size.hidden


def make(size: Size, seed: int = 0) -> LanguageModel:
    """The model of that size, with the weights and patterns of that seed."""
    return LanguageModel(size, seed)


# --------------------------------------------------------------------- the arithmetic of parameters


def parameters(size: Size) -> int:
    """How many parameters there are, counted whole."""
    recurrent = 4 * size.hidden * (size.hidden + size.embedding + 1)
    readout = BYTES * (_outputs(size) + 1)
    return BYTES * size.embedding + recurrent + readout


def matching_dense(size: Size, wanted: int | None = None) -> Size:
    """The dense model with as many parameters as `size` (or with `wanted`), within 1%.

    Its every feature sees the input and is seen by the readout; all else is as in `size`. The width
    is the roundest that comes close enough. Raises `Mistake` where no width does.
    """
    wanted = parameters(size) if wanted is None else wanted
    dense = size._replace(graph="dense", in_stride=1, out_stride=1)
    low, high = 1, 2
    while parameters(dense._replace(hidden=high)) <= wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        below = parameters(dense._replace(hidden=middle)) <= wanted
        low, high = (middle, high) if below else (low, middle)
    for unit in (32, 16, 8, 4, 2, 1):
        near = [w for w in (low // unit * unit, -(-high // unit) * unit) if w]
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
    blocks = least
    while parameters(of(blocks + 1)) <= wanted:
        blocks += 1
    return of(blocks)


# ------------------------------------------------------------------------------ models on the disk


def save(folder: Path, model: LanguageModel, about: dict[str, Any]) -> None:
    """`model.json`, the sizes and what is said `about` it, and `model.npz`, all variables."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays, record = _arrays(model), {"size": model.size._asdict(), "seed": model.seed}
    aside = folder / f"model.{os.getpid()}.npz"
    np.savez(aside, **arrays)  # pyright: ignore[reportArgumentType]
    aside.replace(folder / "model.npz")
    (folder / "model.json").write_text(json.dumps(record | about, indent=2) + "\n", "utf-8")


def load(folder: Path) -> LanguageModel:
    """The model that `save` wrote into `folder`, ready to be evaluated."""
    try:
        record = json.loads((folder / "model.json").read_text("utf-8"))
        size, seed = Size(**record["size"]), int(record["seed"])
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
    model = make(size, seed)
    if {n: a.shape for n, a in _arrays(model).items()} != {n: a.shape for n, a in arrays.items()}:
        raise Mistake(
            f"the model in {folder} has other variables than its sizes say: train it anew"
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
