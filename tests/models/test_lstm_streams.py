"""Every byte of a text is in one part and is predicted once, and the text is never in memory."""

import gzip
import lzma
import tracemalloc

import numpy as np
import pytest

from models import _streams as streams
from models import _text as texts
from models._cli import Mistake
from models._streams import Streams

DRAW = np.random.default_rng(0)


def some_bytes(count):
    return DRAW.integers(0, 256, count, np.uint8).tobytes()


def whole(text):
    return b"".join(part.tobytes() for part in (text.train, text.valid, text.test))


def test_one_plain_file_is_mapped_where_it_lies(tmp_path):
    content, path = some_bytes(1000), tmp_path / "plain.txt"
    path.write_bytes(content)
    text = streams.load([path], tmp_path / "spool", valid=0.1, test=0.2)
    assert whole(text) == content
    assert [len(p) for p in (text.train, text.valid, text.test)] == [700, 100, 200]
    assert all(isinstance(p, np.memmap) for p in (text.train, text.valid, text.test))
    assert not (tmp_path / "spool").exists()
    assert text.about.endswith("to report (the end of the text)")


@pytest.fixture
def folder(tmp_path):
    """Fifty files, some packed, one of them twice."""
    folder = tmp_path / "files"
    folder.mkdir()
    openers = {"": open, ".gz": gzip.open, ".xz": lzma.open}
    contents = [some_bytes(int(size)) for size in DRAW.integers(90, 110, 50)]
    for i, content in enumerate(contents):
        suffix = list(openers)[i % 3]
        with openers[suffix](folder / f"{i}{suffix}", "wb") as file:
            file.write(content)
    (folder / "again").write_bytes(contents[1])
    (folder / "empty").write_bytes(b"")
    return folder, contents


def test_several_and_packed_files_are_spooled_once_each(folder, tmp_path, monkeypatch):
    path, contents = folder
    monkeypatch.setattr(texts, "CHUNK", 7)
    text = streams.load([path], tmp_path / "spool", valid=0.1, test=0.1)
    found = whole(text)
    assert len(found) == sum(map(len, contents)) + len(contents)
    assert all(content + b"\n" in found for content in contents)
    # no file is in two parts
    starts = [found.index(content) for content in contents]
    borders = [len(text.train), len(text.train) + len(text.valid)]
    assert set(borders) <= {s + len(c) + 1 for s, c in zip(starts, contents, strict=True)}
    assert all(0.05 < len(p) / len(found) < 0.15 for p in (text.valid, text.test))
    assert "(whole files)" in text.about


def test_what_is_spooled_is_used_again_until_a_source_changes(folder, tmp_path, monkeypatch):
    path, _ = folder
    first = streams.load([path], tmp_path / "spool")
    with monkeypatch.context() as patch:
        patch.setattr(texts, "chunks", None)  # nothing is read
        assert streams.load([path], tmp_path / "spool").digest == first.digest
    (path / "empty").write_bytes(b"no longer")
    second = streams.load([path], tmp_path / "spool")
    assert second.digest != first.digest
    assert b"no longer\n" in whole(second)
    (tmp_path / "spool").unlink()  # it is mapped, and must not be cut off
    (tmp_path / "spool").write_bytes(b"something else")
    assert whole(streams.load([path], tmp_path / "spool")) == whole(second)


def test_most_limits_what_is_trained_on_and_changes_the_digest(tmp_path):
    path = tmp_path / "plain.txt"
    path.write_bytes(some_bytes(1000))
    all_, some = (streams.load([path], tmp_path / "s", most=most) for most in (None, 100))
    assert some.train.tobytes() == all_.train.tobytes()[:100]
    assert some.test.tobytes() == all_.test.tobytes()
    assert some.digest != all_.digest


@pytest.mark.parametrize(("size", "batch", "length"), [(100, 3, 5), (101, 4, 25), (97, 1, 96)])
def test_a_pass_predicts_every_byte_once(size, batch, length):
    data = np.arange(size, dtype=np.uint8)
    text = Streams(data, batch, length).check("training")
    seen, before = [], None
    for step in range(text.windows):
        window, count = text.window(step)
        assert window.shape == (batch, length + 1)
        assert window.dtype == np.int32
        assert 1 <= count <= length
        np.testing.assert_array_equal(window[:, 1:count], window[:, : count - 1] + 1)  # contiguous
        if before is not None:  # each window goes on where the one before ended
            np.testing.assert_array_equal(window[:, 0], before[:, -1])
        before = window
        seen.extend(window[:, 1 : count + 1].ravel())
    assert len(seen) == len(set(seen)) == batch * text.span
    assert size - 1 - batch < len(seen) <= size - 1


def test_the_window_before_the_first_is_the_text_before():
    text = Streams(np.arange(100, dtype=np.uint8), 3, 5)
    before, _ = text.window(-1)
    first, _ = text.window(0)
    np.testing.assert_array_equal(before[1:, -1], first[1:, 0])
    np.testing.assert_array_equal(before[1:, 0], first[1:, 0] - 5)


def test_memory_is_constant_in_the_length_of_the_text(tmp_path):
    path, size = tmp_path / "long.gz", 64 * texts.CHUNK
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(texts.CHUNK))
    tracemalloc.start()
    text = streams.load([path], tmp_path / "spool")
    text = Streams(text.train, 8, 64)
    for step in (0, text.windows // 2, text.windows - 1):
        text.window(step)
    texts.unigram_bits(text.data, text.data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 4  # counting a piece takes 8 bytes for each of its own


def test_unigram_bits_in_pieces_are_those_of_every_byte(monkeypatch):
    train, heldout = (np.frombuffer(some_bytes(n), np.uint8) for n in (500, 300))
    counts = np.bincount(train, minlength=256) + 1.0
    expected = -np.log2(counts / counts.sum())[heldout].mean()
    monkeypatch.setattr(texts, "CHUNK", 64)
    # float64: a logarithm is some eps off, a sum of n terms of one sign at most n eps / 2
    bound = (4 + len(heldout)) * np.finfo(float).eps
    assert texts.unigram_bits(train, heldout) == pytest.approx(expected, rel=bound, abs=0)


def test_mistakes(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    with pytest.raises(Mistake, match=r"empty.txt is empty: name a file with text in it"):
        streams.load([empty], tmp_path / "s")
    with pytest.raises(Mistake, match=r"no text in .*: name a file or folder that has some"):
        streams.load([empty, empty], tmp_path / "s")
    with pytest.raises(Mistake, match=r"^9 bytes of held-out text are fewer than 2 windows of 5: "):
        Streams(np.zeros(9, np.uint8), 2, 5).check("held-out")
    broken = tmp_path / "broken.gz"
    broken.write_bytes(gzip.compress(some_bytes(999))[:500])
    with pytest.raises(Mistake, match=r"broken.gz cannot be unpacked"):
        streams.load([broken], tmp_path / "s")
    assert not list(tmp_path.glob("s*"))  # nothing half written is left
