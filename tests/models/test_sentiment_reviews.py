"""Files of labelled texts: what is read from them, and what is said of broken ones."""

import gzip
import lzma

import numpy as np
import pytest

from models import _reviews as reviews
from models._cli import Mistake

TABLE = 'label,sentence\n1,"So, it is ""good"""\r\n0,bad\n\n1,"two\nlines"\n'
REVIEW = "<review>\n<rating>\n{}\n</rating>\n<review_text>\n{}\n</review_text>\n</review>\n"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(content))
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.csv.xz"])
def test_quoted_fields(tmp_path, name):
    found = reviews.labelled(write(tmp_path / name, TABLE))
    assert found == [(1, 'So, it is "good"'), (0, "bad"), (1, "two\nlines")]


def test_columns_are_found_by_name(tmp_path):
    content = (
        "\ufeffid,sentence,label\n7,b\u00e9te,0\n8,fine,1\n"  # with a mark, as from a spreadsheet
    )
    assert reviews.labelled(write(tmp_path / "a.csv", content)) == [(0, "b\u00e9te"), (1, "fine")]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_lines_in_either_encoding(tmp_path, encoding):
    """U+0085 ends a line for str.splitlines, and is a dot in files that Windows wrote."""
    text = "1 caf\u00e9 \x85 and  more\r\n0 bad\n\n1 \n"
    found = reviews.labelled(write(tmp_path / "a.all.gz", text.encode(encoding)))
    assert found == [(1, "caf\u00e9 \x85 and  more"), (0, "bad"), (1, "")]


MISTAKES = {
    "column": ("a.csv", "label,text\n1,a\n", r"no column 'sentence': .* is \['label,text'\]"),
    "header": ("a.csv", "1,good\n0,bad\n", "no column 'label': its first line must name"),
    "short row": ("a.csv", "label,sentence\n1,a\n0\n", "line 3 of .* has 1 columns, the header 2"),
    "comma": ("a.csv", "label,sentence\n1,a,b\n", "line 2 .* 3 columns.*: quote a sentence"),
    "quote": ("a.csv", 'label,sentence\n1,"a" b\n', r"is no CSV at line 2 \(.*\): quote it"),
    "open quote": ("a.csv", 'label,sentence\n1,"a\n', "is no CSV at line"),
    "csv encoding": ("a.csv", b"label,sentence\n1,caf\xe9\n", "line 2 of .* is not UTF-8: conv"),
    "utf-16": (
        "a.all",
        "1 a\n0 b\n".encode("utf-16"),
        "has zero bytes in it, as UTF-16 and packed files have",
    ),
    "label": ("a.all", "1 a\n2 b\n", "line 2 of .* has the label '2': expected 0 or 1"),
    "csv label": ("a.csv", "label,sentence\n\n+,b\n", r"line 3 of .* has the label '\+'"),
    "no label": ("a.all", "good\n", "line 1 of .* has the label 'good'"),
    "empty": ("a.all", " \n", "is empty: name a file with labels and texts in it"),
    "no rows": ("a.csv", "label,sentence\n", "has no examples"),
    "one class": ("a.all", "1 a\n1 b\n", "have the label 1: need both"),
    "products": ("a.review.xz", REVIEW.format("5.0", "a"), "give it with --write_reviews FILE"),
    "archive": ("a.all", gzip.compress(b"1 a\n0 b\n"), r"end in \.gz or \.xz"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_file_is_named(tmp_path, name):
    file, content, message = MISTAKES[name]
    path = write(tmp_path / file, content)
    with pytest.raises(Mistake, match=message) as raised:
        reviews.load([path])
    assert str(path) in str(raised.value)


def test_a_broken_archive_is_named(tmp_path):
    path = write(tmp_path / "a.all.gz", "1 a\n0 b\n")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(Mistake, match=r"a\.all\.gz cannot be unpacked"):
        reviews.load([path])


# ------------------------------------------------------------------------------------- the sets


def lines(*labels):
    return "".join(f"{label} text {i}\n" for i, label in enumerate(labels))


def table(*labels):
    return "label,sentence\n" + "".join(f"{label},text {i}\n" for i, label in enumerate(labels))


def test_parts_of_a_set_are_found_by_name(tmp_path):
    for i, part in enumerate(reviews.PARTS):
        write(tmp_path / "sst" / f"{part}_binary_sent.csv", table(*[0, 1] * (i + 1)))
        write(tmp_path / "conv" / f"stsa.binary.{part}.gz", lines(*[1, 0] * (i + 1)))
        write(tmp_path / "own" / f"{part}.txt", lines(0, 1))
    write(tmp_path / "conv" / "custrev.all", lines(0, 1, 1))
    found = {one.name: one for one in reviews.load([tmp_path / "sst", tmp_path])}
    assert list(found) == ["SST", "CR", "SST, tokenised", "own"]  # what is named first is first
    sst = found["SST"]
    assert {part: list(at) for part, at in sst.parts.items()} == {
        "train": [0, 1],
        "dev": [2, 3, 4, 5],
        "test": [6, 7, 8, 9, 10, 11],
    }
    np.testing.assert_array_equal(sst.labels, [0, 1] * 6)
    assert sst.texts[:4] == ("text 0", "text 1", "text 0", "text 1")
    assert not found["CR"].parts
    assert len({one.digest for one in found.values()}) == 4


def test_a_part_alone_is_no_set(tmp_path):
    for part in ("train", "test"):
        path = write(tmp_path / f"{part}.csv", table(0, 1))
    with pytest.raises(Mistake, match=r"which has no dev part beside it: put it there"):
        reviews.load([path.parent])


def test_a_set_twice(tmp_path):
    a = write(tmp_path / "custrev.all", lines(0, 1))
    b = write(tmp_path / "custrev.all.gz", lines(0, 1))
    with pytest.raises(Mistake, match=r"both hold the set CR: name one of them"):
        reviews.load([tmp_path])
    with pytest.raises(Mistake, match=r"both hold the set CR"):
        reviews.load([b, a])
    assert len(reviews.load([a, a])) == 1
    c = write(tmp_path / "more" / "custrev.txt", lines(0, 1))
    with pytest.raises(Mistake, match="holds the set CR twice: name one of its folders"):
        reviews.load([a, c])


# ----------------------------------------------------------------------------- reviews of products


def test_product_reviews(tmp_path):
    entries = [
        ("5.0", "A &quot;gem&quot;<br />\n& a\x07steal, 3 < 4"),
        ("4", "Fine &amp;quot;thing&amp;quot;"),
        ("3.0", "So so"),
        ("2.0", "Bad"),
        ("1.0", " <br> "),
    ]
    content = "<data>\n" + "".join(REVIEW.format(*one) for one in entries)
    found = reviews.reviews(write(tmp_path / "a.review.xz", content))
    assert found == [(1, 'A "gem" & a steal, 3 < 4'), (1, 'Fine "thing"'), (0, "Bad")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (REVIEW.format("5", "a") + "<review><rating>5</rating></review>", "2 .* no <review_text>"),
        (REVIEW.replace("rating", "stars").format("5", "a"), "1 of .* has no <rating>: the file"),
        (REVIEW.format("4.0.1", "a"), r"has the rating '4\.0\.1'"),
        ("<data></data>", "has no <review> with a rating and a text: name a .review file"),
        (REVIEW.format("5", "a").encode() + b"\xff", "line 9 of .* is not UTF-8"),
    ],
)
def test_damaged_product_reviews(tmp_path, content, message):
    with pytest.raises(Mistake, match=message):
        reviews.reviews(write(tmp_path / "a.review", content))


def test_reviews_are_written_as_lines(tmp_path):
    same = REVIEW.format("5", "the same")
    some = "".join(REVIEW.format(i % 2 + 1, f"r\u00e9view\nnumber {i}") for i in range(30))
    write(tmp_path / "in" / "a.review.xz", same + some)
    write(tmp_path / "in" / "b.review", same)
    write(tmp_path / "in" / "README", "not this")
    target = tmp_path / "out.txt"
    count, size = reviews.write_reviews([tmp_path / "in"], target)
    content = target.read_bytes()
    assert (count, size) == (31, len(content))
    expected = {"the same", *(f"r\u00e9view number {i}" for i in range(30))}
    written = content.decode().removesuffix("\n").split("\n")
    assert set(written) == expected
    assert written != sorted(written)  # mixed, but always alike
    reviews.write_reviews([tmp_path / "in" / "b.review", tmp_path / "in"], target)
    assert target.read_bytes() == content
    with pytest.raises(Mistake, match=r"no \.review files in --data, which is missing"):
        reviews.write_reviews([], target)
