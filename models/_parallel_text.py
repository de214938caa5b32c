"""Parallel text: pairs of files or a synthetic task, and tokens.

A sentence is a list of token numbers. PAD, BOS and EOS are the same for every kind of tokens.
"""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import sentencepiece

from models import _text as texts
from models._cli import Mistake

PAD, BOS, EOS = 0, 1, 2
MOST_BYTES = 2**31
SIDES = ("source", "target")

# ----------------------------------------------------------------------------------- sentences


class Pairs(NamedTuple):
    """Sentences and their translations."""

    source: list[str]
    target: list[str]

    @property
    def digest(self) -> str:
        """Equal for equal pairs."""
        whole = "\n".join((*self.source, "", *self.target))
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


class Corpus(NamedTuple):
    """What is learnt, what flags are chosen by, and what is reported."""

    train: Pairs
    valid: Pairs
    test: Pairs
    about: str


def load(train: Sequence[Path], valid: Sequence[Path], test: Sequence[Path]) -> Corpus:
    """The pairs of files named, or the synthetic task if there are none."""
    named = {"train": train, "valid": valid, "test": test}
    if not any(named.values()):
        return numbers()
    parts = {flag: read(flag, paths) for flag, paths in named.items()}
    sizes = ", ".join(f"{len(pairs.source):,} pairs to {flag}" for flag, pairs in parts.items())
    return Corpus(**parts, about=f"{' '.join(path.name for path in train)}: {sizes}")


def read(flag: str, paths: Sequence[Path]) -> Pairs:
    """A file of sentences and one of their translations, line by line (plain, .gz, .xz)."""
    if len(paths) != 2:
        raise Mistake(
            f"--{flag} names {len(paths)} files: with files, --train, --valid and --test each take "
            "two, a source and its translation, line by line"
        )
    source, target = (lines(path) for path in paths)
    if len(source) != len(target):
        raise Mistake(
            f"--{flag}: {paths[0]} has {len(source):,} lines and {paths[1]} has {len(target):,}: "
            "line i of one must be the translation of line i of the other"
        )
    if not source:
        raise Mistake(f"--{flag}: {paths[0]} is empty: name files with text in them")
    return Pairs(source, target)


def lines(path: Path) -> list[str]:
    """The lines of a file of UTF-8, without their ends."""
    if not path.is_file():
        raise Mistake(f"{path} is no file: check the paths given")
    content = b"".join(texts.chunks(path, MOST_BYTES))
    try:
        # not splitlines: it also splits at characters that sentences may have inside
        return [line.rstrip("\r\n") for line in io.StringIO(content.decode("utf-8"), newline="\n")]
    except UnicodeDecodeError as error:
        raise Mistake(
            f"{path} is no UTF-8 text (byte {error.start}): convert it, for example with iconv"
        ) from None


ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
ONES += "fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


def in_words(n: int) -> str:
    """A number below a million, in English."""
    if n < 20:
        return ONES.split()[n]
    if n < 100:
        tens, rest = TENS.split()[n // 10 - 2], n % 10
        return f"{tens}-{in_words(rest)}" if rest else tens
    unit, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    head, rest = f"{in_words(n // unit)} {name}", n % unit
    return f"{head}{' ' if rest >= 100 else ' and '}{in_words(rest)}" if rest else head


def numbers(count: int = 20_000, heldout: int = 500, seed: int = 0) -> Corpus:
    """The synthetic task: numbers of up to six digits, and how one says them."""
    rng = np.random.default_rng(seed)
    # of every number of digits about as many as there are, but no more than asked for
    draw = np.unique((10 ** rng.uniform(0, 6, 2 * count)).astype(int))
    chosen = rng.permutation(draw)[: count + 2 * heldout].tolist()
    cuts = chosen[2 * heldout :], chosen[:heldout], chosen[heldout : 2 * heldout]
    pairs = [Pairs([str(n) for n in part], [in_words(n) for n in part]) for part in cuts]
    about = f"numbers and their names: {len(pairs[0].source):,} pairs to train on"
    return Corpus(*pairs, about=about)


# -------------------------------------------------------------------------------------- tokens


class Tokens(Protocol):
    """Sentences as numbers and back."""

    size: int
    digest: str

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class Bytes:
    """UTF-8, each byte a token."""

    size, digest = 256 + EOS + 1, "bytes"

    def encode(self, text: str) -> list[int]:
        return [byte + EOS + 1 for byte in text.encode()]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t - EOS - 1 for t in tokens if t > EOS).decode(errors="replace")


class Pieces:
    """Pieces of words (Kudo & Richardson 2018, "SentencePiece"). Nothing is normalised away and
    rare characters are bytes, so that every line comes back as it was."""

    def __init__(self, model: bytes) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)  # pyright: ignore
        self.size, self.digest = len(self._model), hashlib.sha256(model).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._model.decode([t for t in tokens if t > EOS])


def pieces(kind: str, vocabulary: int, of: Sequence[str]) -> bytes:
    """A model of sentencepiece, "unigram" or "bpe", learnt from these lines."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
            sentence_iterator=iter(of), model_writer=model, model_type=kind,
            vocab_size=vocabulary, pad_id=PAD, bos_id=BOS, eos_id=EOS, unk_id=EOS + 1,
            byte_fallback=True, split_digits=True, hard_vocab_limit=False, num_threads=1,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise Mistake(
            f"sentencepiece cannot make --vocabulary {vocabulary} of this text "
            f"({str(error).splitlines()[0][:200]}): give another number, or --tokens bytes"
        ) from None
    return model.getvalue()


def tokens(kind: str, vocabulary: int, train: Pairs, path: Path, *, resume: bool) -> Tokens:
    """Those of the training text, shared by both languages; pieces are kept in `path`."""
    if kind == "bytes":
        return Bytes()
    if not (resume and path.exists()):
        path.write_bytes(pieces(kind, vocabulary, [*train.source, *train.target]))
    try:
        return Pieces(path.read_bytes())
    except RuntimeError:
        raise Mistake(f"{path} is no model of sentencepiece: start without --resume") from None


def encoded(
    pairs: Pairs, tokens: Tokens, longest: int | None = None
) -> tuple[list[list[int]], list[list[int]], int]:
    """(sources, targets, how many pairs were left out) for training where `longest` is given: no
    side may be empty or have more tokens than that. Sources end with EOS."""

    def sides(source: str, target: str) -> tuple[list[int], list[int]]:
        return [*tokens.encode(source), EOS], tokens.encode(target)

    kept = both = [sides(*pair) for pair in zip(*pairs, strict=True)]
    if longest is not None:
        kept = [(s, t) for s, t in both if 1 < len(s) <= longest + 1 and 0 < len(t) <= longest]
    if not kept:
        raise Mistake(
            f"all {len(both):,} pairs to train on are empty or longer than --longest {longest} "
            "tokens: give a larger --longest"
        )
    source, target = map(list, zip(*kept, strict=True))
    return source, target, len(both) - len(kept)
