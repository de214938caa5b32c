"""How a pruned model is fine-tuned, measured and kept: on the disk as soon as it is known."""

import hashlib
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import _decoders
from models import _text as texts
from models._decoders import Decoder
from models._language import heldout_bits
from models._prune_report import CRITERIA, title
from models._runs import Runs
from models._steps import adam, mean_bits, train_step
from models._train import Checkpoints, CtrlC, Progress, Stopped, finite, parameter_count

WARMUP = 0.1  # share of the steps in which the rate rises


class Row(NamedTuple):
    """What is known of one model. Losses are bits per byte, or nats per token."""

    method: str
    density: float
    stored: float  # the share of weights in the pruned layers
    parameters: int
    loss: float
    tuned: float | None  # the loss after fine-tuning


@nnx.jit
def gradient(model: Any, data: jax.Array) -> nnx.State:
    return nnx.grad(mean_bits)(model, data)


def fit(
    config: Any,
    model: Any,
    text: texts.Text,
    saved: Checkpoints,
    stop: CtrlC,
    *,
    rate: float,
    steps: int,
    first: int,
    name: str,
) -> None:
    """Trains a model in place, on the batches from number `first` on. Raises `Stopped` after
    Ctrl-C; with `--resume` it goes on from what was saved then."""
    optimizer = nnx.Optimizer(model, adam(rate, WARMUP, steps, config.weight_decay), wrt=nnx.Param)
    both, start = {"model": model, "optimizer": optimizer}, 0
    if config.resume and saved.step() is not None:
        start, found, _ = saved.restore({part: nnx.state(of) for part, of in both.items()})
        for part, of in both.items():
            nnx.update(of, found[part])
        print(f"{name}: going on from step {start}.")
    sizes = {"seed": config.seed, "size": config.batch, "length": config.length}
    tokens = config.batch * config.length
    with Progress(steps, start=start, tokens=tokens, doing=name) as progress:
        for step in range(start, steps):
            data, done = jnp.asarray(texts.batch(text.train, first + step, **sizes)), step + 1
            loss = finite(name, train_step(model, optimizer, data))
            progress.update(done, f"{loss:.2f} bits")
            if stop.asked or done % config.checkpoint_every == 0 or done == steps:
                saved.save(done, {part: nnx.state(of) for part, of in both.items()}, None)
            if stop.asked:
                break
    saved.close()
    if stop.asked:
        raise Stopped


def digest(model: Any) -> str:
    """Equal for equal parameters: results are those of this model."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:16]


class Bench(NamedTuple):
    """What every model is measured with."""

    config: Any
    text: texts.Text
    unit: str  # "byte" or "token"
    decoder: Decoder  # the model that is pruned
    runs: Runs
    where: Mapping[str, Any]
    about: Mapping[str, Any]  # what results depend on, beside the method and the density
    stop: CtrlC

    def loss(self, model: Any) -> float:
        """On held-out text: bits per byte, or nats per token."""
        c = self.config
        # windows at a time: logits over many tokens take more memory than anything else
        size = 4 * c.batch if self.unit == "byte" else c.batch
        sizes = {"count": c.heldout, "length": c.length, "size": size}
        found = heldout_bits(model, self.text.heldout, **sizes)
        return found if self.unit == "byte" else found * math.log(2)

    def gradients(self, model: Any) -> Iterator[nnx.State]:
        """Of the loss of a few batches of training text, one by one."""
        c = self.config
        for i in range(c.score_batches):
            sizes = {"seed": c.seed, "size": c.batch, "length": c.length}
            data = jnp.asarray(texts.batch(self.text.train, self.decoder.batches + i, **sizes))
            yield gradient(model, data)

    def path(self, name: str) -> Path:
        """Where a pruned model is kept."""
        return self.config.out / f"prune-{name.replace(' ', '-')}.safetensors"

    def row(self, method: str, density: float, stored: float, model: Any) -> tuple[Row, Any]:
        """The losses of a model, and the model, which is fine-tuned in place; those of an earlier
        run, if it knew them. Raises `Stopped` after Ctrl-C."""
        if self.stop.asked:
            raise Stopped
        c, name = self.config, title(method, density)
        settings = {"method": method, "density": density, **self.about}
        known, path = self.runs.get(settings), self.path(name)
        keep = c.save and method in CRITERIA
        if known is not None and (path.exists() or not keep):
            print(f"{name}: in {self.runs.path} already")
            return Row(method, density, **known), _decoders.load(path).model if keep else model
        before, tuned = self.loss(model), None
        saved = Checkpoints(c.out / path.stem.replace("prune", "prune-checkpoint", 1), settings)
        if c.steps:
            how = {"rate": c.learning_rate, "steps": c.steps, "first": self.decoder.batches}
            fit(c, model, self.text, saved, self.stop, **how, name=f"fine-tuning {name}")
            tuned = self.loss(model)
        row = Row(method, density, stored, parameter_count(model), before, tuned)
        if keep:
            _decoders.save(path, self._tuned(model))
        facts = row._asdict()
        self.runs.add(settings, {key: facts[key] for key in Row._fields[2:]}, self.where)
        shutil.rmtree(saved.folder, ignore_errors=True)  # there is nothing to go on with
        return row, model

    def _tuned(self, model: Any) -> Decoder:
        decoder, c = self.decoder._replace(model=model), self.config
        if not c.steps:
            return decoder
        batches = decoder.batches + c.steps
        return decoder._replace(batches=batches, trained_on=self.text.digest)
