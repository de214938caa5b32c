"""Tensors in safetensors files, of one piece or in shards, and the words for what is wrong."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models._cli import Mistake

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")


class Tensors:
    """The tensors of a model by name, read when they are asked for.

    `path` is a file, an index of shards (`NAME.safetensors.index.json`: a JSON object whose
    `weight_map` says in which file each tensor is), or a folder with either under the name that
    Hugging Face gives it.
    """

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            found = [path / name for name in (ONE, INDEX) if (path / name).is_file()]
            if not found:
                raise Mistake(f"no {ONE} and no {INDEX} in {path}: name the file itself")
            path = found[0]
        if not path.is_file():
            raise Mistake(f"{path} does not exist: check the path given with --model")
        self.path = path
        self.metadata: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        if path.name.endswith(".index.json"):
            self._shards(path)
        else:
            file = _opened(path)
            self.metadata = file.metadata() or {}
            self._files = dict.fromkeys(file.keys(), file)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def floats(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor of floating-point numbers and of this shape, in float32."""
        kind = self._files[name].get_slice(name).get_dtype()
        if kind not in FLOATS:
            raise Mistake(
                f"{name} in {self.path} holds {kind} numbers, expected one of {', '.join(FLOATS)}: "
                "convert the file to one without quantization"
            )
        if self.shape(name) != shape:
            raise Mistake(f"{name} in {self.path} has shape {self.shape(name)}, expected {shape}")
        return self.array(name).astype(np.float32)

    def array(self, name: str) -> np.ndarray:
        """A tensor as it is."""
        try:
            return self._files[name].get_tensor(name)
        except SafetensorError as error:
            raise Mistake(f"{name} in {self.path} cannot be read ({error}): get it again") from None

    def _shards(self, index: Path) -> None:
        try:
            places = json.loads(index.read_text("utf-8"))["weight_map"]
            shards = {shard: index.parent / shard for shard in sorted(set(places.values()))}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Mistake(
                f"{index} is no index of shards: it must be JSON with a `weight_map` from names to "
                "files"
            ) from None
        if missing := [shard for shard, path in shards.items() if not path.is_file()]:
            raise Mistake(f"{index} names {_some(missing)}, not there: get all shards of the model")
        files = {shard: _opened(path) for shard, path in shards.items()}
        self._files = {name: files[shard] for name, shard in places.items()}
        inside = {shard: set(file.keys()) for shard, file in files.items()}
        if absent := [name for name, shard in places.items() if name not in inside[shard]]:
            raise Mistake(f"{index} looks for {_some(absent)} in files that lack it: get it again")


def check_names(path: Path, wanted: Iterable[str], found: Iterable[str], what: str) -> None:
    """Raises `Mistake` unless these are the same names."""
    wanted, found = set(wanted), set(found)
    lacks, more = sorted(wanted - found), sorted(found - wanted)
    told = [f"lacks {_some(lacks)}"] * bool(lacks) + [f"has unknown {_some(more)}"] * bool(more)
    if told:
        raise Mistake(f"{path} {' and '.join(told)}: it does not hold {what}")


def write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """A file of one piece, whole as soon as it has its name."""
    aside = path.with_name(path.name + ".part")
    save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, aside, dict(metadata)
    )
    aside.replace(path)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise Mistake(
            f"{path} is no safetensors file ({error}): it is cut off, or of another format"
        ) from None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
