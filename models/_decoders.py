"""Decoders on the disk: those that other programs wrote, and pruned ones, written and read here."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

import bsjax
import bsjax.nnx
from models import _gpt2 as gpt2
from models import _prune as prune
from models import _tensors, transformer
from models._cli import Mistake

KEY = "bsjax"  # of what a file of ours says about its tensors
BYTES = 256


class Decoder(NamedTuple):
    """A language model, and what it takes to make it again."""

    model: Any
    kind: str  # "gpt2", or "transformer": one of `models.transformer`
    about: dict[str, Any]  # the arguments of `blank`; fits in JSON
    trained_on: str | None = None  # the hash of a text, where it is known
    batches: int = 0  # of that text that it has seen: the next ones are others

    @property
    def vocabulary(self) -> int:
        return self.about["vocabulary"] if self.kind == "gpt2" else BYTES

    @property
    def positions(self) -> int | None:
        """The longest window, if there is one."""
        return self.about["positions"] if self.kind == "gpt2" else None


def blank(kind: str, about: Mapping[str, Any]) -> Any:
    """A dense model of a kind, whose parameters are still to be filled in."""
    if kind == "gpt2":
        size = gpt2.Size(**about)
        return nnx.eval_shape(lambda: gpt2.GPT2(size, nnx.Rngs(0)))
    config = transformer.Config(**about["flags"])
    size = transformer.Size(about["width"], about["hidden"], transformer.dense)
    return transformer.Transformer(config, size, nnx.Rngs(config.seed))


def start(flags: Mapping[str, Any], width: int) -> Decoder:
    """A fresh dense model of `models.transformer`, four times as wide in its MLPs."""
    about = {"flags": dict(flags), "width": width, "hidden": 4 * width}
    return Decoder(blank("transformer", about), "transformer", about)


def load(path: Path, *, heads: int | None = None, epsilon: float = gpt2.EPSILON) -> Decoder:
    """A decoder from

    * a checkpoint of `python -m models.transformer`, a folder: its dense model;
    * a file that `save` wrote;
    * a GPT-2 in safetensors, as `_gpt2.load` reads it.
    """
    if path.is_dir() and any(inside.name.isdigit() for inside in path.iterdir()):
        return _from_checkpoint(path)
    tensors = _tensors.Tensors(path)
    if KEY in tensors.metadata:
        return _ours(tensors)
    model, size = gpt2.from_tensors(tensors, heads=heads, epsilon=epsilon)
    return Decoder(model, "gpt2", size._asdict())


def save(path: Path, decoder: Decoder) -> None:
    """One safetensors file: parameters by their dotted paths, `.row` and `.col` of each pattern,
    and in the metadata what they make up."""
    patterns = _patterns(decoder.model)
    arrays = {name: np.asarray(array) for name, array in _parameters(decoder.model).items()}
    for name, p in patterns.items():
        arrays |= {f"{name}.row": np.asarray(p.row), f"{name}.col": np.asarray(p.col)}
    facts = {
        "kind": decoder.kind,
        "about": decoder.about,
        "trained on": decoder.trained_on,
        "batches": decoder.batches,
        "patterns": {n: {"grid": list(p.grid), "block": p.block[0]} for n, p in patterns.items()},
    }
    _tensors.write(path, arrays, {KEY: json.dumps(facts)})


def _ours(tensors: _tensors.Tensors) -> Decoder:
    try:
        facts = json.loads(tensors.metadata[KEY])
        model = blank(facts["kind"], facts["about"])
        patterns = {n: (tuple(p["grid"]), p["block"]) for n, p in facts["patterns"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise Mistake(
            f"{tensors.path} does not say what it holds ({type(error).__name__}): it was made by "
            "another version; prune the dense model again"
        ) from None
    indices = {f"{name}.{axis}" for name in patterns for axis in ("row", "col")}
    _tensors.check_names(tensors.path, indices, indices & tensors.names, "what it says")
    for name, (grid, block) in patterns.items():
        row, col = (tensors.array(f"{name}.{axis}") for axis in ("row", "col"))
        p, _ = bsjax.BlockPattern.from_coords(row, col, grid=grid, block=block)
        prune.place(model, name, p, jnp.zeros((p.capacity, *p.block)))
    prune.fuse(model)
    shapes = {name: tuple(array.shape) for name, array in _parameters(model).items()}
    _tensors.check_names(tensors.path, shapes, tensors.names - indices, "what it says")
    read = {name: tensors.floats(name, shape) for name, shape in shapes.items()}
    told = facts["kind"], facts["about"], facts.get("trained on"), facts.get("batches", 0)
    return Decoder(gpt2.filled(model, read), *told)


def _from_checkpoint(folder: Path) -> Decoder:
    where = f"the checkpoint in {folder}"
    try:
        with ocp.CheckpointManager(folder.absolute()) as manager:
            args = ocp.args.Composite(
                arrays=ocp.args.StandardRestore(),  # pyright: ignore[reportCallIssue]
                record=ocp.args.JsonRestore(),  # pyright: ignore[reportCallIssue]
            )
            step = manager.latest_step() or 0
            found = manager.restore(step, args=args)
        arrays, said = found["arrays"], found["record"]["about"]
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise Mistake(
            f"{where} cannot be read ({type(error).__name__}): it was damaged, or made by "
            "something else than models.transformer"
        ) from error
    models: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        if match := re.fullmatch(r"([^.]+)\.model\.(.+?)(\.value)?", name):
            models.setdefault(match[1], {})[match[2]] = array
    dense = [of for of in models.values() if not any(".pattern." in name for name in of)]
    hidden = [array.shape[1] for of in dense for n, array in of.items() if n.endswith("up.kernel")]
    if not hidden or "norm.scale" not in dense[0]:
        raise Mistake(f"{where} has no dense decoder: make one with python -m models.transformer")
    fields = {f"--{f.name}": f.name for f in dataclasses.fields(transformer.Config)}
    flags = {fields[name]: value for name, value in said.items() if name in fields}
    about = {"flags": flags, "width": len(dense[0]["norm.scale"]), "hidden": hidden[0]}
    model = blank("transformer", about)
    wanted = {name: tuple(array.shape) for name, array in _parameters(model).items()}
    given = {name: tuple(array.shape) for name, array in dense[0].items()}
    _tensors.check_names(folder, wanted, given, "a dense decoder of this version")
    if wrong := [name for name in wanted if wanted[name] != given[name]]:
        raise Mistake(f"{where} has other shapes than its flags say, such as that of {wrong[0]}")
    read = {name: np.asarray(array) for name, array in dense[0].items()}
    text = said.get("a text with the hash")
    return Decoder(gpt2.filled(model, read), "transformer", about, text, step)


def _parameters(model: Any) -> dict[str, Any]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def _patterns(model: Any) -> dict[str, bsjax.BlockPattern]:
    return {
        name: layer.pattern.get_value()
        for name, layer in prune.linears(model, lambda path: True).items()
        if isinstance(layer, bsjax.nnx.BlockLinear)
    }
