"""A decoder and its optimizer on several devices: batches are cut over the mesh axis "data", each
model over the axis "model", by heads and by hidden features.

What is saved, measured and compared is always the whole state, that of one device: `Team` spreads
it over the mesh and gathers it again, exactly. A cut leaf is a stack of parts, `[parts, ...]`.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bsjax
from bsjax import BlockPattern
from models import _cli as cli
from models._cli import Mistake
from models._decoder import MODEL, Size, Transformer, block_sparse
from models._steps import Loss, mean_bits

DATA = "data"
# Features out are cut where heads or hidden features are made (in `qkv` each of three groups), and
# features in where these are used (Shoeybi et al. 2019).
COLUMNS = {"qkv": 3, "query": 1, "key": 1, "value": 1, "up": 1, "gate": 1}
ROWS = ("projection", "out", "down")


class Team:
    """The devices of a run. One device is left alone: nothing is cut and nothing is moved."""

    def __init__(self, config: Any, sizes: Mapping[str, Any]) -> None:
        self.parts, self.mesh = config.tensor_parallel, None
        self.losses: dict[str, Loss] = dict.fromkeys(sizes, mean_bits)
        if config.data_parallel * config.tensor_parallel == 1:
            return
        for size in sizes.values():
            check(config, size)
        self.mesh = mesh_of(config.data_parallel, config.tensor_parallel)
        self._whole: dict[str, Any] = {}  # of each model: the shapes of its leaves
        self._cuts: dict[str, dict[str, Any]] = {}  # and its patterns, by layer
        if self.parts > 1:
            self.losses = {name: cut_loss(config, size, self.mesh) for name, size in sizes.items()}

    def data(self, data: jax.Array) -> jax.Array:
        """A batch, on the devices that share it."""
        return data if self.mesh is None else jax.device_put(data, self._at(P(DATA)))

    def spread(self, runs: Mapping[str, Any]) -> None:
        """Puts models and optimizers where they are trained."""
        if self.mesh is None:
            return
        for name, run in runs.items():
            state = nnx.state(run)
            self._whole[name] = jax.tree.map(lambda a: a.shape, state)
            self._cuts[name] = cuts(state, self.parts) if self.parts > 1 else {}
            nnx.update(run, self._map(state, functools.partial(self._spread, self._cuts[name])))

    def states(self, runs: Mapping[str, Any]) -> dict[str, Any]:
        """The whole states, as one device has them."""
        if self.mesh is None:
            return {name: nnx.state(run) for name, run in runs.items()}
        return {
            name: self._map(
                nnx.state(run), functools.partial(self._gather, self._cuts[name]), self._whole[name]
            )
            for name, run in runs.items()
        }

    def gather(self, runs: Mapping[str, Any]) -> None:
        """Brings models and optimizers back to one device."""
        if self.mesh is not None:
            for name, state in self.states(runs).items():
                nnx.update(runs[name], state)

    def _at(self, spec: P) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, spec)

    def _map(self, state: Any, change: Any, *others: Any) -> Any:
        def leaf(path: Any, array: Any, *others: Any) -> Any:
            return change(_names(path), array, *others)

        return jax.tree_util.tree_map_with_path(leaf, state, *others, is_leaf=_is_pattern)

    def _spread(self, patterns: Mapping[str, Any], names: list[str], leaf: Any) -> Any:
        layer, what = _place(names)
        if self.parts == 1 or not is_cut(names):
            return jax.device_put(leaf, self._at(P()))
        local, order = patterns.get(layer, (None, None))
        if what == "pattern":
            parts = local
        elif what == "values":
            parts = np.where(order[..., None, None] < 0, 0, np.asarray(leaf)[order])
        else:
            parts = _split(np.asarray(leaf), self.parts, _kind(layer))
        return jax.device_put(parts, self._at(P(MODEL)))

    def _gather(self, patterns: Any, names: list[str], leaf: Any, shape: Any) -> Any:
        layer, what = _place(names)
        if self.parts == 1 or not is_cut(names):
            return jax.device_put(leaf, jax.devices()[0])
        _, order = patterns.get(layer, (None, None))
        if what == "pattern":
            return patterns[f"{layer} whole"]
        parts = np.asarray(leaf)
        if what == "values":
            whole = np.zeros(shape, parts.dtype)
            whole[order[order >= 0]] = parts[order >= 0]
        else:
            whole = _joined(parts, shape, _kind(layer))
        return jax.numpy.asarray(whole)


@functools.cache  # fresh models of a size compile nothing
def cut_loss(config: Any, size: Size, mesh: Mesh) -> Loss:
    """The mean loss of a model that is cut over the mesh."""
    parts = mesh.shape[MODEL]
    # only the graph is made here, of the size of a part; which blocks are stored is in the state
    alone = dataclasses.replace(config, density=1.0)
    part = size._replace(parts=parts)
    graph = nnx.graphdef(nnx.eval_shape(lambda: Transformer(alone, part, nnx.Rngs(0))))

    def own(path: Any, leaf: Any) -> Any:
        names = _names(path)
        if is_cut(names):
            return leaf[0]
        layer, what = _place(names)
        # every part adds it
        return leaf / parts if what == "bias" and _kind(layer) in ROWS else leaf

    def on_each(state: Any, data: jax.Array) -> Any:
        model = nnx.merge(graph, jax.tree_util.tree_map_with_path(own, state))
        value = jax.lax.pmean(mean_bits(model, data), DATA)
        return value, nnx.state(model, nnx.RngState)

    def spec(path: Any, leaf: Any) -> P:
        return P(MODEL) if is_cut(_names(path)) else P()

    def loss(model: Any, data: jax.Array) -> jax.Array:
        state = nnx.state(model)
        specs = jax.tree_util.tree_map_with_path(spec, state)
        on_all = jax.shard_map(on_each, mesh=mesh, in_specs=(specs, P(DATA)), out_specs=(P(), P()))
        value, counters = on_all(state, data)
        nnx.update(model, counters)
        return value

    return loss


def cuts(state: Any, parts: int) -> dict[str, Any]:
    """The patterns of the parts of every block-sparse layer, and the order of their values; beside
    them the whole pattern."""
    found = {}
    for path, p in jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_pattern):
        names = _names(path)
        if isinstance(p, BlockPattern) and is_cut(names):
            layer, _ = _place(names)
            found[f"{layer} whole"] = p
            found[layer] = cut(p, parts, _kind(layer))
    return found


def cut(p: BlockPattern, parts: int, layer: str) -> tuple[BlockPattern, np.ndarray]:
    """Patterns `[parts, e]` of a layer's parts, and the order `[parts, e]` of their values: -1 in
    spare slots."""
    if layer in ROWS:
        local, order = bsjax.partition(p, parts, axis="rows")
        return local, np.asarray(order)
    groups = COLUMNS[layer]
    row, col = np.asarray(p.row), np.asarray(p.col)
    width = p.grid[1] // (groups * parts)
    # column (group, part, j) goes to (part, group, j): each part has its share of every group
    group, part, j = col // (width * parts), col // width % parts, col % width
    col = ((part * groups + group) * width + j).astype(np.int32)
    q, first = BlockPattern.from_coords(row, col, grid=p.grid, block=p.block)
    local, order = bsjax.partition(q, parts, axis="columns")
    order = np.asarray(order)
    return local, np.where(order < 0, -1, np.asarray(first)[order])


def _split(a: np.ndarray, parts: int, layer: str) -> np.ndarray:
    """Parts `[parts, ...]` of a dense kernel or bias. Zeros fill up hidden features that parts do
    not divide: they get zero gradients, and stay zeros."""
    axis = 0 if layer in ROWS else a.ndim - 1
    groups = COLUMNS.get(layer, 1)
    a = np.moveaxis(a, axis, 0)
    short = -len(a) % (parts * groups)
    a = np.pad(a, [(0, short)] + [(0, 0)] * (a.ndim - 1))
    a = a.reshape(groups, parts, -1, *a.shape[1:]).swapaxes(0, 1)
    return np.moveaxis(a.reshape(parts, -1, *a.shape[3:]), 1, axis + 1)


def _joined(parts: np.ndarray, shape: tuple[int, ...], layer: str) -> np.ndarray:
    """What `_split` has split."""
    axis = 0 if layer in ROWS else len(shape) - 1
    groups = COLUMNS.get(layer, 1)
    a = np.moveaxis(parts, axis + 1, 1)
    a = a.reshape(len(a), groups, -1, *a.shape[2:]).swapaxes(0, 1)
    a = a.reshape(-1, *a.shape[3:])[: shape[axis]]
    return np.moveaxis(a, 0, axis)


def is_cut(names: list[str]) -> bool:
    """Whether a leaf of a state, or the moments of one, is cut over the devices of a model."""
    layer, what = _place(names)
    kind = _kind(layer)
    if kind in COLUMNS:
        return what in ("kernel", "values", "pattern", "bias")
    return kind in ROWS and what in ("kernel", "values", "pattern")


def _place(names: list[str]) -> tuple[str, str]:
    """The path of the layer from `blocks` on, and which of its variables this is."""
    names = names[names.index("blocks") :] if "blocks" in names else names
    for i, (layer, what) in enumerate(itertools.pairwise(names)):
        if layer in COLUMNS or layer in ROWS:
            return ".".join(names[: i + 1]), what
    return "", ""


def _kind(layer: str) -> str:
    return layer.rpartition(".")[2]


def _names(path: Any) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator=".").split(".")


def _is_pattern(leaf: Any) -> bool:
    return isinstance(leaf, BlockPattern)


def check(config: Any, size: Size) -> None:
    """Raises `Mistake` where a model or a batch cannot be cut into equal parts."""
    parts, block = config.tensor_parallel, config.block
    cli.check_multiple("heads", config.heads, "--tensor_parallel", parts)
    each = config.data_parallel * config.accumulate
    cli.check_multiple("batch", config.batch, "--data_parallel x --accumulate", each)
    for name, features in (("width", size.width), ("hidden features", size.hidden)):
        blocks = features // block
        if size.linear is block_sparse and blocks % parts:
            raise Mistake(
                f"--tensor_parallel {parts} does not divide the {blocks} blocks of the {name}: "
                "give a smaller --block or another --width"
            )


def mesh_of(data: int, model: int) -> Mesh:
    """Devices as a mesh; on a machine without accelerators they are virtual ones of the CPU, which
    JAX makes before it first runs."""
    count = data * model
    with contextlib.suppress(RuntimeError):  # JAX ran already, perhaps with enough of them
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices()
    if len(found) < count:
        raise Mistake(
            f"--data_parallel {data} x --tensor_parallel {model} asks for {count} devices, and "
            f"there are {len(found)}: lower one of them"
        )
    kinds = (AxisType.Auto, AxisType.Auto)
    return Mesh(np.array(found[:count]).reshape(data, model), (DATA, MODEL), axis_types=kinds)
