"""Trains what is asked for, measures it, and keeps what was found."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from models import _parallel_text as texts
from models import _translation as models
from models import _translation_size as sizes
from models._buckets import Batches
from models._cli import Mistake
from models._parallel_text import EOS, Corpus
from models._runs import Runs, binned
from models._train import Checkpoints, CtrlC, Progress, Stopped, finite
from models._translation import Translator
from models._translation_report import bleu
from models._translation_size import Size
from models._translation_train import Run, heldout_loss, translations

EXAMPLES = 8
TRANSLATED = 2048  # tokens of sources translated side by side, beams counted


class Data(NamedTuple):
    """The text of a run in tokens."""

    corpus: Corpus
    tokens: texts.Tokens
    train: Batches
    valid: Batches
    test: Batches
    about: dict[str, Any]  # what else results depend on


class Task(NamedTuple):
    """A run."""

    name: str
    size: Size
    learning_rate: float
    seed: int


class Bench:
    """Trains what is asked for, unless it is known already."""

    def __init__(
        self, config: Any, data: Data, runs: Runs | None, where: Mapping[str, Any]
    ) -> None:
        self.config, self.data, self.runs, self.where = config, data, runs, where

    def settings(self, task: Task) -> dict[str, Any]:
        training = self.config.training(task.learning_rate)._asdict()
        own = {"size": task.size._asdict(), "training": training, "seed": task.seed}
        return own | self.data.about

    def result(self, task: Task, stop: CtrlC) -> dict[str, Any]:
        """Of a run, trained now if need be. Raises `Stopped` after Ctrl-C."""
        settings = self.settings(task)
        assert self.runs is not None
        if (found := self.runs.get(settings)) is None:
            found = self._trained(task, settings, stop)
            self.runs.add(settings, found, dict(self.where))
        else:
            print(f"{task.name}, seed {task.seed}: in {self.runs.path} already")
        return found

    def _trained(self, task: Task, settings: dict[str, Any], stop: CtrlC) -> dict[str, Any]:
        config, train = self.config, self.data.train
        run = Run.start(task.size, config.training(task.learning_rate), task.seed)
        train.reseed(task.seed)
        saved = self._saved(task, settings)
        first, log = 0, {"losses": [], "valid": [], "seconds": 0.0, "processor seconds": 0.0}
        if config.resume and saved.step() is not None:
            first, tree, log = saved.restore(run.tree())
            run.update(tree)
            print(f"{task.name}: going on from step {first}.")
        tokens = int(sum(map(len, train.target)) / len(train))
        clocks = time.perf_counter(), time.process_time()
        spent = log["seconds"], log["processor seconds"]
        with Progress(config.steps, start=first, tokens=tokens) as progress:
            for step in range(first, config.steps):
                log["losses"].append(finite(task.name, run.step(train.batch(step))))
                done = step + 1
                if done % config.measure_every == 0 or done == config.steps:
                    log["valid"].append([done, heldout_loss(run.averaged(), self.data.valid)])
                heldout = f", valid {log['valid'][-1][1]:.3f}" if log["valid"] else ""
                progress.update(done, f"{task.name} {log['losses'][-1]:.2f}{heldout} nats")
                log["seconds"] = spent[0] + time.perf_counter() - clocks[0]
                log["processor seconds"] = spent[1] + time.process_time() - clocks[1]
                if stop.asked or done % config.checkpoint_every == 0 or done == config.steps:
                    saved.save(done, run.tree(), log)
                if stop.asked:
                    saved.close()
                    raise Stopped
        saved.close()
        return self._measured(task, run, log)

    def _measured(self, task: Task, run: Run, log: dict[str, Any]) -> dict[str, Any]:
        config, data = self.config, self.data
        model, references = run.averaged(), data.corpus.test.target
        shapes = data.train.shape_counts(config.steps)
        found: dict[str, Any] = {
            "name": task.name,
            "parameters": sizes.parameters(task.size),
            "FLOPs": sizes.flops(task.size, shapes),
            "valid": log["valid"][-1][1],
            "test": heldout_loss(model, data.test),
            "valid curve": log["valid"],
            "loss curve": binned(log["losses"]),
            "seconds": log["seconds"],
            "processor seconds": log["processor seconds"],
        }
        for how, beam in (("greedy", 0), ("beam", config.beam)):
            written = self._written(model, data.test, beam)
            found[f"BLEU {how}"], found["signature"] = bleu(written, references)
            found["examples"] = written[:EXAMPLES]
        path = config.out / f"translation-{task.name.replace(',', '').replace(' ', '-')}.txt"
        path.write_text("".join(f"{line}\n" for line in written), "utf-8")
        print(f"{task.name}: BLEU {found['BLEU beam']:.2f}, translations in {path}")
        return found

    def translated(self, task: Task, lines: Sequence[str]) -> list[str]:
        """Of lines in the source language, by the model in the checkpoint of a run."""
        run = Run.start(task.size, self.config.training(task.learning_rate), task.seed)
        saved = self._saved(task, self.settings(task))
        if saved.step() is None:
            raise Mistake(
                f"no model in {saved.folder}: give the flags that it was trained with, or train it "
                "first, without --translate"
            )
        run.update(saved.restore(run.tree())[1])
        saved.close()
        source = [[*self.data.tokens.encode(line), EOS] for line in lines]
        size, empty = TRANSLATED // self.config.beam, [[] for _ in source]
        return self._written(
            run.averaged(), Batches(source, empty, size, seed=None), self.config.beam
        )

    def _saved(self, task: Task, settings: dict[str, Any]) -> Checkpoints:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        name = f"translation-checkpoint-{sizes.kind(task.size)}-{key}"
        return Checkpoints(self.config.out / name, settings)

    def _written(self, model: Translator, batches: Batches, beam: int) -> list[str]:
        """Translations of every source, by a beam, or by greedy search if it is 0."""

        def rows(source: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
            return models.translate(model, source, lengths, beam=beam, alpha=self.config.alpha)

        return [self.data.tokens.decode(row) for row in translations(rows, batches)]
