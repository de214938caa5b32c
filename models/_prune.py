"""Which blocks of a dense model stay, and the block-sparse model that is made of them.

A block counts for its l2 norm, as single weights count for their magnitude (Han, Pool, Tran and
Dally 2015, "Learning both Weights and Connections"; of groups of weights: Narang, Undersander and
Diamos 2017, "Block-Sparse Recurrent Neural Networks"), or for what the loss would change by without
it, to first order (Molchanov, Mallya, Tyree, Frosio and Kautz 2019, "Importance Estimation for
Neural Network Pruning").
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bsjax
import bsjax.nnx
from models._cli import Mistake

SCOPES = ("layer", "global")
BALANCES = ("none", "columns", "rows")

type Path = tuple[Any, ...]
type Masks = dict[str, np.ndarray]  # bool (block-rows, block-columns), by the place of the layer


class Weight(NamedTuple):
    """The matrix `[in, out]` of a layer, and which of its blocks are there to be kept."""

    matrix: np.ndarray
    stored: np.ndarray  # bool (block-rows, block-columns)
    block: int

    def norms(self) -> np.ndarray:
        """`block_norms`, of missing blocks minus infinity."""
        return np.where(self.stored, block_norms(self.matrix, self.block), -np.inf)


def inner(path: Path) -> bool:
    """All linear layers but the one to the vocabulary."""
    return path[-1] != "head"


def linears(model: Any, which: Callable[[Path], bool] = inner) -> dict[str, Any]:
    """The linear layers of a model by their dotted paths, dense or block-sparse."""
    return {
        ".".join(map(str, path)): layer
        for path, layer in nnx.iter_graph(model)
        if type(layer) in (nnx.Linear, bsjax.nnx.BlockLinear) and which(path)
    }


def weights(model: Any, block: int, which: Callable[[Path], bool] = inner) -> dict[str, Weight]:
    """What there is to prune. A model that has been pruned can be pruned further."""
    found = {name: _weight(name, layer, block) for name, layer in linears(model, which).items()}
    if not found:
        raise Mistake("the model has no linear layers to prune: give one that is dense")
    return found


def block_norms(matrix: np.ndarray, block: int) -> np.ndarray:
    """The l2 norm of each block, float64 [r, c]. What the last blocks lack counts as zeros."""
    return np.sqrt(block_sums(matrix.astype(np.float64) ** 2, block))


def block_sums(matrix: np.ndarray, block: int) -> np.ndarray:
    """The sum of each block, float64 [r, c]."""
    return _tiles(matrix.astype(np.float64), block).sum((1, 3))


def masks(
    scores: Mapping[str, np.ndarray], density: float, *, scope: str = "layer", balance: str = "none"
) -> Masks:
    """The blocks with the highest scores; those that are minus infinity stay out.

    * `scope="layer"`: `round(density * r * c)` blocks of each layer, one at least. `"global"`: so
      many of all layers together, wherever they score highest.
    * `balance="columns"`: the block-columns of a layer store equally many, up to one, so that
      every output sums over as many inputs; what is left over goes where it scores highest.
      `"rows"`: the block-rows do. A layer stores as many blocks with it as without.
    """
    if scope == "layer":
        counts = {name: max(1, round(density * score.size)) for name, score in scores.items()}
    else:
        wanted = round(density * sum(score.size for score in scores.values()))
        joined = np.concatenate([score.ravel() for score in scores.values()])
        best = np.zeros(joined.size, bool)
        best[np.argsort(-joined, kind="stable")[:wanted]] = True
        parts = np.split(best, np.cumsum([score.size for score in scores.values()])[:-1])
        counts = {name: int(part.sum()) for name, part in zip(scores, parts, strict=True)}
    return {name: keep(score, counts[name], balance) for name, score in scores.items()}


def keep(scores: np.ndarray, count: int, balance: str = "none") -> np.ndarray:
    """The `count` blocks with the highest scores, or with the highest ranks in their block-column
    or block-row. The first of equals stays."""
    ranks = np.zeros(scores.shape, int)
    if balance != "none":
        axis = {"columns": 0, "rows": 1}[balance]
        ranks = np.argsort(np.argsort(-scores, axis, kind="stable"), axis, kind="stable")
    order = np.lexsort((-scores.ravel(), ranks.ravel()))
    order = order[np.isfinite(scores.ravel()[order])][:count]
    mask = np.zeros(scores.size, bool)
    mask[order] = True
    return mask.reshape(scores.shape)


def by_magnitude(
    found: Mapping[str, Weight], density: float, *, scope: str = "layer", balance: str = "none"
) -> Masks:
    """`masks` of the norms of blocks."""
    scores = {name: one.norms() for name, one in found.items()}
    return masks(scores, density, scope=scope, balance=balance)


def saliencies(
    model: Any, gradients: Iterable[nnx.State], block: int, which: Callable[[Path], bool] = inner
) -> dict[str, np.ndarray]:
    """The score `mean((sum of g * w over a block)^2)` of each block, over the gradients of several
    batches: the squared change of the loss of a batch if the block were zero, to first order."""
    found, twin, count = weights(model, block, which), clone(model), 0
    sums = {name: np.zeros(one.stored.shape) for name, one in found.items()}
    values = nnx.state(model, nnx.Param)
    for count, gradient in enumerate(gradients, 1):  # noqa: B007
        nnx.update(twin, jax.tree.map(jnp.multiply, values, gradient))
        for name, product in weights(twin, block, which).items():
            sums[name] += block_sums(product.matrix, block) ** 2
    return {name: np.where(one.stored, sums[name] / count, -np.inf) for name, one in found.items()}


def at_random(
    found: Mapping[str, Weight], like: Masks, *, balance: str = "none", seed: int
) -> Masks:
    """As many blocks of each layer as in `like`, drawn from those that there are."""
    rng = np.random.default_rng(seed)
    scores = {
        name: np.where(one.stored, rng.random(one.stored.shape), -np.inf)
        for name, one in found.items()
    }
    return {name: keep(score, int(like[name].sum()), balance) for name, score in scores.items()}


def share(kept: Masks, found: Mapping[str, Weight]) -> float:
    """Weights in these blocks over all weights of the layers. What pads a last block is none."""
    inside = 0
    for name, mask in kept.items():
        block = found[name].block
        tall, wide = (
            np.minimum(block, side - block * np.arange(count))
            for side, count in zip(found[name].matrix.shape, mask.shape, strict=True)
        )
        inside += int(tall @ mask @ wide)
    return inside / sum(one.matrix.size for one in found.values())


def pruned[M: nnx.Module](model: M, kept: Masks, block: int) -> M:
    """A copy of a model whose linear layers store these blocks, bitwise as they were.

    Biases, and everything else, are those of the model.
    """
    found, copy = weights(model, block, lambda path: ".".join(map(str, path)) in kept), clone(model)
    for name, mask in kept.items():
        p = bsjax.BlockPattern.from_mask(mask, block)
        # as bsjax.fromdense, which is compiled for each number of blocks: GPT-2 has 72 layers
        tiles = _tiles(found[name].matrix, block).swapaxes(1, 2)
        values = jnp.asarray(tiles[np.asarray(p.row), np.asarray(p.col)])
        place(copy, name, p, values)
    fuse(copy)
    return copy


def place(model: Any, name: str, p: bsjax.BlockPattern, values: Any) -> None:
    """Puts a `BlockLinear` with these values in the place of a linear layer, which gives it its
    bias, its dtypes and its precision."""
    *parents, last = (int(key) if key.isdigit() else key for key in name.split("."))
    holder = functools.reduce(_part, parents, model)
    old = _part(holder, last)
    # its own initial values would be drawn for nothing, and for each pattern be compiled
    new = nnx.eval_shape(
        lambda: bsjax.nnx.BlockLinear(
            old.in_features,
            old.out_features,
            pattern=p,
            use_bias=old.bias is not None,
            dtype=old.dtype,
            param_dtype=old.param_dtype,
            precision=old.precision,
            rngs=nnx.Rngs(0),
        )
    )
    new.values.set_value(values)
    new.pattern.set_value(jax.tree.map(jnp.array, p))
    if old.bias is not None:
        new.bias = old.bias
    if isinstance(last, int):
        holder[last] = new
    else:
        setattr(holder, last, new)


def fuse(model: Any) -> None:
    """Makes `BlockMLP`s of MLPs whose layers have both become block-sparse: a kernel may do them as
    one, and add the residual. Gated ones stay, since theirs have different patterns."""
    for _, layer in nnx.iter_modules(model):
        old = getattr(layer, "mlp", None)
        if not isinstance(layer, bsjax.nnx.BlockTransformerLayer) or old is None:
            continue
        if isinstance(old, bsjax.nnx.BlockMLP) or old.gate is not None:
            continue
        up, down = old.up, old.down
        if not all(isinstance(one, bsjax.nnx.BlockLinear) for one in (up, down)):
            continue
        new = nnx.eval_shape(functools.partial(_mlp, up, down, old.activation))
        new.up, new.down = up, down
        layer.mlp = new


def clone[M: nnx.Module](model: M) -> M:
    """With variables and arrays of its own: those of the model may be donated."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(jnp.array, state))


def _weight(name: str, layer: Any, block: int) -> Weight:
    if isinstance(layer, nnx.Linear):
        matrix = np.asarray(layer.kernel[...])
        if block > min(matrix.shape):
            raise Mistake(
                f"--block {block} is larger than a side of the layer {name}, {matrix.shape[0]} x "
                f"{matrix.shape[1]}: give a smaller one"
            )
        return Weight(matrix, np.ones([-(-side // block) for side in matrix.shape], bool), block)
    p = layer.pattern.get_value()
    if p.block != (block, block):
        raise Mistake(
            f"the layer {name} has blocks of {p.block[0]} x {p.block[1]} already: give --block "
            f"{p.block[0]} to prune it further"
        )
    matrix = np.asarray(bsjax.todense(layer.values[...], p))
    return Weight(matrix[: layer.in_features, : layer.out_features], np.asarray(p.mask()), block)


def _tiles(matrix: np.ndarray, block: int) -> np.ndarray:
    """The matrix as [r, block, c, block], with zeros behind it."""
    wide = np.pad(matrix, [(0, -side % block) for side in matrix.shape])
    return wide.reshape(-1, block, wide.shape[1] // block, block)


def _part(holder: Any, key: str | int) -> Any:
    return holder[key] if isinstance(key, int) else getattr(holder, key)


def _mlp(up: Any, down: Any, activation: Any) -> bsjax.nnx.BlockMLP:
    patterns = {"pattern": up.pattern.get_value(), "down_pattern": down.pattern.get_value()}
    features = (up.in_features, up.out_features, down.out_features)
    return bsjax.nnx.BlockMLP(*features, activation=activation, rngs=nnx.Rngs(0), **patterns)
