"""What the runs of `models.translation` say: BLEU, tables, translations and curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU

from bsjax import plot
from models import _report as shared
from models._parallel_text import Corpus
from models._report import pyplot

COMPARABLE = 20.0  # BLEU that every model must have before their order says anything


def bleu(written: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """(corpus BLEU, 0 to 100, with the signature of how it was computed): Papineni et al. 2002, by
    Post 2018, "A Call for Clarity in Reporting BLEU Scores", tokenized as "13a"."""
    metric = BLEU(tokenize="13a")
    score = metric.corpus_score(list(written), [list(references)]).score
    return float(score), str(metric.get_signature())


def report(
    config: Any, corpus: Corpus, found: Mapping[str, Sequence[Mapping[str, Any]]], where: Any
) -> None:
    """Prints the table, the caveats and some translations; saves numbers and curves."""
    shared.print_table("Test set, means over seeds", {n: _row(runs) for n, runs in found.items()})
    runs = [run for all_ in found.values() for run in all_]
    print(f"BLEU: {runs[0]['signature']}")
    worst = min(run["BLEU beam"] for run in runs)
    if len(found) > 1 and worst < COMPARABLE:
        print(
            f"* the lowest BLEU is {worst:.2f}: below {COMPARABLE:.0f} models have not learnt "
            "enough for their order to mean anything; give more --steps"
        )
    print_examples(corpus, {name: runs[0]["examples"] for name, runs in found.items()})
    numbers = {"where": where, "models": {name: list(runs) for name, runs in found.items()}}
    shared.save_json(config.out / "translation.json", numbers)
    save_curves(config.out / "translation-curves.png", found)
    print(f"Numbers and pictures are in {config.out}")


def _row(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def mean(name: str) -> float:
        return float(np.mean([run[name] for run in runs]))

    scores = [run["BLEU beam"] for run in runs]
    spread = f" ({np.std(scores, ddof=1):.2f})" if len(runs) > 1 else ""
    return {
        "width": runs[0]["width"],
        "hidden": runs[0]["hidden"],
        "parameters": runs[0]["parameters"],
        "PFLOPs": f"{mean('FLOPs') / 1e15:.4f}",
        "rate": f"{runs[0]['rate']:g}",
        "nats/token": mean("test"),
        "BLEU greedy": f"{mean('BLEU greedy'):.2f}",
        "BLEU beam": f"{np.mean(scores):.2f}{spread}",
        "processor s": mean("processor seconds"),
    }


def print_examples(corpus: Corpus, written: Mapping[str, Sequence[str]]) -> None:
    """Some translations beside those of the test set."""
    for i, (source, reference) in enumerate(zip(*corpus.test, strict=True)):
        rows = {name: lines[i] for name, lines in written.items() if i < len(lines)}
        if not rows:
            break
        rows = {"source": source, "reference": reference} | rows
        side = max(map(len, rows))
        text = "\n".join(f"  {name:<{side}}  {line}" for name, line in rows.items())
        shared.print_sample(f"Sentence {i + 1}", text)


def save_curves(path: Path, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Validation loss against steps and against FLOPs, of the first seed."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for ax, x in zip(axes, ("step", "FLOPs"), strict=True):
        lines = {}
        for name, runs in found.items():
            steps, losses = zip(*runs[0]["valid curve"], strict=True)
            each = runs[0]["FLOPs"] / steps[-1] if x == "FLOPs" else 1
            lines[name] = ([step * each for step in steps], losses)
        plot.curves(lines, ax, f"Validation loss by {x}", x=x, y="nats per token")
        for line in ax.get_lines():
            line.set_marker("o")
        if len(lines) > 1:
            ax.legend(frameon=False, fontsize=8)
    shared.save_figure(path, figure)
