"""What a decoder is measured and fine-tuned on: bytes, a text cut into tokens, or tokens."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models import _bpe
from models import _text as texts
from models._cli import Mistake
from models._decoders import BYTES

HELDOUT = 0.1  # the share of a file of tokens held out, its end


def load(
    vocabulary: int,
    window: int,
    *,
    data: Sequence[Path] = (),
    tokens: Sequence[Path] = (),
    tokenizer: Path | None = None,
) -> tuple[texts.Text, str]:
    """(ids to train on and held out, "byte" or "token"), each longer than a window.

    `tokens` are one or two files, `_ids`; of one, the end is held out. Otherwise the text of
    `data`, as `_text.load` has it, is cut by a `tokenizer`, or is bytes for a vocabulary of 256.
    """
    if len(tokens) > 2:
        raise Mistake(f"--tokens has {len(tokens)} files: give one, or one to train on and another")
    if tokens:
        parts = [_ids(path) for path in tokens]
        cut = len(parts[0]) - round(HELDOUT * len(parts[0]))
        train, heldout = parts if len(parts) == 2 else (parts[0][:cut], parts[0][cut:])
        how = "a file of its own" if len(parts) == 2 else f"the last {HELDOUT:.0%}"
        name = " ".join(map(str, tokens))
    elif tokenizer is not None:
        text, encode = texts.load(data, window), _bpe.Encoder.read(tokenizer)
        train, heldout = (
            encode(part.tobytes().decode("utf-8", "surrogateescape"))
            for part in (text.train, text.heldout)
        )
        name, how = text.about.split(":")[0], "as text"
    elif vocabulary == BYTES:
        return texts.load(data, window), "byte"
    else:
        raise Mistake(
            f"the model has a vocabulary of {vocabulary:,} tokens, so bytes do not fit it: give "
            "--tokens PATH (ids in .npy or .bin), or --tokenizer FOLDER (with "
            f"{' and '.join(_bpe.FILES)})"
        )
    for part, ids in (("training", train), ("held-out", heldout)):
        if len(ids) < window:
            raise Mistake(
                f"{name}: {len(ids)} {part} tokens are fewer than one window of {window}: give "
                "more, or a smaller --length"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocabulary:
            raise Mistake(
                f"{name} has ids from {low} to {high}, the model a vocabulary of {vocabulary}: use "
                "the tokenizer that the model was trained with"
            )
    sizes = f"{len(train):,} tokens to train on, {len(heldout):,} held out ({how})"
    return texts.Text(train, heldout, f"{name}: {sizes}"), "token"


def _ids(path: Path) -> np.ndarray:
    """The integers of a one-dimensional `.npy` file, or of a `.bin` file of 16 bits each, little
    end first, as nanoGPT writes them."""
    try:
        if path.suffix == ".npy":
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix == ".bin":
            ids = np.memmap(path, "<u2", "r")
        else:
            raise Mistake(f"--tokens {path} must end in .npy or .bin (uint16)")
    except (OSError, ValueError) as error:
        raise Mistake(f"{path} has no tokens to read ({error}): check --tokens") from None
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise Mistake(
            f"{path} holds {ids.dtype} numbers of shape {ids.shape}: expected integers along one "
            "axis"
        )
    return ids
