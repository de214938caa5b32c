"""Parallel text: files, numbers in words, tokens that come back, and batches that lose no pair."""

import gzip
import itertools
import lzma

import numpy as np
import pytest

from models import _parallel_text as texts
from models._buckets import Batches, edges
from models._cli import Mistake
from models._parallel_text import BOS, EOS, PAD, Pairs

LINES = [
    "Zwei junge Männer.", "  two  spaces ", "a\ttab", "", "unseen: \N{SNOWMAN} \N{GRINNING FACE}",
    "separators \N{LINE SEPARATOR} and \x85 stay", "12 345",
]  # fmt: skip


def write(path, lines, opener=open):
    with opener(path, "wb") as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
    return path


@pytest.mark.parametrize(("ending", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_files_are_read_line_by_line(tmp_path, ending, opener):
    paths = [write(tmp_path / f"{side}{ending}", LINES, opener) for side in "ab"]
    assert texts.read("train", paths) == Pairs(LINES, LINES)


def test_what_is_no_pair_of_files(tmp_path):
    two, one = write(tmp_path / "two", ["a", "b"]), write(tmp_path / "one", ["a"])
    with pytest.raises(Mistake, match=r"--train: .*two has 2 lines and .*one has 1: line i of one"):
        texts.read("train", [two, one])
    empty = write(tmp_path / "empty", [])
    with pytest.raises(Mistake, match=r"--test: .*empty is empty: name files with text in them"):
        texts.read("test", [empty, empty])
    latin = tmp_path / "latin"
    latin.write_bytes("Männer\n".encode("latin-1"))
    with pytest.raises(Mistake, match=r"latin is no UTF-8 text \(byte 1\): convert it, for exampl"):
        texts.read("test", [latin, latin])
    with pytest.raises(Mistake, match=r"--valid names 0 files: with files, --train, --valid and"):
        texts.load([two, two], [], [two, two])


def test_numbers_in_words():
    spoken = {
        0: "zero", 13: "thirteen", 20: "twenty", 42: "forty-two", 100: "one hundred",
        115: "one hundred and fifteen", 1000: "one thousand", 1002: "one thousand and two",
        999_999: "nine hundred and ninety-nine thousand nine hundred and ninety-nine",
        30_100: "thirty thousand one hundred",
    }  # fmt: skip
    assert {n: texts.in_words(n) for n in spoken} == spoken


def test_the_synthetic_task_is_the_same_each_time_and_held_out_numbers_are_new():
    one, other = texts.numbers(300, 40), texts.numbers(300, 40)
    assert one == other
    parts = [set(part.source) for part in (one.train, one.valid, one.test)]
    assert [len(part) for part in parts[1:]] == [40, 40]
    assert not any(a & b for a, b in itertools.combinations(parts, 2))
    assert one.train.target == [texts.in_words(int(n)) for n in one.train.source]
    assert one.train.digest != one.valid.digest


# -------------------------------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def words():
    return texts.numbers(200, 20).train


@pytest.mark.parametrize("kind", ["bytes", "unigram", "bpe"])
def test_every_line_comes_back(kind, words, tmp_path):
    path = tmp_path / "tokens.model"
    found = texts.tokens(kind, 330, words, path, resume=False)
    for line in [*LINES, *words.target[:5]]:
        tokens = found.encode(line)
        assert all(EOS < token < found.size for token in tokens)
        assert found.decode(tokens) == line
        assert found.decode([*tokens, EOS, PAD]) == line
    if kind != "bytes":
        assert len(found.encode(words.target[0])) < len(words.target[0])
        assert [len(found.encode(n)) for n in ("7", "12345")] == [2, 6]  # digits stay digits


def test_pieces_are_learnt_the_same_each_time_and_kept(words, tmp_path):
    path = tmp_path / "tokens.model"
    first = texts.tokens("bpe", 330, words, path, resume=False)
    assert texts.pieces("bpe", 330, [*words.source, *words.target]) == path.read_bytes()
    other = Pairs(["something else"] * 9, ["entirely"] * 9)
    assert texts.tokens("bpe", 330, other, path, resume=True).digest == first.digest
    path.write_bytes(b"nonsense")
    with pytest.raises(Mistake, match=r"is no model of sentencepiece: start without --resume"):
        texts.tokens("bpe", 330, words, path, resume=True)


def test_sentences_to_train_on_that_are_left_out():
    pairs = Pairs(["abc", "", "abcdef", "a"], ["x", "y", "z", "uvwxyz"])
    source, target, out = texts.encoded(pairs, texts.Bytes(), 5)
    assert out == 3
    assert [texts.Bytes().decode(one) for one in (*source, *target)] == ["abc", "x"]
    assert source[0][-1] == EOS
    source, target, out = texts.encoded(pairs, texts.Bytes())
    assert (len(source), len(target), out) == (4, 4, 0)


# ------------------------------------------------------------------------------------- batches


def sentences(count=57, seed=0):
    rng = np.random.default_rng(seed)
    return [
        [[EOS + 1 + i, *rng.integers(3, 9, n)] for i, n in enumerate(rng.geometric(0.1, count))]
        for _ in range(2)
    ]


def of(batch, row):
    source = batch.source[row, : batch.lengths[row]].tolist()
    target = batch.target[row]
    target = target[target != PAD].tolist()
    assert (batch.source[row, batch.lengths[row] :] == PAD).all()
    assert (target[0], target[-1]) == (BOS, EOS)
    return source, target[1:-1]


@pytest.mark.parametrize("buckets", [1, 3, 100])
def test_an_epoch_has_every_pair_once(buckets):
    source, target = sentences()
    batches = Batches(source, target, 200, buckets, multiple=2, seed=1)
    for epoch in range(2):
        steps = range(epoch * len(batches), (epoch + 1) * len(batches))
        rows = []
        for batch in map(batches.batch, steps):
            (n, s), t = batch.source.shape, batch.target.shape[1] - 1
            assert (n, s, t) in batches.shapes
            assert n % 2 == s % 4 == 0
            assert n == 2 or n * max(s, t) <= 200
            rows += [of(batch, row) for row in np.flatnonzero(batch.lengths)]
            assert (batch.target[batch.lengths == 0] == PAD).all()
        assert sorted(rows) == sorted(zip(source, target, strict=True))
    assert len(batches.shapes) <= buckets
    counts = batches.shape_counts()
    assert sum(counts.values()) == len(batches)
    assert batches.shape_counts(2 * len(batches)) == {s: 2 * n for s, n in counts.items()}


def test_batches_follow_from_the_seed_and_the_step_alone():
    one, other = (Batches(*sentences(), 200, 3, seed=1) for _ in range(2))
    last = 2 * len(one) - 1
    assert all(map(np.array_equal, one.batch(last), other.batch(last)))  # the other skipped epochs
    first = [one.batch(i).source.tolist() for i in range(len(one))]
    second = [one.batch(len(one) + i).source.tolist() for i in range(len(one))]
    assert first != second
    one.reseed(2)
    assert [one.batch(i).source.tolist() for i in range(len(one))] != first
    one.reseed(1)
    assert [one.batch(i).source.tolist() for i in range(len(one))] == first


def test_texts_to_translate_are_in_order():
    source, target = sentences()
    batches = Batches(source, target, 200, 3, seed=None)
    for chosen, batch in batches.once():
        assert (np.diff(chosen) > 0).all()
        for row, i in enumerate(chosen):
            assert of(batch, row) == (source[i], target[i])


@pytest.mark.parametrize("buckets", [1, 2, 3, 9])
def test_edges_leave_the_least_padding(buckets):
    longer = np.random.default_rng(0).choice([4, 8, 12, 16, 24, 40], 60)
    sides = np.unique(longer)

    def padded(ends):
        return np.asarray(ends)[np.searchsorted(ends, longer)].sum()

    best = min(
        padded([*chosen, sides[-1]])
        for count in range(buckets)
        for chosen in itertools.combinations(sides[:-1], count)
    )
    found = edges(longer, buckets)
    assert len(found) <= buckets
    assert padded(found) == best
