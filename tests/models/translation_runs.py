"""What the tests of the translation recipe share: a tiny model, its text, and searches by hand."""

import shlex

import numpy as np

from models._parallel_text import BOS, EOS, PAD
from models._translation_size import Size

TINY = shlex.split(
    "--tokens bytes --longest 12 --width 16 --hidden 32 --layers 1 --heads 2 --block 4 --steps 6 "
    "--batch_tokens 48 --buckets 1 --accumulate 2 --beam 2 --measure_every 3 --checkpoint_every 2 "
    "--learning_rates 0.01"
)
SIZE = Size(12, 16, 24, layers=1, heads=2, longest=32, attention_block=4, dropout=0.0)


def write_pairs(folder, count=24, seed=0):
    """Words and the same words in capitals; the flags that name them."""
    rng, flags = np.random.default_rng(seed), []
    for part in ("train", "valid", "test"):
        words = ["".join(rng.choice(list("abc"), 1 + i % 3)) for i in range(count)]
        paths = [folder / f"{part}.{side}" for side in ("low", "up")]
        paths[0].write_text("".join(f"{w}\n" for w in words))
        paths[1].write_text("".join(f"{w.upper()}\n" for w in words))
        flags += [f"--{part}", *map(str, paths)]
    return flags


def lp(length, alpha):
    """The length penalty of Wu et al. 2016, formula 14."""
    return (5 + length) ** alpha / (5 + 1) ** alpha


def beam_by_hand(log_p, beam, limit, alpha):
    """[(score, tokens)] of beam search, best first. `log_p(prefix) -> [v]` sees whole prefixes."""
    live, found = [(0.0, (BOS,))], []
    for length in range(1, limit + 1):
        grown = []
        for total, prefix in live:
            for token, more in enumerate(log_p(prefix)):
                banned = token in (PAD, BOS) or (length == limit and token != EOS)
                if not banned:
                    grown.append((total + float(more), (*prefix, token)))
        best = sorted(grown, key=lambda one: -one[0])[:beam]
        found += [(t / lp(length, alpha), p[1:]) for t, p in best if p[-1] == EOS]
        live = [one for one in best if one[1][-1] != EOS]
        can_be = max((total / lp(limit, alpha) for total, _ in live), default=-np.inf)
        if found and max(found)[0] >= can_be:
            break
    return sorted(found, key=lambda one: -one[0])[:beam]


def every_sequence(log_p, vocabulary, limit, alpha):
    """[(score, tokens)] of all sequences that end within the limit, best first."""
    found, prefixes = [], [(0.0, (BOS,))]
    for length in range(1, limit + 1):
        grown = []
        for total, prefix in prefixes:
            row = log_p(prefix)
            found.append(((total + float(row[EOS])) / lp(length, alpha), (*prefix[1:], EOS)))
            grown += [
                (total + float(row[token]), (*prefix, token))
                for token in range(EOS + 1, vocabulary)
            ]
        prefixes = grown
    return sorted(found, key=lambda one: -one[0])


def unpadded(row):
    return tuple(int(token) for token in row if token != PAD)


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(EOS + 1, SIZE.vocabulary, shape).astype(np.int32)
