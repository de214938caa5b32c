"""Finding, reading, splitting and cutting text."""

import gzip
import lzma
import random

import numpy as np
import pytest

from models import _text as texts
from models._cli import Mistake
from tests.models.stories import one_line


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.txt").write_bytes(content)
    return folder


def many(count=60, size=500):
    """`count` files of random letters, no two of them equal."""
    draw = random.Random(0)
    return {f"f{i}": bytes(draw.choices(b"abcdefgh \n", k=size)) for i in range(count)}


def test_plain_and_packed_files_are_the_same_text(tmp_path):
    words = b"it was the best of times " * 40
    (tmp_path / "a.txt").write_bytes(words)
    with gzip.open(tmp_path / "b.gz", "wb") as file:
        file.write(words + b"1")
    with lzma.open(tmp_path / "c.xz", "wb") as file:
        file.write(words + b"2")
    assert sorted(texts.read([tmp_path])) == [words, words + b"1", words + b"2"]


def test_duplicates_count_once(tmp_path):
    write(tmp_path, a=b"same", b=b"same", c=b"other")
    assert sorted(texts.read([tmp_path, tmp_path / "a.txt"])) == [b"other", b"same"]


def test_folders_are_read_in_depth_without_what_is_hidden(tmp_path):
    deep = tmp_path / "x" / "y"
    deep.mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    write(deep, a=b"seen")
    write(tmp_path / ".git", b=b"hidden")
    (tmp_path / ".c.txt").write_bytes(b"hidden too")
    assert texts.read([tmp_path]) == [b"seen"]


def test_names_do_not_decide_what_is_held_out(tmp_path):
    files = many()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    write(tmp_path / "one", **files)
    write(tmp_path / "two", **{f"z{i}": text for i, text in enumerate(reversed(files.values()))})
    one, two = (texts.load([tmp_path / name], 10) for name in ("one", "two"))
    np.testing.assert_array_equal(one.train, two.train)
    np.testing.assert_array_equal(one.heldout, two.heldout)
    assert one.digest == two.digest


def test_whole_files_are_held_out():
    files = list(many().values())
    train, heldout, how = texts.split(files)
    parts = [set(part.tobytes().split(b"\n")) for part in (train, heldout)]
    assert how.startswith("whole files")
    assert len(train) + len(heldout) == sum(map(len, files)) + len(files) - 2
    for file in files:  # on one side, all of it
        lines = {line for line in file.split(b"\n") if len(line) > 5}
        assert (lines <= parts[0]) != (lines <= parts[1])


def test_a_tenth_is_held_out():
    train, heldout, how = texts.split([f"{i:05}".encode() for i in range(5000)])
    assert how.startswith("whole files")
    assert 0.09 < len(heldout) / (len(train) + len(heldout)) < 0.11


def test_one_file_is_cut():
    train, heldout, how = texts.split([bytes(range(200))])
    np.testing.assert_array_equal(np.concatenate([train, heldout]), np.arange(200))
    assert len(heldout) == 20
    assert "too few files" in how


def test_the_digest_sees_where_the_text_is_cut():
    part = np.frombuffer(b"abcdef", np.uint8)
    assert texts.Text(part[:2], part[2:], "").digest != texts.Text(part[:3], part[3:], "").digest


def test_the_standard_library_is_source_without_tests():
    paths = texts.standard_library()
    assert len(paths) > 100
    parts = {part for path in paths for part in path.parts}
    assert "argparse.py" in parts
    assert not parts & {"encodings", "pydoc_data", "test", "tests", "site-packages"}


def test_a_batch_is_a_function_of_seed_and_step():
    data = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    sizes = {"size": 3, "length": 20}
    first = texts.batch(data, 5, seed=1, **sizes)
    assert first.shape == (3, 21)
    assert first.dtype == np.int32
    np.testing.assert_array_equal(first, texts.batch(data, 5, seed=1, **sizes))
    assert (first != texts.batch(data, 6, seed=1, **sizes)).any()
    assert (first != texts.batch(data, 5, seed=2, **sizes)).any()
    for row in first:
        assert row.astype(np.uint8).tobytes() in data.tobytes()


def test_batches_reach_the_first_and_the_last_byte():
    data = np.arange(11, dtype=np.uint8)
    rows = np.concatenate([texts.batch(data, s, seed=0, size=8, length=8) for s in range(20)])
    assert {row[0] for row in rows.tolist()} == {0, 1, 2}
    assert texts.batch(data, 0, seed=0, size=2, length=10).tolist() == [list(range(11))] * 2


def test_windows_spread_over_everything():
    data = np.arange(101, dtype=np.uint8)
    found = texts.spread(data, 5, 20)
    assert found[:, 0].tolist() == [0, 20, 40, 60, 80]
    assert found[-1, -1] == 100
    assert texts.spread(data, 1000, 99)[:, 0].tolist() == [0, 1]


def test_baselines_on_known_text():
    halves = np.frombuffer(b"ab" * 5000, np.uint8)
    assert abs(texts.unigram_bits(halves, halves) - 1) < 0.05
    noise = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8)
    assert abs(texts.unigram_bits(noise, noise) - 8) < 0.05
    assert 8 < texts.lzma_bits(noise) < 8.2  # random bytes cannot be packed
    assert texts.lzma_bits(halves) < 0.2
    unseen = texts.unigram_bits(halves, np.frombuffer(b"z" * 9, np.uint8))
    assert 10 < unseen < 20  # dear, not infinite


BAD_FILES = [
    ("missing", None, r"missing does not exist: check the path given with --data$"),
    ("empty", b"", r"empty is empty: name a file with text in it$"),
    ("empty.gz", gzip.compress(b""), r"empty.gz is empty: name a file"),
    ("bad.gz", b"no gzip at all", r"bad.gz cannot be unpacked \(Not a gzipped file .*corrupt"),
    (
        "cut.gz",
        gzip.compress(bytes(1000))[:-9],
        r"cut.gz cannot be unpacked \(Compressed file ",
    ),
    ("bent.gz", gzip.compress(b"abc")[:-8] + bytes(8), r"bent.gz cannot be .*CRC check failed"),
    ("bits.gz", gzip.compress(b"")[:10] + b"\xff" * 30, r"bits.gz cannot be unpacked \(Error -3 "),
    ("bad.xz", b"no xz at all", r"bad.xz cannot be unpacked \(Input format not supported"),
    (
        "short",
        b"0123456789" * 6,
        r"short: 6 bytes of held-out text are fewer than one window of ",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[b[0] for b in BAD_FILES])
def test_a_bad_file_is_one_line_that_says_what_to_do(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with one_line(message):
        texts.load([path], 10)


def test_a_folder_without_text(tmp_path):
    with pytest.raises(Mistake, match=r"^no text in .*: name a file or folder that has some$"):
        texts.load([tmp_path], 10)


def test_too_much_text(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MOST_BYTES", 100)
    write(tmp_path, **many(3))
    with pytest.raises(Mistake, match="the text is longer than 100 bytes: name fewer files"):
        texts.load([tmp_path], 10)


def test_no_standard_library(tmp_path, monkeypatch):
    monkeypatch.setattr(texts.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(Mistake, match=r"no source of the standard library in .*--data PATH"):
        texts.load([], 10)
