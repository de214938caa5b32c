"""GPT-2 is the paper's, whatever file it comes from, and a file that holds none says why."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import bsjax.nnx
from models import _gpt2
from models._cli import Mistake
from tests.models import gpt2 as files
from tests.models.stories import one_line

IDS = np.random.default_rng(1).integers(0, 37, (2, 13)).astype(np.int32)
EPS = float(np.finfo(np.float32).eps)
# two layers of five products in a row, whose longest sum over 40 numbers, 24 of them in the end
TERMS = 2 * 5 * 40 + 24


@nnx.jit
def run(model, ids):
    return model(ids)


def close(model, made, heads=3, epsilon=1e-3, activation="gelu_new", unit=1.0):
    want = files.logits(made, IDS, heads, epsilon, activation)
    got = np.asarray(run(model, IDS))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=unit * EPS * TERMS * np.abs(want).std())


@pytest.mark.parametrize(
    ("prefix", "dtype", "shards"),
    [("", "float32", 1), ("transformer.", "float16", 1), ("transformer.", "bfloat16", 3)],
)
def test_a_file_gives_the_logits_of_the_paper(tmp_path, prefix, dtype, shards):
    made = files.rounded(files.tensors(), dtype)
    path = files.write(tmp_path, made, prefix=prefix, shards=shards)
    model, size = _gpt2.load(path)
    assert size == _gpt2.Size(37, 20, 24, 40, 2, 3, 1e-3, "gelu_new")
    close(model, made)
    folder, _ = _gpt2.load(tmp_path)
    for a, b in zip(
        jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(folder)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_buffers_of_old_files_and_the_tied_output_are_no_parameters(tmp_path):
    made = files.tensors()
    more = {"transformer.h.0.attn.bias": np.ones((1, 1, 20, 20), np.float32)}
    more |= {"transformer.h.1.attn.masked_bias": np.float32([-1e4])}
    more |= {"lm_head.weight": made["wte.weight"]}
    model, _ = _gpt2.load(files.write(tmp_path, made, prefix="transformer.", **more))
    close(model, made)


def test_flags_say_what_no_config_says(tmp_path):
    made = files.tensors()
    path = files.write(tmp_path, made, config=None)
    model, size = _gpt2.load(path, heads=3, epsilon=1e-3)
    assert size.heads == 3
    close(model, made)
    _, size = _gpt2.load(path, heads=4)
    assert (size.heads, size.epsilon, size.activation) == (4, 1e-5, "gelu_new")


def test_gelu_of_the_error_function_if_the_config_says_so(tmp_path):
    made = files.tensors(layers=1)
    path = files.write(tmp_path, made, config=files.CONFIG | {"activation_function": "gelu"})
    close(_gpt2.load(path)[0], made, activation="gelu")


def test_large_means_cost_no_more_than_their_rounding(tmp_path):
    """E[x^2] - E[x]^2 would err by mean^2 eps where this errs by mean eps."""
    made, mean, deviation = files.tensors(), 300.0, 0.4
    made["wpe.weight"] += np.float32(mean)
    close(_gpt2.load(files.write(tmp_path, made))[0], made, unit=mean / deviation)


def test_a_token_changes_nothing_before_it(tmp_path):
    model, _ = _gpt2.load(files.write(tmp_path, files.tensors()))
    changed = IDS.copy()
    changed[:, 8] = (changed[:, 8] + 1) % 37
    a, b = (np.asarray(run(model, ids)) for ids in (IDS, changed))
    np.testing.assert_array_equal(a[:, :8], b[:, :8])
    assert (np.abs(a - b).max((0, 2))[8:] > 1e-3).all()


def test_it_is_made_of_parts_of_bsjax(tmp_path):
    model, _ = _gpt2.load(files.write(tmp_path, files.tensors()))
    assert all(type(one) is bsjax.nnx.BlockTransformerLayer for one in model.layers)
    other, _ = _gpt2.load(tmp_path)
    assert nnx.graphdef(model) == nnx.graphdef(other)  # equal sizes share one compilation


def without(made, name):
    return {key: array for key, array in made.items() if key != name}


def wrong(made):
    """What is wrong with a file, and what is said about it."""
    bias = "h.1.mlp.c_fc.bias"
    return {
        "missing": (without(made, bias), rf"lacks {bias}: it does not hold a GPT-2 of 2 layers"),
        "unknown": (made | {"h.0.x": made[bias]}, "has unknown h.0.x: it does not hold a GPT-2"),
        "none": ({"x": made[bias]}, "has no matrix wte.weight: it does not hold a GPT-2"),
        "shape": (
            made | {bias: made[bias][:-1]},
            rf"{bias} in .* has shape \(39,\), expected \(40",
        ),
        "dtype": (
            made | {bias: made[bias].astype(np.int8)},
            rf"{bias} in .* holds I8 numbers, expected one of F64, F32, F16, BF16",
        ),
        "untied": (
            made | {"lm_head.weight": 2 * made["wte.weight"]},
            "output layer lm_head.weight in .* is not the embedding",
        ),
    }


@pytest.mark.parametrize("name", wrong(files.tensors()))
def test_a_file_without_a_gpt2_says_what_is_wrong(tmp_path, name):
    made, message = wrong(files.tensors())[name]
    with one_line(message):
        _gpt2.load(files.write(tmp_path, made))


CONFIGS = {
    "activation": ({"activation_function": "swish9"}, "'swish9': supported are gelu_new, gelu_pyt"),
    "scale": ({"scale_attn_by_inverse_layer_idx": True}, "idx True: only False is supported"),
    "type": ({"model_type": "llama"}, "says model_type 'llama': only 'gpt2' is supported"),
    "heads": ({"n_head": 5}, "24 features of .* are no multiple of 5 heads"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_something_else_is_refused(tmp_path, name):
    said, message = CONFIGS[name]
    path = files.write(tmp_path, files.tensors(), config=files.CONFIG | said)
    with pytest.raises(Mistake, match=message):
        _gpt2.load(path)


def test_files_that_cannot_be_read_say_so(tmp_path):
    made = files.tensors()
    path = files.write(tmp_path, made, config=None)
    with pytest.raises(
        Mistake, match=r"no config.json beside .* says how many heads: give --heads"
    ):
        _gpt2.load(path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(Mistake, match=r"config.json is no JSON object: get it again, or remove it"):
        _gpt2.load(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(Mistake, match=r"is no safetensors file .*: it is cut off, or of another"):
        _gpt2.load(path)
    with pytest.raises(Mistake, match="nowhere does not exist: check the path given with --model"):
        _gpt2.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Mistake, match=r"no model.safetensors and no model.safetensors.index.json"):
        _gpt2.load(tmp_path / "empty")


def test_shards_that_do_not_fit_together_say_so(tmp_path):
    index = files.write(tmp_path, files.tensors(), shards=2)
    content = json.loads(index.read_text())
    places = content["weight_map"] | {"wte.weight": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(Mistake, match=r"looks for wte.weight in files that lack it"):
        _gpt2.load(index)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        Mistake, match=r"names model-00002-of-00002.safetensors, not there: get all"
    ):
        _gpt2.load(index)
    index.write_text("{}")
    with pytest.raises(Mistake, match="is no index of shards: it must be JSON with a `weight_map`"):
        _gpt2.load(index)
