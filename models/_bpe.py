"""Byte-pair encoding as in GPT-2: bytes as letters, merged pair by pair in the order learned.

After Sennrich, Haddow and Birch 2016, "Neural Machine Translation of Rare Words with Subword
Units", and of bytes: Radford et al. 2019. Text is cut into words first, which nothing crosses.
"""

import functools
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from models._cli import Mistake

FILES = ("vocab.json", "merges.txt")
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space


class Encoder:
    """`encoder(text) -> ids`, from the id of every token and the pairs that make them, in order."""

    def __init__(self, vocabulary: Mapping[str, int], merges: Iterable[tuple[str, str]]) -> None:
        self.vocabulary = vocabulary
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._letters = letters()
        self._known: dict[str, list[int]] = {}
        made = {*self._letters, *("".join(pair) for pair in self._ranks)}
        if unknown := sorted(made - set(vocabulary)):
            raise Mistake(
                f"the vocabulary lacks {unknown[0]!r}, which bytes or merges make ({len(unknown)} "
                f"in all are missing): give the {' and '.join(FILES)} of one tokenizer"
            )

    @classmethod
    def read(cls, folder: Path) -> "Encoder":
        """That of `vocab.json` and `merges.txt`, as GPT-2 has them."""
        try:
            vocabulary, merges = ((folder / name).read_text("utf-8") for name in FILES)
            lines = [
                line for line in merges.split("\n") if line and not line.startswith("#version")
            ]
            pairs = [(a, b) for a, b in (line.split(" ") for line in lines)]
            return cls(dict(json.loads(vocabulary)), pairs)
        except (OSError, ValueError, TypeError) as error:
            raise Mistake(
                f"no tokenizer in {folder} ({error}): name a folder with {' and '.join(FILES)}"
            ) from None

    def __call__(self, text: str) -> np.ndarray:
        ids = []
        for word in words().findall(text):
            if word not in self._known:
                self._known[word] = [self.vocabulary[token] for token in self._tokens(word)]
            ids += self._known[word]
        return np.array(ids, np.int32)

    def _tokens(self, word: str) -> list[str]:
        parts = [self._letters[byte] for byte in word.encode("utf-8", "surrogateescape")]
        while pairs := [(self._ranks[p], p) for p in pairwise(parts) if p in self._ranks]:
            _, first = min(pairs)
            merged, i = [], 0
            while i < len(parts):
                step = 2 if tuple(parts[i : i + 2]) == first else 1
                merged.append("".join(parts[i : i + step]))
                i += step
            parts = merged
        return parts


@functools.cache
def letters() -> list[str]:
    """A printable letter for each byte: its own where it has one, those from 256 on elsewhere."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return [chr(b if b in own else 256 + others.index(b)) for b in range(256)]


@functools.cache
def words() -> re.Pattern:
    """GPT-2's words: endings of English, letters, digits or signs after a space at most, spaces."""
    kinds = [unicodedata.category(chr(i))[0] for i in range(sys.maxunicode + 1)]
    letter, digit = (_ranges(kinds, kind) for kind in "LN")
    return re.compile(
        rf"'s|'t|'re|'ve|'m|'ll|'d| ?[{letter}]+| ?[{digit}]+| ?[^{SPACE}{letter}{digit}]+"
        rf"|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+"
    )


def _ranges(kinds: list[str], kind: str) -> str:
    """The characters of a kind, as in the brackets of a regular expression."""
    inside = np.array([0, *(one == kind for one in kinds), 0], np.int8)
    edges = np.flatnonzero(np.diff(inside)).reshape(-1, 2)
    return "".join(f"\\U{low:08x}-\\U{high - 1:08x}" for low, high in edges)
