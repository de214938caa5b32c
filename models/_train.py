"""What every training loop needs: Ctrl-C between steps, checkpoints, and a progress bar."""

import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
import rich.progress as bars
from flax import nnx
from rich.console import Console

from bsjax import BlockPattern
from models._cli import Mistake

NO_TERMINAL = 110  # columns, where there is no window to ask
PLAIN_EVERY = 10.0  # seconds between lines, where a bar cannot be redrawn


def console() -> Console:
    """Where a recipe prints."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=NO_TERMINAL)


class CtrlC:
    """`with CtrlC() as stop:` the first Ctrl-C makes `stop.asked` true, the second one interrupts.

    A step that is under way always ends, so that what is saved is a whole step.
    """

    asked = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # no print: a signal may arrive in the middle of one
        os.write(2, b"\nstopping after this step (Ctrl-C again: at once, without a checkpoint)\n")


class Stopped(Exception):
    """Ctrl-C ended a run, whose result is missing."""


class Progress:
    """A bar with a note, tokens per second and the time left; where it cannot be redrawn, lines."""

    def __init__(
        self,
        steps: int,
        *,
        start: int = 0,
        tokens: int,
        unit: str = "tokens",
        doing: str = "training",
    ) -> None:
        self.out, self.steps, self.tokens, self.unit = console(), steps, tokens, unit
        self.doing = doing
        plain = not self.out.is_terminal
        columns = [
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[note]}"),
        ]
        self.bar = bars.Progress(*columns, console=self.out, disable=plain)
        self.task = self.bar.add_task(doing, total=steps, completed=start, note="compiling")

    def __enter__(self) -> Self:
        self.bar.start()
        self.first: tuple[int, float] | None = None
        self.printed = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def update(self, step: int, note: str) -> None:
        """`step` steps are done. The first of this run compiles, so time counts from its end."""
        now = time.monotonic()
        self.first = self.first or (step, now)
        done, seconds = step - self.first[0], now - self.first[1]
        if done:
            speed, left = done * self.tokens / seconds, (self.steps - step) * seconds / done
            note += f", {speed:,.0f} {self.unit}/s, {int(left) // 60}:{int(left) % 60:02d} left"
        self.bar.update(self.task, completed=step, note=note)
        due = not done or step == self.steps or now - self.printed >= PLAIN_EVERY
        if due and not self.out.is_terminal:
            self.printed = now
            print(f"{self.doing} {step}/{self.steps} {note}", flush=True)


class Checkpoints:
    """The last state of a run, in `folder`.

    What is saved are the array leaves of pytrees, by name. Beside them: `about`, named values that
    must be the same for the run to go on; the grid and the block of every `BlockPattern`, which are
    no leaves; and `log`, anything that fits in JSON. Each checkpoint is written aside and renamed.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder.absolute()
        # as JSON gives it back
        self.about = {k: list(v) if isinstance(v, tuple) else v for k, v in about.items()}
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells every step of its work
        self._manager: ocp.CheckpointManager | None = None
        self._ours = False  # what lies in the folder belongs to this run

    def step(self) -> int | None:
        """The step of the last checkpoint."""
        if not self.folder.is_dir():
            return None
        return self._open().latest_step()

    def save(self, step: int, tree: Any, log: Any) -> None:
        """Saves in the background. The arrays of `tree` may be changed or donated at once."""
        if not self._ours:  # only now is there something better than what another run left
            self.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            self._ours = True
        arrays = _arrays(tree)
        record = {**_static(tree, arrays), "about": self.about, "log": log}
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays),  # pyright: ignore[reportCallIssue]
            record=ocp.args.JsonSave(record),  # pyright: ignore[reportCallIssue]
        )
        self._open().save(step, args=args, force=True)

    def restore(self, tree: Any) -> tuple[int, Any, Any]:
        """(step, `tree` with the arrays that were saved, log). Refuses what does not fit `tree`."""
        step = self.step()
        if step is None:
            raise Mistake(f"no checkpoint in {self.folder}: start without --resume")
        where, manager = f"the checkpoint {self.folder / str(step)}", self._open()
        try:
            record = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
            record = record["record"]
            for name, what in record["about"].items():
                _refuse(where, name, what, self.about.get(name))
            now = _arrays(tree)
            for what, wanted in _static(tree, now).items():
                for name in {**record[what], **wanted}:
                    _refuse(where, f"{what} {name}", record[what].get(name), wanted.get(name))
            args = ocp.args.StandardRestore(now)  # pyright: ignore[reportCallIssue]
            arrays = manager.restore(step, args=ocp.args.Composite(arrays=args))["arrays"]
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise Mistake(
                f"{where} cannot be read ({type(error).__name__}): it was damaged or made by "
                "something else; start without --resume, or with another --out"
            ) from error
        self._ours = True
        return step, _filled(tree, arrays), record["log"]

    def close(self) -> None:
        """Waits until everything is on the disk."""
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.close()
            self._manager = None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager


def finite(name: str, loss: Any) -> float:
    """The loss as a number. Raises `Mistake` if it is none."""
    if not np.isfinite(loss):
        raise Mistake(f"the {name} model diverged, its loss is {loss}: lower --learning_rate")
    return float(loss)


def is_matrix(path: Any) -> bool:
    """Whether a parameter is neither a bias nor a gain. By name: stacked ones have more axes."""
    names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    return not {"bias", "scale"} & set(names)


def parameter_count(model: Any) -> int:
    """How many numbers are trained, of an abstract model too: embeddings, gains and biases are
    among them."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def output_folder(path: Path) -> Path:
    """`path`, made if need be. Raises `Mistake` if nothing can be written there."""
    probe = path / ".writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise Mistake(
            f"cannot write to {path} ({error.strerror}): name another folder with --out"
        ) from None
    return path


def _refuse(where: str, name: str, was: Any, now: Any) -> None:
    if was != now:
        raise Mistake(
            f"{where} has {name} {was}, this run {now}: give what it was made with, or start anew "
            "without --resume"
        )


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    # copies: on a CPU NumPy would look into memory that the next step is free to overwrite
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): np.array(_raw(leaf)) for path, leaf in named}


def _static(tree: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """What orbax does not compare: for it, leaves that fit are enough."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, BlockPattern))
    patterns = {_name(path): p for path, p in found if isinstance(p, BlockPattern)}
    return {
        "pattern (grid, block)": {n: [list(p.grid), list(p.block)] for n, p in patterns.items()},
        "array (shape, type)": {n: [list(a.shape), str(a.dtype)] for n, a in arrays.items()},
    }


def _filled(tree: Any, arrays: Mapping[str, Any]) -> Any:
    def leaf(path: Any, like: Any) -> Any:
        array = jax.numpy.asarray(arrays[_name(path)])
        return jax.random.wrap_key_data(array) if _is_key(like) else array

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf
