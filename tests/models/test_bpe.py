"""Byte-pair encoding merges as the paper says, and bytes come back from ids."""

import json

import numpy as np
import pytest

from models import _bpe
from models._bpe import Encoder
from models._cli import Mistake

SPACE = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # the letter for a space, as in GPT-2's files
# the example of Sennrich et al. 2016, with a word of two tokens for the rest, and two bytes of one
MERGES = ["e s", "es t", "l o", "lo w", f"{SPACE} low", "n e", "ne w", "new est", "Ã ©"]


def vocabulary(merges=MERGES):
    tokens = [*_bpe.letters(), *(merge.replace(" ", "") for merge in merges)]
    return {token: i for i, token in enumerate(tokens)}


def encoder(merges=MERGES):
    return Encoder(vocabulary(merges), [tuple(merge.split(" ")) for merge in merges])


def tokens(text, merges=MERGES):
    names = {i: token for token, i in vocabulary(merges).items()}
    return [names[i] for i in encoder(merges)(text).tolist()]


@pytest.mark.parametrize(
    ("text", "expected"),
    {
        "lowest": ["low", "est"],
        "a low newest": ["a", f"{SPACE}low", SPACE, "newest"],
        "lower": ["low", "e", "r"],
        "lolow": ["lo", "low"],
        "café": ["c", "a", "f", "Ã©"],
        "": [],
    }.items(),
)
def test_pairs_merge_in_the_order_learned(text, expected):
    assert tokens(text) == expected


def test_an_earlier_pair_wins_wherever_it_stands():
    assert tokens("abc", ["b c", "a b"]) == ["a", "bc"]
    assert tokens("abc", ["a b", "b c"]) == ["ab", "c"]
    assert tokens("aaaaa", ["a a", "aa aa"]) == ["aaaa", "a"]


def test_nothing_merges_across_words():
    assert tokens("lo w", ["l o", "lo w"]) == ["lo", SPACE, "w"]
    assert tokens("lo1w", ["l o", "lo 1"]) == ["lo", "1", "w"]


WORDS = {
    "don't stop": ["don", "'t", " stop"],
    "a  b": ["a", " ", " b"],
    "x  \n": ["x", "  \n"],
    "x_1y2 ½": ["x", "_", "1", "y", "2", " ½"],
    "naïve 中文...": ["naïve", " 中文", "..."],
    "we'LL a\x1cb": ["we", "'", "LL", " a", "\x1c", "b"],
}


@pytest.mark.parametrize("text", WORDS)
def test_words_are_those_of_gpt2(text):
    found = _bpe.words().findall(text)
    assert found == WORDS[text]
    assert "".join(found) == text


def test_bytes_come_back_from_ids():
    """Of any bytes, also of such as are no text."""
    raw = np.random.default_rng(0).integers(0, 256, 500).astype(np.uint8).tobytes()
    raw += "a low newest é".encode()
    got = "".join(tokens(raw.decode("utf-8", "surrogateescape")))
    letters = _bpe.letters()
    assert bytes(letters.index(letter) for letter in got) == raw
    assert len(set(letters)) == 256


def write(folder, vocab, merges):
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")


def test_a_folder_is_read(tmp_path):
    write(tmp_path, vocabulary(), MERGES)
    text = "a low newest # café"
    np.testing.assert_array_equal(Encoder.read(tmp_path)(text), encoder()(text))


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(Mistake, match=r"no tokenizer in .*: name a folder with vocab.json and mer"):
        Encoder.read(tmp_path)
    write(tmp_path, vocabulary(), [*MERGES, "a b c"])
    with pytest.raises(Mistake, match="no tokenizer in "):
        Encoder.read(tmp_path)
    write(tmp_path, vocabulary(), [*MERGES, "a b"])
    with pytest.raises(Mistake, match=r"lacks 'ab', which bytes or merges make \(1 in all are"):
        Encoder.read(tmp_path)
