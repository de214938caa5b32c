"""Parallel text: pairs of files or a synthetic task, tokens, and batches of pairs of like length.

A sentence is a list of token numbers. PAD, BOS and EOS are the same for every kind of tokens.
"""

import collections
import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import sentencepiece

from models import _text as texts
from models._cli import Mistake

PAD, BOS, EOS = 0, 1, 2
MOST_BYTES = 2**31
SIDES = ("source", "target")
ROUND = 4  # lengths of batches are multiples of it

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
    source, target = (_lines(path) for path in paths)
    if len(source) != len(target):
        raise Mistake(
            f"--{flag}: {paths[0]} has {len(source):,} lines and {paths[1]} has {len(target):,}: "
            "line i of one must be the translation of line i of the other"
        )
    if not source:
        raise Mistake(f"--{flag}: {paths[0]} is empty: name files with text in them")
    return Pairs(source, target)


def _lines(path: Path) -> list[str]:
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


def pieces(kind: str, vocabulary: int, lines: Sequence[str]) -> bytes:
    """A model of sentencepiece, "unigram" or "bpe", learnt from these lines."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
            sentence_iterator=iter(lines), model_writer=model, model_type=kind,
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


# ------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """Pairs side by side, padded behind their ends. Rows beyond the pairs are empty."""

    source: np.ndarray  # int32 [n, s]
    lengths: np.ndarray  # int32 [n], of the sources
    target: np.ndarray  # int32 [n, 1 + t], BOS first and EOS last


@dataclasses.dataclass
class Batches:
    """All pairs once in each epoch, in batches of one of a few shapes.

    A pair's bucket depends on the longer of its sides; `edges` puts buckets apart. A batch has
    about `size` tokens on its longer side, padding included, and a number of rows that `multiple`
    divides. What is in a batch follows from the seed and the step alone.
    """

    source: Sequence[Sequence[int]]
    target: Sequence[Sequence[int]]
    size: int
    buckets: int = 4
    multiple: int = 1
    seed: int | None = 0  # None: in order

    def __post_init__(self) -> None:
        lengths = np.array([[len(s), len(t) + 1] for s, t in
                            zip(self.source, self.target, strict=True)]).reshape(-1, 2)  # fmt: skip
        longer = -(-lengths.max(1) // ROUND) * ROUND
        of = np.searchsorted(edges(longer, self.buckets), longer)
        self.members = [np.flatnonzero(of == i) for i in range(self.buckets)]
        self.members = [members for members in self.members if len(members)]
        self.shapes: list[tuple[int, int, int]] = []  # rows, s, t
        for members in self.members:
            s, t = (-(-max(1, int(side)) // ROUND) * ROUND for side in lengths[members].max(0))
            rows = max(1, self.size // max(s, t) // self.multiple) * self.multiple
            self.shapes.append((rows, s, t))
        self._epoch: tuple[int, list[tuple[int, np.ndarray]]] | None = None

    def reseed(self, seed: int) -> None:
        """Other batches from the same pairs."""
        self.seed, self._epoch = seed, None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return sum(-(-len(m) // s[0]) for m, s in zip(self.members, self.shapes, strict=True))

    def shape_counts(self, steps: int | None = None) -> dict[tuple[int, int, int], int]:
        """How many batches of so many steps (default: an epoch) have each shape (rows, s, t)."""
        planned = (
            self.plan(step // len(self))[step % len(self)][0] for step in range(steps or len(self))
        )
        return dict(collections.Counter(self.shapes[bucket] for bucket in planned))

    def plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """(bucket, numbers of its pairs) of each batch of an epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            rng = None if self.seed is None else np.random.default_rng([self.seed, epoch])
            planned = []
            for bucket, (members, (rows, _, _)) in enumerate(
                zip(self.members, self.shapes, strict=True)
            ):
                order = members if rng is None else rng.permutation(members)
                planned += [(bucket, order[i : i + rows]) for i in range(0, len(order), rows)]
            if rng is not None:
                planned = [planned[i] for i in rng.permutation(len(planned))]
            self._epoch = epoch, planned
        return self._epoch[1]

    def batch(self, step: int) -> Batch:
        """The batch of a training step."""
        bucket, chosen = self.plan(step // len(self))[step % len(self)]
        return self._padded(chosen, self.shapes[bucket])

    def once(self) -> Iterator[tuple[np.ndarray, Batch]]:
        """Every batch of the first epoch, with the numbers of its pairs."""
        for bucket, chosen in self.plan(0):
            yield chosen, self._padded(chosen, self.shapes[bucket])

    def _padded(self, chosen: np.ndarray, shape: tuple[int, int, int]) -> Batch:
        rows, s, t = shape
        source, target = np.full((rows, s), PAD, np.int32), np.full((rows, t + 1), PAD, np.int32)
        lengths = np.zeros(rows, np.int32)
        for row, i in enumerate(chosen):
            one, other = self.source[i], [BOS, *self.target[i], EOS]
            source[row, : len(one)], target[row, : len(other)] = one, other
            lengths[row] = len(one)
        return Batch(source, lengths, target)


def edges(longer: np.ndarray, buckets: int) -> np.ndarray:
    """The greatest lengths of at most so many buckets: those with the least padding in all."""
    sides, counts = np.unique(longer, return_counts=True)
    upto = np.concatenate([[0], np.cumsum(counts)])
    # cost[j]: padded tokens of the pairs up to sides[j - 1], in the buckets so far
    cost, before = np.where(np.arange(len(sides) + 1) > 0, np.inf, 0.0), []
    for _ in range(min(buckets, len(sides))):
        last = sides[None] * (upto[None, 1:] - upto[:-1, None])  # of a bucket (i, j]
        ways = np.where(upto[:-1, None] < upto[None, 1:], cost[:-1, None] + last, np.inf)
        before.append(ways.argmin(0))
        cost = np.concatenate([[0.0], ways.min(0)])
    found, j = [], len(sides)
    for choices in reversed(before):
        if j:
            found.append(sides[j - 1])
            j = int(choices[j - 1])
    return np.array(found[::-1])


def encoded(
    pairs: Pairs, tokens: Tokens, longest: int | None = None
) -> tuple[list[list[int]], list[list[int]], int]:
    """(sources, targets, how many pairs were left out) for training where `longest` is given: no
    side may be empty or have more tokens than that. Sources end with EOS."""

    def sides(source: str, target: str) -> tuple[list[int], list[int]]:
        return [*tokens.encode(source), EOS], tokens.encode(target)

    both = [sides(*pair) for pair in zip(*pairs, strict=True)]
    keep: Callable[[list[int]], bool] = lambda one: longest is None or 0 < len(one) <= longest  # noqa: E731
    kept = [(s, t) for s, t in both if keep(s[:-1]) and keep(t)]
    if not kept:
        raise Mistake(
            f"all {len(both):,} pairs to train on are empty or longer than --longest {longest} "
            "tokens: give a larger --longest"
        )
    source, target = map(list, zip(*kept, strict=True))
    return source, target, len(both) - len(kept)
