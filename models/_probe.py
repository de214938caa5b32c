"""What can be told from features by logistic regression, or by one of them alone.

What is free (the penalty, the unit, its threshold) is chosen on examples other than those that the
accuracy is measured on: see `Round`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit
from sklearn.preprocessing import StandardScaler

from models._cli import Mistake

_LETTERS = {byte: 0x100 + byte for byte in range(256)}
CHOOSE = 0.1  # the share of the training part that choices are made on, where none is given


class Round(NamedTuple):
    """Indices of examples. A regression is fitted to `fit` with each penalty; that which is right
    most often on `choose` is fitted to `refit` and measured on `test`."""

    fit: np.ndarray
    choose: np.ndarray
    refit: np.ndarray
    test: np.ndarray


def rounds(labels: np.ndarray, parts: Mapping[str, np.ndarray], folds: int, seed: int) -> list:
    """One `Round` if the data has parts (train, dev, train, test), else those of stratified
    cross-validation, in which a stratified tenth of the training part is what is chosen on."""
    if parts:
        return [Round(parts["train"], parts["dev"], parts["train"], parts["test"])]
    if (few := int(np.bincount(labels, minlength=2).min())) < folds:
        raise Mistake(f"--folds {folds} are more than the {few} examples of a label: take fewer")
    found = []
    outer = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for train, test in outer.split(labels, labels):
        size = max(2, round(CHOOSE * len(train)))
        inner = StratifiedShuffleSplit(1, test_size=size, random_state=seed)
        fit, choose = next(inner.split(train, labels[train]))
        found.append(Round(train[fit], train[choose], train, test))
    return found


@dataclasses.dataclass(frozen=True)
class Kind:
    """A regression: what prepares its features, the norm and the grid of its penalty.

    A penalty p is that of `mean loss + p |w|_1` or `mean loss + p |w|_2^2 / 2`: per example, so
    that one grid suits sets of all sizes.
    """

    prepare: Callable[[], Any]
    l1: bool
    penalties: tuple[float, ...]

    def fitted(self, penalty: float, x: Any, y: np.ndarray) -> LogisticRegression:
        """The regression of y on x, which is prepared."""
        # liblinear penalises the intercept like a weight, unless it is of a large constant
        regression = LogisticRegression(
            C=1 / (penalty * len(y)),
            l1_ratio=float(self.l1),
            solver="liblinear",
            intercept_scaling=10,
            tol=1e-3,
            max_iter=1000,
            random_state=0,
        )
        return regression.fit(x, y)


STATE = Kind(StandardScaler, True, (0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005))
TRIGRAMS = Kind(
    # one character for each byte, see `as_characters`
    functools.partial(
        TfidfVectorizer, analyzer="char", ngram_range=(3, 3), lowercase=False, sublinear_tf=True
    ),
    False,
    (1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6),
)


def as_characters(texts: Iterable[bytes]) -> np.ndarray:
    """Texts whose characters stand for the bytes of `texts`: U+0100 and on, of which none is a
    space, since scikit-learn makes one of several."""
    return np.array([text.decode("latin-1").translate(_LETTERS) for text in texts], object)


class Told(NamedTuple):
    """What came of a round: right share of the test, the penalty, weights that are not zero."""

    accuracy: float
    penalty: float
    weights: int


def probe(kind: Kind, x: np.ndarray, y: np.ndarray, one: Round) -> Told:
    """The accuracy on `one.test` of the regression that is right most often on `one.choose`; of
    several, the one with the largest penalty."""
    penalty = choose(kind, x[one.fit], y[one.fit], x[one.choose], y[one.choose])
    prepare = kind.prepare()
    regression = kind.fitted(penalty, prepare.fit_transform(x[one.refit]), y[one.refit])
    accuracy = regression.score(prepare.transform(x[one.test]), y[one.test])
    return Told(float(accuracy), penalty, int(np.count_nonzero(regression.coef_)))


def choose(
    kind: Kind, x: np.ndarray, y: np.ndarray, other_x: np.ndarray, other_y: np.ndarray
) -> float:
    """The penalty with which a regression fitted to (x, y) is right most often on the others."""
    prepare = kind.prepare()
    x, other_x = prepare.fit_transform(x), prepare.transform(other_x)
    penalties = sorted(kind.penalties, reverse=True)
    scores = [kind.fitted(penalty, x, y).score(other_x, other_y) for penalty in penalties]
    return penalties[int(np.argmax(scores))]


class Unit(NamedTuple):
    """One feature that tells labels apart: 1 is said above the threshold, or below if not `up`."""

    unit: int
    threshold: float
    up: bool

    def says(self, x: np.ndarray) -> np.ndarray:
        """Labels of x[n, k], int32 [n]."""
        return ((x[:, self.unit] > self.threshold) == self.up).astype(np.int32)


def best_unit(x: np.ndarray, y: np.ndarray, *, at_once: int = 256) -> Unit:
    """The unit of x[n, k], and its threshold, that is right most often about the labels y[n].

    Every threshold halfway between two neighbouring values is tried; of equally good units the
    first is taken.
    """
    best, found = -1, None
    for first in range(0, x.shape[1], at_once):
        part = x[:, first : first + at_once]
        order = np.argsort(part, axis=0, kind="stable")
        values = np.take_along_axis(part, order, axis=0)
        # right answers of "1 above the i-th smallest value": zeros up to there, ones after it
        signs = 1 - 2 * y[order].astype(np.int64)
        right = np.cumsum(signs, axis=0)[:-1] + int(y.sum())
        cut = values[:-1] < values[1:]  # between equal values no threshold fits
        score = np.where(cut, np.maximum(right, len(y) - right), -1)
        if score.size and score.max() > best:
            unit = int(score.max(axis=0).argmax())
            i = int(score[:, unit].argmax())
            best = score[i, unit]
            middle = float(values[i, unit] / 2 + values[i + 1, unit] / 2)
            middle = middle if values[i, unit] <= middle < values[i + 1, unit] else values[i, unit]
            found = Unit(first + unit, float(middle), bool(2 * right[i, unit] >= len(y)))
    if found is None:
        raise Mistake("no unit of the state differs between texts: the checkpoint has no memory")
    return found


def one_unit(x: np.ndarray, y: np.ndarray, one: Round) -> tuple[float, Unit]:
    """(accuracy on `one.test`, the unit): the best on `one.fit` and `one.choose` together."""
    known = np.union1d(one.fit, one.choose)
    unit = best_unit(x[known], y[known])
    return float((unit.says(x[one.test]) == y[one.test]).mean()), unit


def majority(y: np.ndarray, one: Round) -> float:
    """Accuracy on `one.test` of the label that is most frequent in `one.refit`."""
    dummy = DummyClassifier().fit(one.refit[:, None], y[one.refit])
    return float(dummy.score(one.test[:, None], y[one.test]))
