"""Sentiment from the state of a language model that was trained on nothing but text.

    python -m models.sentiment --help
    python -m models.sentiment --data FOLDER_WITH_REVIEW_FILES --write_reviews reviews.txt
    python -m models.lstm --data reviews.txt --out MODEL
    python -m models.sentiment --checkpoint MODEL --data FOLDER_WITH_SST custrev.all.gz

After Radford, Jozefowicz and Sutskever (2017): a model of bytes reads a text, and a logistic
regression with an L1 penalty tells its label from the state after the last byte, or from the mean
of all states. Beside it: the same with a model that was never trained, and with another one
(`--dense`), each model's single most predictive unit, a regression on byte trigrams, and the more
frequent label. All choices are made on other texts than those that are counted.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models import _cli as cli
from models import _encode as states
from models import _probe as probes
from models import _recurrent as recurrent
from models import _reviews as reviews
from models._cli import Mistake, option
from models._probe import Kind, Round, Told, Unit
from models._recurrent import LanguageModel
from models._reviews import Labelled
from models._runs import whereabouts
from models._sentiment_report import Cell, report
from models._train import Progress, output_folder

ABOUT = "Tells sentiment from the state of a language model of bytes."
OUT = Path(__file__).parent.parent / "out"
UNTRAINED = 10_000  # more than --seed: a seed that nobody trained a model with
SHOWN = 240  # bytes of the longest review that is drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a run depends on. Every field is a flag."""

    checkpoint: Path | None = option(None, "folder of a model that `models.lstm` trained")  # noqa: RUF009
    dense: Path | None = option(None, "folder of another model, to compare with")  # noqa: RUF009
    data: tuple[Path, ...] = option(
        (), "files or folders: `label,sentence` .csv, or `label text` lines (plain, .gz, .xz)"
    )
    out: Path = option(OUT, "folder for pictures and numbers")  # noqa: RUF009
    write_reviews: Path | None = option(  # noqa: RUF009
        None, "only write the text of the .review files in --data to this file, to train on"
    )
    states: tuple[str, ...] = option(
        states.KINDS,
        "after the last byte, mean over all bytes; pictures: first",
        choices=states.KINDS,
    )
    review: str = option("", "a text to draw byte by byte; default: two of the first set")
    folds: int = option(10, "of the cross-validation where files have no split", least=2)
    penalties: tuple[float, ...] = option(probes.STATE.penalties, "of the state, L1", above=0)
    trigram_penalties: tuple[float, ...] = option(
        probes.TRIGRAMS.penalties, "of byte trigrams, L2", above=0
    )
    batch: int = option(64, "texts that are read side by side", least=1)
    chunk: int = option(32, "bytes that are read at a time", least=1)
    seed: int = option(
        0, "of the folds and of the untrained model", least=0, most=2**31 - 1 - UNTRAINED
    )


def untrained(model: LanguageModel, seed: int) -> LanguageModel:
    """A model of the same shape with other patterns and fresh weights."""
    fresh = recurrent.make(model.size, UNTRAINED + seed)
    fresh.eval()
    return fresh


def read(
    config: Config, name: str, model: LanguageModel, sets: Sequence[Labelled]
) -> tuple[dict[str, list[np.ndarray]], float]:
    """(features of each set, of each kind; bytes read per second, with compilation)."""
    framed = [states.frame(text) for one in sets for text in one.texts]
    total, done = sum(map(len, framed)), 0
    began = time.perf_counter()
    with Progress(total, tokens=1, unit="bytes", doing="reading") as progress:

        def update(count: int) -> None:
            nonlocal done
            done += count
            progress.update(done, name)

        sizes = {"batch": config.batch, "chunk": config.chunk}
        found = states.encode(model, framed, config.states, **sizes, update=update)
    speed = total / (time.perf_counter() - began)
    ends = np.cumsum([len(one.texts) for one in sets])[:-1]
    return {kind: np.split(features, ends) for kind, features in found.items()}, speed


def regress(
    kind: Kind,
    name: str,
    features: Sequence[np.ndarray],
    sets: Sequence[Labelled],
    rounds: Sequence[list[Round]],
) -> dict[str, Cell]:
    """What a regression tells of each set."""
    cells, done = {}, 0
    total = sum(len(one.refit) for its in rounds for one in its)
    with Progress(total, tokens=1, unit="texts", doing="fitting") as progress:
        for x, one, its_rounds in zip(features, sets, rounds, strict=True):
            told: list[Told] = []
            for chosen in its_rounds:
                told.append(probes.probe(kind, x, one.labels, chosen))
                done += len(chosen.refit)
                progress.update(done, f"{name}, {one.name}: {100 * told[-1].accuracy:.1f}%")
            found = {"penalties": [t.penalty for t in told], "weights": [t.weights for t in told]}
            cells[one.name] = cell(its_rounds, [t.accuracy for t in told], found)
    return cells


def alone(
    features: Sequence[np.ndarray], sets: Sequence[Labelled], rounds: Sequence[list[Round]]
) -> dict[str, Cell]:
    """What the most predictive unit tells of each set."""
    cells = {}
    for x, one, its_rounds in zip(features, sets, rounds, strict=True):
        shares, units = zip(*(probes.one_unit(x, one.labels, r) for r in its_rounds), strict=True)
        cells[one.name] = cell(its_rounds, shares, {"units": [unit._asdict() for unit in units]})
    return cells


def cell(rounds: Sequence[Round], shares: Sequence[float], details: Mapping[str, Any]) -> Cell:
    """All rounds as one number: every text counts once."""
    return Cell.of(shares, [len(one.test) for one in rounds], details)


class Measured(NamedTuple):
    """What came of one model: rows of the table, facts about it, and for each set its usual unit
    of the first kind of state, with the values of that for each text."""

    rows: dict[str, dict[str, Cell]]
    about: dict[str, Any]
    units: list[tuple[Unit, np.ndarray]]


def measure(
    config: Config,
    name: str,
    model: LanguageModel,
    sets: Sequence[Labelled],
    rounds: Sequence[list[Round]],
) -> Measured:
    """All that is told from the state of a model. Its features are in memory meanwhile, those of
    other models are not."""
    found, speed = read(config, name, model, sets)
    l1 = dataclasses.replace(probes.STATE, penalties=config.penalties)
    rows, drawn = {}, []
    for kind, features in found.items():
        title = f"{name}, {kind} state"
        rows[title] = regress(l1, title, features, sets, rounds)
        rows[f"{title}, one unit"] = units = alone(features, sets, rounds)
        if not drawn:
            usual = [usual_unit(units[one.name].details["units"]) for one in sets]
            values = [x[:, unit.unit].copy() for x, unit in zip(features, usual, strict=True)]
            drawn = list(zip(usual, values, strict=True))
    about = {
        "parameters": recurrent.parameters(model.size),
        "size": model.size._asdict(),
        "bytes read per second, with compilation": speed,
    }
    return Measured(rows, about, drawn)


def usual_unit(units: Sequence[Mapping[str, Any]]) -> Unit:
    """The unit that most rounds chose, with the median of their thresholds."""
    names = [(unit["unit"], unit["up"]) for unit in units]
    name = max(names, key=names.count)  # the first of equally frequent ones
    thresholds = [unit["threshold"] for unit, n in zip(units, names, strict=True) if n == name]
    return Unit(name[0], float(np.median(thresholds)), name[1])


def shown(config: Config, one: Labelled, chosen: Round) -> list[str]:
    """The texts to draw: that of --review, or of each label the longest of the test that fits."""
    if config.review.strip():
        return [config.review]
    fits = [i for i in chosen.test if 0 < len(one.texts[i].strip().encode()) <= SHOWN]
    found = []
    for label in (0, 1):
        of_label = [one.texts[i] for i in fits if one.labels[i] == label]
        found += [max(of_label, key=len)] if of_label else []
    return found


def main(argv: list[str] | None = None) -> int:
    """Reads, fits and reports; the exit code."""
    config = cli.parse(Config, argv, command="python -m models.sentiment", about=ABOUT)
    if config.write_reviews is not None:
        count, size = reviews.write_reviews(config.data, config.write_reviews)
        print(f"{count:,} reviews, {size / 1e6:.2f} MB, are in {config.write_reviews}")
        return 0
    for flag, given, what in (
        ("checkpoint", config.checkpoint, "the folder of a model that `models.lstm` trained"),
        ("data", config.data, "files of labelled texts, such as SST's .csv files or CR's lines"),
    ):
        if not given:
            raise Mistake(f"--{flag} is missing: give {what}; none comes with this recipe")
    output_folder(config.out)
    sets = reviews.load(config.data)
    rounds = [probes.rounds(one.labels, one.parts, config.folds, config.seed) for one in sets]
    assert config.checkpoint is not None
    trained = recurrent.load(config.checkpoint)
    models = {"trained": trained, "untrained": untrained(trained, config.seed)}
    if config.dense is not None:
        models["dense"] = recurrent.load(config.dense)

    found = {name: measure(config, name, model, sets, rounds) for name, model in models.items()}
    rows = {name: cells for one in found.values() for name, cells in one.rows.items()}
    l2 = dataclasses.replace(probes.TRIGRAMS, penalties=config.trigram_penalties)
    framed = [probes.as_characters(map(states.frame, one.texts)) for one in sets]
    rows["byte trigrams"] = regress(l2, "byte trigrams", framed, sets, rounds)
    rows["more frequent label"] = {
        one.name: cell(its, [probes.majority(one.labels, r) for r in its], {})
        for one, its in zip(sets, rounds, strict=True)
    }
    units = found["trained"].units
    traces = [
        (line, states.trace(trained, states.frame(line), units[0][0].unit, chunk=config.chunk))
        for line in shown(config, sets[0], rounds[0][0])
    ]
    about = {name: one.about for name, one in found.items()}
    flags = {field.name: str(getattr(config, field.name)) for field in dataclasses.fields(config)}
    where = whereabouts(cli.shell_command("models.sentiment", config))
    where["scikit-learn"] = version("scikit-learn")
    report(
        config.out,
        sets,
        rounds,
        rows,
        about={"models": about, "flags": flags, "where": where},
        grids={"state": config.penalties, "byte trigrams": config.trigram_penalties},
        units=units,
        kind=config.states[0],
        traces=traces,
    )
    return 0


if __name__ == "__main__":
    cli.run_main(main)
