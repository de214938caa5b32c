"""Texts with a label, 0 or 1: the sets that sentiment is measured on, and reviews of products.

`label,sentence` in .csv files, `label text` lines in files of any other name, and the `.review`
files of Blitzer, Dredze and Pereira (2007), each plain or packed (.gz, .xz).
"""

import csv
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models import _text as texts
from models._cli import Mistake

PARTS = ("train", "dev", "test")
KNOWN = {  # how papers call what lies in files of these names
    "binary_sent": "SST",
    "stsa.binary": "SST, tokenised",
    "custrev": "CR",
    "rt-polarity": "MR",
    "subj": "SUBJ",
    "mpqa": "MPQA",
}
_PART = re.compile(r"(?:^|[._-])(train|dev|test)(?=[._-]|$)")
_REVIEW = re.compile(r"<review>(.*?)</review>", re.DOTALL)
_STARS = re.compile(r"<rating>\s*([0-9.]+)\s*</rating>")
_TEXT = re.compile(r"<review_text>(.*?)</review_text>", re.DOTALL)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")


class Labelled(NamedTuple):
    """A data set; `parts` are the indices of PARTS, or nothing where the files have no split."""

    name: str
    texts: tuple[str, ...]
    labels: np.ndarray  # int32, 0 or 1
    parts: Mapping[str, np.ndarray]
    digest: str


def load(paths: Sequence[Path]) -> list[Labelled]:
    """The data sets in these files and folders, in the order given, and by name within a folder.

    Files that differ by "train", "dev" and "test" in their names are the parts of one set; every
    other file is a set of its own. Raises `Mistake`, with what to do, for anything else.
    """
    found: dict[tuple[Path, str], dict[str, Path]] = {}
    for file in dict.fromkeys(file for path in paths for file in texts.files(path)):
        name, part = _name(file)
        parts = found.setdefault((file.parent, name), {})
        if part in parts or (parts and "" in (part, *parts)):
            other = next(iter(parts.values()))
            raise Mistake(f"{file} and {other} both hold the set {name}: name one of them")
        parts[part] = file
    sets = [_load(name, parts) for (_, name), parts in found.items()]
    names = [one.name for one in sets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise Mistake(f"--data holds the set {twice} twice: name one of its folders")
    return sets


def labelled(path: Path) -> list[tuple[int, str]]:
    """(label, text) of each example in a file: `label,sentence` rows if it is a .csv file, which
    must be UTF-8, else `label text` lines, in UTF-8 or else in Latin-1. A text may be empty: the
    set CR has such lines, which papers count."""
    content, kind = _content(path), _suffixes(path)
    if ".review" in kind:
        raise Mistake(
            f"{path} holds product reviews, to learn a language from: give it with "
            "--write_reviews FILE, or measure on other files"
        )
    pairs = _rows(path, content) if ".csv" in kind else _lines(path, content)
    found = []
    for place, label, text in pairs:
        if label not in ("0", "1"):
            raise Mistake(f"{place} of {path} has the label {label[:20]!r}: expected 0 or 1")
        found.append((int(label), text))
    if not found:
        raise Mistake(f"{path} has no examples: name a file with labels and texts in it")
    return found


def reviews(path: Path) -> list[tuple[int, str]]:
    """(label, text) of each review in a `.review` file: 1 for four or five stars, 0 for one or two.

    The format looks like XML and is none, so it is read by patterns. Reviews with three stars say
    neither and are left out, as are those without text. The text is made `plain`.
    """
    content = _utf8(path, _content(path))
    found = []
    for number, entry in enumerate(_REVIEW.findall(content), 1):
        stars, text = _STARS.search(entry), _TEXT.search(entry)
        if not (stars and text):
            missing = "<rating>" if text else "<review_text>"
            raise Mistake(f"review {number} of {path} has no {missing}: the file is damaged")
        try:
            rating = float(stars[1])
        except ValueError:
            raise Mistake(f"review {number} of {path} has the rating {stars[1]!r}") from None
        if rating != 3 and (words := plain(text[1])):
            found.append((int(rating > 3), words))
    if not found:
        raise Mistake(f"{path} has no <review> with a rating and a text: name a .review file")
    return found


def plain(text: str) -> str:
    """One line of words: entities are resolved, tags and control characters dropped."""
    text = _TAG.sub(" ", html.unescape(html.unescape(text)))  # some were escaped twice
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def write_reviews(paths: Sequence[Path], target: Path) -> tuple[int, int]:
    """Writes each different review of all `.review` files in `paths` as a line of text, UTF-8.

    In the order of their hashes, so that every stretch of the file has reviews of all kinds, and
    its end can be held out. Returns the number of reviews and of bytes.
    """
    files = [file for path in paths for file in texts.files(path) if ".review" in _suffixes(file)]
    if not files:
        raise Mistake(
            f"no .review files in {', '.join(map(str, paths)) or '--data, which is missing'}: name "
            "a folder that has some with --data"
        )
    lines = {text.encode() for file in files for _, text in reviews(file)}
    ordered = sorted(lines, key=lambda line: hashlib.sha256(line).digest())
    content = b"".join(line + b"\n" for line in ordered)
    target.write_bytes(content)
    return len(ordered), len(content)


def _load(name: str, files: Mapping[str, Path]) -> Labelled:
    if "" not in files and (missing := [part for part in PARTS if part not in files]):
        some = next(iter(files.values()))
        raise Mistake(
            f"{some} is a part of the set {name}, which has no {missing[0]} part beside it: put "
            "it there, or rename the file if it is a whole set"
        )
    examples, parts, hashed = [], {}, hashlib.sha256()
    for part in sorted(files, key=("", *PARTS).index):
        found = labelled(files[part])
        if len({label for label, _ in found}) < 2:
            raise Mistake(f"all examples of {files[part]} have the label {found[0][0]}: need both")
        if part:
            parts[part] = np.arange(len(examples), len(examples) + len(found))
        examples += found
        hashed.update(repr((part, found)).encode())
    labels = np.array([label for label, _ in examples], np.int32)
    return Labelled(name, tuple(t for _, t in examples), labels, parts, hashed.hexdigest()[:16])


def _rows(path: Path, content: bytes) -> list[tuple[str, str, str]]:
    text = _utf8(path, content)
    # lines as the format has them: str.splitlines would split at characters within a field, too
    reader = csv.reader((line + "\n" for line in text.split("\n")), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if missing := [name for name in ("label", "sentence") if name not in header]:
            raise Mistake(
                f"{path} has no column {missing[0]!r}: its first line must name the columns, "
                f"label,sentence, and is {text[:40].splitlines()[:1] or ''}"
            )
        at, found = [header.index(name) for name in ("label", "sentence")], []
        for row in reader:
            if not row:
                continue
            place = f"line {reader.line_num}"
            if len(row) != len(header):
                raise Mistake(
                    f"{place} of {path} has {len(row)} columns, the header {len(header)}: quote a "
                    "sentence that has commas in it"
                )
            found.append((place, row[at[0]].strip(), row[at[1]]))
    except csv.Error as error:
        raise Mistake(f"{path} is no CSV at line {reader.line_num} ({error}): quote it") from None
    return found


def _lines(path: Path, content: bytes) -> list[tuple[str, str, str]]:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        label, _, words = line.removesuffix("\r").partition(" ")
        if label or words:
            found.append((f"line {number}", label, words))
    return found


def _content(path: Path) -> bytes:
    content = b"".join(texts.chunks(path, texts.MOST_BYTES))
    if not content.strip():
        raise Mistake(f"{path} is empty: name a file with labels and texts in it")
    if b"\0" in content:
        raise Mistake(
            f"{path} has zero bytes in it, as UTF-16 and packed files have: convert it to UTF-8, "
            "or let its name end in .gz or .xz"
        )
    return content.removeprefix(b"\xef\xbb\xbf")


def _utf8(path: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Mistake(f"line {line} of {path} is not UTF-8: convert the file to it") from None


def _suffixes(path: Path) -> list[str]:
    return [suffix.lower() for suffix in path.suffixes]


def _name(path: Path) -> tuple[str, str]:
    """(name of the set, its part or "") by the name of a file."""
    name = re.sub(r"\.(gz|xz)$", "", path.name)
    name = re.sub(r"\.(csv|tsv|txt|all)$", "", name)
    part = _PART.search(name)
    name = _PART.sub("", name, count=1).strip("._-") if part else name
    return KNOWN.get(name, name or path.parent.name), part[1] if part else ""
