"""Regressions and single units: what they find, and that no choice looks at the test."""

import numpy as np
import pytest

from models import _probe as probes
from models._cli import Mistake
from models._probe import Kind, Round, Unit

RNG = np.random.default_rng(0)
N, K, PLANTED = 240, 7, 4
LABELS = RNG.permutation(np.arange(N, dtype=np.int32) % 2)
FEATURES = RNG.normal(size=(N, K)).astype(np.float32)
FEATURES[:, PLANTED] = 0.5 - 0.2 * LABELS + 0.08 * RNG.normal(size=N)  # small, and lower for 1
SPLIT = {"train": np.arange(120), "dev": np.arange(120, 160), "test": np.arange(160, N)}
FEW = (0.3, 0.1, 0.03, 0.01, 0.003)
L1 = Kind(probes.STATE.prepare, True, FEW)
WORDS = np.array(
    ["it is " + ("good" if y else "poor") + " really" * int(i % 3) for i, y in enumerate(LABELS)],
    object,
)


def swapped(one):
    """LABELS with those of the test turned round."""
    labels = LABELS.copy()
    labels[one.test] = 1 - labels[one.test]
    return labels


@pytest.mark.parametrize("parts", [SPLIT, {}], ids=["split", "folds"])
def test_rounds_keep_their_parts_apart(parts):
    found = probes.rounds(LABELS, parts, 5, seed=0)
    assert len(found) == (1 if parts else 5)
    for one in found:
        known = np.union1d(one.fit, one.choose)
        assert not set(one.fit) & set(one.choose)
        assert not set(one.test) & set(known)
        assert set(one.refit) <= set(known)
    tested = np.concatenate([one.test for one in found])
    expected = SPLIT["test"] if parts else np.arange(N)
    np.testing.assert_array_equal(np.sort(tested), expected)


def test_folds_are_stratified_and_follow_the_seed():
    labels = (np.arange(300) % 10 == 0).astype(np.int32)  # one in ten
    found = probes.rounds(labels, {}, 10, seed=3)
    for one in found:
        assert [labels[part].sum() for part in one] == [24, 3, 27, 3]
    again, other = (probes.rounds(labels, {}, 10, seed=seed) for seed in (3, 4))
    assert all(map(np.array_equal, found[0], again[0]))
    assert not all(map(np.array_equal, found[0], other[0]))


def test_more_folds_than_examples():
    with pytest.raises(Mistake, match="--folds 9 are more than the 3 examples of a label: take"):
        probes.rounds(np.array([0] * 20 + [1] * 3), {}, 9, seed=0)


@pytest.mark.parametrize("parts", [SPLIT, {}], ids=["split", "folds"])
def test_no_choice_looks_at_the_test(parts):
    """With the labels of the test turned round all is chosen alike, and right becomes wrong."""
    for one in probes.rounds(LABELS, parts, 3, seed=0)[:2]:
        other = swapped(one)
        a, b = (probes.probe(L1, FEATURES, y, one) for y in (LABELS, other))
        assert (a.penalty, a.weights) == (b.penalty, b.weights)
        assert a.accuracy == pytest.approx(1 - b.accuracy)
        (share, unit), (other_share, other_unit) = (
            probes.one_unit(FEATURES, y, one) for y in (LABELS, other)
        )
        assert unit == other_unit
        assert share == pytest.approx(1 - other_share)
        frequent = [probes.majority(y, one) for y in (LABELS, other)]
        assert sum(frequent) == pytest.approx(1)


def test_features_of_the_test_change_no_choice():
    """Means and deviations, too, are those of the examples fitted to."""
    one = probes.rounds(LABELS, SPLIT, 3, seed=0)[0]
    other = FEATURES.copy()
    other[one.test] = 100 + 50 * other[one.test]
    a, b = (probes.probe(L1, x, LABELS, one) for x in (FEATURES, other))
    assert (a.penalty, a.weights) == (b.penalty, b.weights)
    assert probes.one_unit(other, LABELS, one)[1] == probes.one_unit(FEATURES, LABELS, one)[1]


def test_the_planted_feature_is_enough():
    """It is the smallest; standardised, L1 takes it first."""
    one = probes.rounds(LABELS, SPLIT, 3, seed=0)[0]
    strong = probes.probe(Kind(L1.prepare, True, (0.1,)), FEATURES, LABELS, one)
    assert (strong.penalty, strong.weights) == (0.1, 1)
    assert strong.accuracy > 0.8
    none = probes.probe(Kind(L1.prepare, True, (1.0,)), FEATURES, LABELS, one)
    assert none.weights == 0


def test_the_penalty_is_that_which_is_right_on_the_other_part():
    """None of 60 features of noise should be used, and the planted one should. Of equally good
    penalties the largest is taken."""
    noise = np.random.default_rng(1).normal(size=(N, 60)).astype(np.float32)
    x = np.concatenate([FEATURES, noise], axis=1)
    kind = Kind(L1.prepare, True, (0.003, 1.0, 0.03, 0.3))
    assert probes.choose(kind, x[:60], LABELS[:60], x[60:], LABELS[60:]) == 0.3
    constant = np.zeros_like(x[:, :1])
    useless = probes.choose(L1, constant[:60], LABELS[:60], constant[60:], LABELS[60:])
    assert useless == FEW[0]


def test_a_penalty_is_per_example():
    """Twice the same examples give the same weights."""
    a = L1.fitted(0.03, FEATURES, LABELS)
    b = L1.fitted(0.03, np.tile(FEATURES, (2, 1)), np.tile(LABELS, 2))
    np.testing.assert_allclose(a.coef_, b.coef_, atol=0.02 * np.abs(a.coef_).max())


def test_the_objective_is_as_documented():
    """No weight, moved a little either way, lowers mean loss + p |w|_1 by more than the solver is
    allowed to leave."""
    penalty = 0.02
    fitted = L1.fitted(penalty, FEATURES, LABELS)
    signs = 2 * LABELS - 1

    def objective(w):
        margins = signs * (FEATURES @ w + fitted.intercept_)
        return np.logaddexp(0, -margins).mean() + penalty * np.abs(w).sum()

    best = objective(fitted.coef_[0])
    for i in range(K):
        for step in (-0.05, 0.05):
            moved = fitted.coef_[0] + step * np.eye(K)[i]
            assert objective(moved) > best - 1e-5


def test_byte_trigrams():
    one = probes.rounds(LABELS, {}, 4, seed=0)[0]
    assert probes.probe(probes.TRIGRAMS, WORDS, LABELS, one).accuracy == 1
    # bytes as they are: no case is folded, no spaces become one
    prepare = probes.TRIGRAMS.prepare().fit(probes.as_characters([b"\n  \xc3\xa0", b"ABC"]))
    found = {bytes(ord(c) - 256 for c in trigram) for trigram in prepare.vocabulary_}
    assert found == {b"\n  ", b"  \xc3", b" \xc3\xa0", b"ABC"}


# ------------------------------------------------------------------------------------ single units


@pytest.mark.parametrize("at_once", [2, 256])
def test_the_planted_unit_is_found(at_once):
    unit = probes.best_unit(FEATURES, LABELS, at_once=at_once)
    assert (unit.unit, unit.up) == (PLANTED, False)
    assert 0.3 < unit.threshold < 0.5
    assert (unit.says(FEATURES) == LABELS).mean() > 0.85


def test_the_best_threshold_by_brute_force():
    rng = np.random.default_rng(2)
    for _ in range(20):
        x = rng.integers(0, 4, (11, 3)).astype(np.float32)  # with many equal values
        y = rng.permutation(np.arange(11) % 2).astype(np.int32)
        units = [Unit(k, cut, up) for k in range(3) for cut in range(3) for up in (True, False)]
        known = [unit for unit in units if 0 < (x[:, unit.unit] > unit.threshold).sum() < 11]
        best = max((unit.says(x) == y).sum() for unit in known)
        assert (probes.best_unit(x, y).says(x) == y).sum() == best


def test_neighbouring_floats_are_told_apart():
    low = np.float32(0.1)
    high = np.nextafter(low, np.float32(1))
    x, y = np.array([[low], [high]] * 3), np.array([0, 1] * 3, np.int32)
    np.testing.assert_array_equal(probes.best_unit(x, y).says(x), y)


def test_a_constant_state():
    with pytest.raises(Mistake, match="no unit of the state differs between texts"):
        probes.best_unit(np.zeros((6, 2), np.float32), np.array([0, 1] * 3))


def test_a_unit_is_chosen_on_all_but_the_test():
    y = np.array([0, 1, 0, 1, 1, 0], np.int32)
    x = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [0, 1], [1, 0]], np.float32)
    one = Round(*map(np.array, ([0, 1], [2, 3], [0, 1], [4, 5])))
    assert probes.one_unit(x, y, one) == (1.0, Unit(1, 0.5, True))
