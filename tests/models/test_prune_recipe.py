"""The recipe from flags to saved models: what it prints is what the models on the disk give."""

import json
import math
import shlex
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax.nnx
from models import _corpus, _decoders, _prune_bench, prune
from models import _prune as pruning
from models import _text as texts
from models._cli import INTERRUPTED, Mistake
from models._language import heldout_bits
from models._train import Checkpoints
from models.transformer import Run, Size, Transformer, block_sparse, dense
from tests.helpers import of_one_sign
from tests.models import gpt2 as files
from tests.models import test_bpe as bpe
from tests.models.prune_runs import SIZES, TINY, run_main
from tests.models.stories import ctrl_c_at, one_line, way_back
from tests.models.tiny import config as transformer_config
from tests.models.tiny import optax_promotes, write_words


def lines(out):
    """The results of models by method, and the line of times."""
    found = [json.loads(line) for line in (out / "prune.jsonl").read_text().splitlines()]
    *models, times = found
    return {line["settings"]["method"]: line for line in models}, times


@pytest.fixture(scope="module")
def story(tmp_path_factory, text):
    """A small decoder is trained and pruned."""
    folder = tmp_path_factory.mktemp("story")
    out, words = folder / "out", write_words(folder, text)
    code, printed = run_main([*TINY, "--data", words, "--out", out])
    rows, times = lines(out)
    loaded = texts.load([words], 17)
    return types.SimpleNamespace(
        out=out, words=words, code=code, printed=printed, rows=rows, times=times, text=loaded
    )


@pytest.fixture(scope="module")
def gone_on(story, tmp_path_factory):
    """The same, stopped in step 7 of training and in step 5 of fine-tuning the largest blocks."""
    out = tmp_path_factory.mktemp("gone on")
    flags, found = [*TINY, "--data", story.words, "--out", out], []
    for wanted in (7, 8 + 15 + 5):
        with ctrl_c_at(wanted, _prune_bench, "train_step"):
            code, printed = run_main(flags)
        flags = way_back(prune, printed)
        found.append((code, printed, flags, sorted(path.name for path in out.iterdir())))
    code, printed = run_main(flags)
    return types.SimpleNamespace(out=out, stops=found, code=code, printed=printed, flags=flags)


def test_ctrl_c_ends_after_the_step_and_tells_the_way_back(story, gone_on):
    (first, said, flags, made), (second, then, _, later) = gone_on.stops
    assert (first, second, gone_on.code) == (INTERRUPTED, INTERRUPTED, 0)
    assert f"Stopped. Results and checkpoints are in {gone_on.out}; go on with" in said
    assert "--resume" in flags
    assert made == ["prune-checkpoint-training"]
    assert "training dense: going on from step 7." in then
    assert "fine-tuning magnitude 0.5: going on from step 5." in gone_on.printed
    kept = {"prune-checkpoint-training", "prune-dense.safetensors", "prune.jsonl"}
    assert set(later) == kept | {"prune-checkpoint-magnitude-0.5"}
    assert {path.name for path in gone_on.out.iterdir()} == kept | {
        path.name for path in story.out.iterdir()
    }
    assert f"dense: in {gone_on.out / 'prune.jsonl'} already" in gone_on.printed


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(story, gone_on):
    rows, _ = lines(gone_on.out)
    for name, line in story.rows.items():
        assert rows[name]["result"] == line["result"]
        assert rows[name]["settings"] == line["settings"]
    for path in story.out.glob("*.safetensors"):
        assert (gone_on.out / path.name).read_bytes() == path.read_bytes()


def test_what_is_known_is_not_trained_again(gone_on, monkeypatch):
    monkeypatch.setattr(_prune_bench, "train_step", None)
    code, printed = run_main(gone_on.flags)
    assert code == 0
    for name in ("dense", "magnitude 0.5", "random 0.5"):
        assert f"{name}: in {gone_on.out / 'prune.jsonl'} already" in printed


def test_going_on_with_something_else_is_refused(gone_on):
    with one_line(r"prune-checkpoint-training/15 has --batch 2, this run 3: give what it was made"):
        run_main([*gone_on.flags, "--batch", 3])


def loss(model, story):
    with optax_promotes():
        return heldout_bits(model, story.text.heldout, count=64, length=16, size=8)


def test_it_prints_and_draws(story):
    assert story.code == 0
    expected = ("dense", "magnitude 0.5", "random 0.5", "bits/byte, 15 steps more", "perplexity")
    assert [part in story.printed for part in expected] == [True, True, True, True, False]
    for row in story.rows.values():
        assert f"{row['result']['loss']:.3f}" in story.printed
        assert f"{row['result']['tuned']:.3f}" in story.printed
    assert (story.out / "prune-patterns.png").read_bytes().startswith(b"\x89PNG")


def test_losses_are_those_of_the_models_on_the_disk(story):
    of = {name: line["result"] for name, line in story.rows.items()}
    given = _decoders.load(story.out / "prune-dense.safetensors").model
    assert loss(given, story) == of["dense"]["loss"]
    found = pruning.weights(given, 8)
    kept = pruning.by_magnitude(found, 0.5)
    drawn = pruning.at_random(found, kept, seed=0)
    assert loss(pruning.pruned(given, kept, 8), story) == of["magnitude"]["loss"]
    assert loss(pruning.pruned(given, drawn, 8), story) == of["random"]["loss"]
    tuned = _decoders.load(story.out / "prune-magnitude-0.5.safetensors").model
    assert loss(tuned, story) == of["magnitude"]["tuned"]
    assert len({round(one[k], 6) for one in of.values() for k in ("loss", "tuned")}) == 6
    # fine-tuning moves values and no block
    for name, layer in pruning.linears(tuned).items():
        np.testing.assert_array_equal(layer.pattern.get_value().mask(), kept[name])
    assert all(one["tuned"] < one["loss"] < 8 for one in of.values())


def test_the_lines_say_what_was_done(story):
    for name, line in story.rows.items():
        assert {"command", "commit", "python", "jax", "flax", "safetensors"} <= set(line["where"])
        assert line["settings"]["seed"] == 0
        assert line["settings"]["text"] == story.text.digest
        assert line["result"]["stored"] == (1 if name == "dense" else 0.5)
    assert set(story.times["result"]) == {"dense", "magnitude 0.5"}
    assert all(len(seconds) == 1 for seconds in story.times["result"].values())
    linear = 16 * 16 * (3 + 1 + 4 + 4)
    counts = [story.rows[name]["result"]["parameters"] for name in ("dense", "magnitude")]
    assert counts[0] - counts[1] == linear / 2


def test_a_pruned_model_is_read_back_bitwise_and_pruned_further(story, tmp_path):
    path = story.out / "prune-magnitude-0.5.safetensors"
    flags = [*shlex.split(SIZES), "--densities", 0.25, "--steps", 0, "--criteria", "magnitude"]
    flags += ["--model", path, "--data", story.words, "--out", tmp_path, "--scope", "global"]
    code, printed = run_main(flags)
    rows, _ = lines(tmp_path)
    assert code == 0
    assert "another text" not in printed
    assert set(rows) == {"as given", "magnitude"}
    assert rows["as given"]["result"]["stored"] == 0.5
    assert rows["as given"]["result"]["loss"] == story.rows["magnitude"]["result"]["tuned"]
    assert rows["magnitude"]["result"]["tuned"] is None
    assert rows["magnitude"]["result"]["stored"] == 0.25
    # saved again, it is the same file
    decoder = _decoders.load(path)
    assert (decoder.trained_on, decoder.batches) == (story.text.digest, 30)
    _decoders.save(tmp_path / "again.safetensors", decoder)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_the_dense_model_of_a_checkpoint_is_read(tmp_path):
    config = transformer_config()
    with optax_promotes():
        run = Run.start(config, Size(16, 40, dense))
    sparse = Transformer(config, Size(16, 40, block_sparse), nnx.Rngs(0))
    runs = {"block-sparse": {"model": nnx.state(sparse)}, "dense": nnx.state(run)}
    about = {"--layers": 1, "--heads": 2, "--width": 32, "a text with the hash": "abc"}
    saved = Checkpoints(tmp_path / "checkpoint", about)
    saved.save(3, runs, None)
    saved.close()
    decoder = _decoders.load(tmp_path / "checkpoint")
    assert (decoder.trained_on, decoder.batches) == ("abc", 3)
    assert type(decoder.model) is Transformer
    wanted = run.model
    assert nnx.graphdef(decoder.model) == nnx.graphdef(wanted)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (decoder.model, wanted)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_without_one_says_so(tmp_path):
    saved = Checkpoints(tmp_path / "checkpoint", {})
    saved.save(3, {"dense": {"x": jnp.ones(3)}}, None)
    saved.close()
    with pytest.raises(Mistake, match=r"the checkpoint in .* has no dense decoder: make one with"):
        _decoders.load(tmp_path / "checkpoint")
    (tmp_path / "empty" / "3").mkdir(parents=True)
    with pytest.raises(Mistake, match=r"the checkpoint in .*empty cannot be read"):
        _decoders.load(tmp_path / "empty")


# ------------------------------------------------------------------------------------ of GPT-2


def nats(made, ids, length, count):
    """The mean loss over the second half of `count` windows, in float64."""
    windows = texts.spread(ids, count, length)
    logits = files.logits(made, windows[:, :-1], 3, 1e-3)
    rows, columns = np.indices(windows[:, 1:].shape)
    top = logits.max(-1, keepdims=True)
    logs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -logs[rows, columns, windows[:, 1:]][:, length // 2 :].mean()


def test_a_gpt2_is_measured_in_nats_of_its_tokens(tmp_path):
    made = files.tensors(layers=1)
    path = files.write(tmp_path / "model", made)
    ids = np.random.default_rng(2).integers(0, 37, 400).astype(np.uint16)
    ids[360:].tofile(tmp_path / "held.bin")
    np.save(tmp_path / "train.npy", ids[:360])
    flags = [*shlex.split(SIZES), "--heldout", 32, "--steps", 0, "--model", path]
    flags += ["--criteria", "magnitude"]
    tokens = ["--tokens", tmp_path / "train.npy", tmp_path / "held.bin"]
    code, printed = run_main([*flags, *tokens, "--out", tmp_path])
    assert code == 0
    rows, _ = lines(tmp_path)
    got = rows["dense"]["result"]["loss"]
    # sums of five products over 40 numbers and one over 24 in a row, and over 4 windows' ends
    terms = 5 * 40 + 24 + 4 * 8
    assert got == pytest.approx(nats(made, ids[360:], 16, 4), rel=of_one_sign(terms))
    assert "perplexity" in printed
    assert f"{math.exp(got):,.0f}" in printed
    saved = _decoders.load(tmp_path / "prune-magnitude-0.5.safetensors")
    assert saved.kind == "gpt2"
    assert type(saved.model.layers[0].mlp) is bsjax.nnx.BlockMLP
    want = pruning.pruned(
        _decoders.load(path).model,
        pruning.by_magnitude(pruning.weights(_decoders.load(path).model, 8), 0.5),
        8,
    )
    assert nnx.graphdef(saved.model) == nnx.graphdef(want)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (saved.model, want)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_of_one_file_of_tokens_the_end_is_held_out(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(1000) % 50)
    text, unit = _corpus.load(50, 20, tokens=[tmp_path / "ids.npy"])
    assert unit == "token"
    np.testing.assert_array_equal(text.train, np.arange(900) % 50)
    np.testing.assert_array_equal(text.heldout, np.arange(900, 1000) % 50)
    assert "900 tokens to train on, 100 held out (the last 10%)" in text.about


def test_a_text_is_cut_by_the_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"a low newest " * 50)
    bpe.write(tmp_path, bpe.vocabulary(), bpe.MERGES)
    data = [tmp_path / "text.txt"]
    text, unit = _corpus.load(300, 20, data=data, tokenizer=tmp_path)
    assert unit == "token"
    raw = texts.load(data, 20)
    np.testing.assert_array_equal(text.train, bpe.encoder()(raw.train.tobytes().decode()))
    np.testing.assert_array_equal(text.heldout, bpe.encoder()(raw.heldout.tobytes().decode()))
    raw, unit = _corpus.load(256, 20, data=data)
    assert unit == "byte"
    assert raw.train.dtype == np.uint8
