"""Images byte by byte: their order, their positions, what is measured, and what is drawn."""

import contextlib
import io
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import _decode, _report, transformer
from models import _pictures as pictures
from models._cli import Mistake
from models.transformer import Transformer
from tests.helpers import of_one_sign, slow
from tests.models.idx import write_mnist
from tests.models.tiny import TINY, config, optax_promotes

SHAPE = (3, 4, 2)  # rows, columns, channels
L = 24


@pytest.fixture(autouse=True)
def promoting():
    with optax_promotes():
        yield


def some(n, seed=0, top=256):
    return np.random.default_rng(seed).integers(0, top, (n, L)).astype(np.uint8)


FOUND = pictures.Pictures(some(20), some(7, 1), SHAPE, 255, "noise")


@pytest.fixture(scope="module")
def model():
    flags = ["--attention", "strided", "--stride", "8", "--attention_block", "4"]
    c = config(*flags, "--length", str(L))
    with optax_promotes():
        return Transformer(c, transformer.wide(c, SHAPE), nnx.Rngs(0))


@nnx.jit
def call(model, data):
    return model(data)


# ----------------------------------------------------------------------------------------- data


def test_a_batch_is_whole_images_behind_a_zero_and_the_step_decides():
    found = pictures.batch(FOUND, 3, seed=1, size=5)
    assert found.shape == (5, 1 + L)
    assert found.dtype == np.int32
    assert not found[:, 0].any()
    there = {image.tobytes() for image in FOUND.train}
    assert all(row.astype(np.uint8).tobytes() in there for row in found[:, 1:])
    np.testing.assert_array_equal(found, pictures.batch(FOUND, 3, seed=1, size=5))
    assert (found != pictures.batch(FOUND, 4, seed=1, size=5)).any()


def test_digits_and_idx_files(tmp_path):
    digits = pictures.load("digits")
    assert digits.shape == (8, 8, 1)
    assert digits.train.shape == (1437, 64)
    assert digits.train.max() == digits.white == 16
    folder, arrays = write_mnist(tmp_path)
    found = pictures.load(str(folder))
    assert found.shape == (4, 5, 1)
    np.testing.assert_array_equal(found.train, arrays["train-images-idx3-ubyte"].reshape(60, 20))
    np.testing.assert_array_equal(found.heldout, arrays["t10k-images-idx3-ubyte"].reshape(12, 20))


def test_cifar_is_read_pixel_by_pixel_its_channels_side_by_side(tmp_path):
    planes = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    records = np.concatenate([np.zeros((4, 1), np.uint8), planes.reshape(4, -1)], axis=1)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        (tmp_path / name).write_bytes(records.tobytes())
    found = pictures.load(str(tmp_path))
    assert found.shape == (32, 32, 3)
    assert found.train.shape == (20, 3072)
    np.testing.assert_array_equal(found.heldout[1, 3 * 33 : 3 * 33 + 3], planes[1, :, 1, 1])


def test_a_folder_that_is_not_there_is_a_mistake(tmp_path):
    with pytest.raises(Mistake, match='gone does not exist: give a folder with --images, or "digi'):
        pictures.load(str(tmp_path / "gone"))


def test_the_stride_is_a_row_and_the_window_an_image():
    c, found = transformer.load(config("--images", "digits", "--attention", "strided"))
    assert (c.stride, c.length) == (8, 64)
    assert found.shape == (8, 8, 1)
    assert transformer.load(config("--images", "digits", "--stride", "5"))[0].stride == 5


# -------------------------------------------------------------------------------------- the model


def test_each_byte_has_the_row_column_and_channel_of_the_one_it_predicts(model):
    of_byte, *places = (np.asarray(embed.embedding[...]) for embed in model.embeddings)
    assert [len(p) for p in places] == list(SHAPE)
    data = FOUND.train[:2].astype(np.int32)
    got = model.embed(jnp.asarray(data), False)
    i = 0
    for row in range(3):
        for column in range(4):
            for channel in range(2):
                want = of_byte[data[:, i]] + places[0][row] + places[1][column] + places[2][channel]
                np.testing.assert_array_equal(got[:, i], want)
                i += 1


def test_bits_per_dimension_are_those_of_all_bytes_of_whole_images(model):
    data = pictures.begun(FOUND.heldout)
    chances = np.asarray(jax.nn.log_softmax(call(model, jnp.asarray(data[:, :-1]))), np.float64)
    by_hand = -np.take_along_axis(chances, data[:, 1:, None], -1).mean() / np.log(2)
    got = pictures.heldout_bits(model, FOUND, count=10_000, size=7)
    assert got == pytest.approx(by_hand, rel=of_one_sign(7 * L))


def test_bits_of_each_place_by_hand():
    train = np.array([[0, 5], [0, 5], [1, 5]], np.uint8)
    found = pictures.Pictures(train, np.array([[0, 4]], np.uint8), (1, 2, 1), 255, "")
    want = -(np.log2(3 / 259) + np.log2(1 / 259)) / 2
    # a logarithm, twice, their sum, and its half
    assert pictures.position_bits(found) == pytest.approx(want, rel=2 * np.finfo(float).eps, abs=0)


def test_images_drawn_with_a_cache_are_the_likeliest_of_the_full_pass(model):
    made = _decode.images(model, 2, L, 0.0, seed=0)
    assert made.shape == (2, L)
    logits = call(model, jnp.asarray(pictures.begun(made)[:, :-1]))
    best = np.sort(np.asarray(logits), -1)
    sure = best[..., -1] - best[..., -2] > 1e-3  # of equal logits either may win
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(logits.argmax(-1))[sure], made[sure])


@pytest.mark.slow
def test_a_model_without_a_cache_draws_the_same_way():
    c = config("--length", str(L))
    model = Transformer(c, transformer.wide(c, SHAPE), nnx.Rngs(0))
    made = _decode.images(model, 2, L, 0.0, seed=0)
    logits = call(model, jnp.asarray(pictures.begun(made)[:, :-1]))
    np.testing.assert_array_equal(logits.argmax(-1), made)


def test_a_sheet_of_images_shows_each_at_its_place(tmp_path, monkeypatch):
    shown = []
    axes = _report.pyplot.Axes
    monkeypatch.setattr(axes, "imshow", lambda self, sheet, **_: shown.append(np.asarray(sheet)))
    four = some(4)
    _report.save_images(tmp_path / "it.png", {"a": four[:, :12]}, (3, 4, 1), 255)
    (sheet,) = shown
    assert sheet.shape == (8, 10)
    np.testing.assert_allclose(sheet[4:7, 5:9] * 255, four[3, :12].reshape(3, 4))
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("more", [slow(""), slow("--gated --attention fixed --summary 2")])
def test_the_recipe_learns_digits_and_draws_some(tmp_path, more):
    flags = ["--images", "digits", "--attention", "strided", "--attention_block", "8"]
    flags += ["--steps", "60", "--batch", "8", "--out", str(tmp_path), *more.split()]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert transformer.main([*TINY, *flags, "--heldout_bytes", "2000"]) == 0
    assert "bits/dim on held-out images" in printed.getvalue()
    models = json.loads((tmp_path / "transformer.json").read_text())["models"]
    found = types.SimpleNamespace(
        **{k.split(",")[0].replace("-", "_"): v for k, v in models.items()}
    )
    assert found.block_sparse["bits/dim"] < 4.1  # log2(17): a uniform draw of its 17 shades
    assert (tmp_path / "transformer-samples.png").read_bytes().startswith(b"\x89PNG")
