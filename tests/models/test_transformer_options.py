"""What flags add to the decoder: each against what it is said to equal."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax.nnx
from models import _decode, transformer
from models import _sparse_attention as sparse_attention
from models._cli import Mistake
from models._language import generate
from models._steps import accumulated, mean_bits
from models.transformer import Run, Transformer
from tests.helpers import of_one_sign, slow
from tests.models.tiny import TERMS, config, optax_promotes
from tests.transformer.oracle import assert_close

L = 16  # positions
CHUNKS = "chunks --window 4"


@pytest.fixture(autouse=True)
def promoting():
    with optax_promotes():  # so do the norms of Flax, of bfloat16
        yield


def flags(line):
    return config("--attention_block", "4", "--window", "5", "--stride", "4", *line.split())


@functools.cache
def model_of(line):
    c = flags(line)
    return Transformer(c, transformer.wide(c), nnx.Rngs(0))


@nnx.jit
def call(model, data):
    return model(data)


@nnx.jit
def read(model, data):
    return model(data, decode=True)


def some(rows=2, length=L):
    return jax.random.randint(jax.random.key(7), (rows, length), 0, 256)


# --------------------------------------------------------------------------------- the patterns

SEEN = {  # (q, k) with k <= q, head -> whether it is seen
    "causal": lambda q, k, h: True,
    "window": lambda q, k, h: q - k < 5,
    "window_sinks --sinks 2": lambda q, k, h: q - k < 5 or k < 2,
    "local_global --sinks 2": lambda q, k, h: q - k < 5 or k < 2 or q < 2,
    "chunks": lambda q, k, h: q // 5 == k // 5,
    "strided": lambda q, k, h: q - k < 4 or (q - k) % 4 == 0,
    "strided --per_head": lambda q, k, h: q - k < 4 if h == 0 else (q - k) % 4 == 0,
    "fixed --summary 1": lambda q, k, h: q // 4 == k // 4 or k % 4 == 3,
    "fixed --summary 2 --per_head": lambda q, k, h: q // 4 == k // 4 if h == 0 else k % 4 > 1,
    "dilated --dilation 2": lambda q, k, h: (q - k) % 2 == 0 and q - k < 10,
}


@pytest.mark.parametrize("line", SEEN)
def test_a_pattern_shows_the_keys_that_it_is_said_to_show(line):
    c = flags(f"--attention {line}")
    found = sparse_attention.options(c, 2, 0)["mask"]
    q, k = np.arange(L)[:, None], np.arange(L)[None]
    some, _ = found.blocks((L, L), 4)
    for head in range(2):
        want = [[j <= i and SEEN[line](i, j, head) for j in range(L)] for i in range(L)]
        np.testing.assert_array_equal(np.asarray(found(head, q, k)) & np.ones((L, L), bool), want)
        blocks = some if some.ndim == 2 else some[head]
        needed = np.array(want).reshape(4, 4, 4, 4).any((1, 3))
        assert (blocks >= needed).all()


def test_every_pattern_is_a_choice_and_tested():
    tested = {line.split()[0] for line in SEEN}
    assert {"dense", "bigbird", "top_blocks", *tested} == set(sparse_attention.PATTERNS)


def test_bigbird_has_a_window_first_blocks_and_random_ones_other_in_each_layer():
    c = flags("--attention bigbird --length 160 --window 4 --random_blocks 2")
    one, two = (sparse_attention.options(c, 2, layer)["pattern"].mask() for layer in range(2))
    row, col = np.indices(one.shape)
    assert one.shape == (40, 40)
    assert not one[col > row].any()
    assert one[(col <= row) & ((row - col <= 1) | (col == 0))].all()
    assert (one != two).any()
    counts = one[5:-1].sum(1)
    assert counts.min() >= 3
    assert counts.max() <= 5
    assert sparse_attention.stored(c, 2) == one.sum() / (40 * 41 / 2)


def test_of_chosen_blocks_the_share_that_could_be_stored_is_told():
    """Four queries of a block choose two each: eight blocks, or all that there are before it."""
    c = flags("--attention top_blocks --top_blocks 2 --length 160")
    assert sparse_attention.stored(c, 2) == sum(min(i, 8) for i in range(1, 41)) / (40 * 41 / 2)


def test_one_chosen_block_is_the_own_one():
    """So it is attention in chunks, in a model of the same weights."""
    models = (model_of(f"--attention {name}") for name in ("top_blocks --top_blocks 1", CHUNKS))
    one, other = (call(model, some()) for model in models)
    assert_close(one, other, TERMS)


def test_two_steps_of_the_strided_pattern_reach_everything_before():
    see = sparse_attention.options(flags("--attention strided"), 2, 0)["mask"]
    once = np.asarray(see(0, np.arange(L)[:, None], np.arange(L)[None])).astype(int)
    np.testing.assert_array_equal(once @ once > 0, np.tri(L, dtype=bool))


def test_more_columns_than_a_chunk_has_are_refused():
    with pytest.raises(Mistake, match="--summary 5 columns do not fit into a chunk of --stride 4"):
        sparse_attention.options(flags("--attention fixed --summary 5"), 2, 0)


def test_heads_that_parts_do_not_divide_are_refused():
    with pytest.raises(Mistake, match="--per_head gives 2 parts of the pattern to heads in turn"):
        sparse_attention.options(flags("--attention strided --per_head"), 3, 0)


def test_causal_blocks_are_the_attention_of_the_dense_model():
    """Against `jax.nn.dot_product_attention`, with the same weights: q, k and v in one product."""
    blocks, whole = (model_of(f"--sparse none --attention {name}") for name in ("causal", "dense"))
    whole = nnx.clone(whole)
    for ours, theirs in zip(blocks.blocks, whole.blocks, strict=True):
        parts = [ours.attention.query, ours.attention.key, ours.attention.value]
        theirs.qkv.kernel[...] = jnp.concatenate([p.kernel[...] for p in parts], axis=1)
        theirs.qkv.bias[...] = jnp.concatenate([p.bias[...] for p in parts])
        pairs = {"projection": ours.attention.out, "up": ours.up, "down": ours.down}
        for name, layer in pairs.items():
            getattr(theirs, name).kernel[...] = layer.kernel[...]
    whole.head.kernel[...] = blocks.head.kernel[...]
    for a, b in zip(whole.embeddings, blocks.embeddings, strict=True):
        a.embedding[...] = b.embedding[...]
    assert_close(call(blocks, some()), call(whole, some()), TERMS)


@pytest.mark.parametrize(
    "attention",
    [
        "top_blocks --top_blocks 2",
        slow("window"),
        slow("strided --per_head"),
        slow("bigbird --random_blocks 1"),
        slow("fixed --summary 1"),
    ],
)
def test_the_future_changes_nothing_and_decoding_is_the_full_pass(attention):
    model = model_of(f"--attention {attention} --length 16")
    data = some()
    want, other = (call(model, d) for d in (data, data.at[:, 9].set((data[:, 9] + 1) % 256)))
    np.testing.assert_array_equal(want[:, :9], other[:, :9])
    assert (jnp.abs(want - other).max((0, 2))[9] > 1e-4).all()

    model = nnx.clone(model)
    model.init_cache(2, L)
    chunks = np.split(data, [5, *range(6, L)], axis=1)
    got = jnp.concatenate([read(model, jnp.asarray(chunk)) for chunk in chunks], axis=1)
    assert_close(got, want, TERMS)


@pytest.mark.slow
def test_generated_text_is_that_of_the_full_pass_and_goes_on_behind_the_cache():
    model = model_of("--attention window --length 16")
    how = {"length": L, "temperature": 0.0, "seed": 0}
    assert _decode.generate(model, "a", count=12, **how) == generate(model, "a", count=12, **how)
    assert len(_decode.generate(model, "a", count=30, **how).encode()) >= 30


# ------------------------------------------------------------------------------------- the rest


@pytest.mark.slow
def test_a_gated_model_has_as_many_parameters_and_a_gate():
    c = flags("--gated")
    sparse = transformer.wide(c)
    assert abs(sparse.hidden / (8 / 3 * 32) - 1) < 0.2
    narrow = transformer.narrower(c, sparse)
    counts = [transformer.parameters(c, size) for size in (sparse, narrow)]
    assert abs(counts[1] / counts[0] - 1) < 0.02
    block = model_of("--gated").blocks[0]
    x = jax.random.normal(jax.random.key(0), (2, 3, 32))
    by_hand = jax.nn.sigmoid(block.gate(x)) * block.gate(x) * block.up(x)
    np.testing.assert_array_equal(block.mlp(x), block.down(by_hand))


@pytest.mark.parametrize(
    ("line", "kinds"),
    [
        ("--sparse none", (0, 4)),
        ("--sparse mlp", (2, 2)),
        ("--sparse none --attention causal", (0, 6)),
        ("--attention causal", (6, 0)),
    ],
)
def test_which_layers_are_sparse_and_that_the_others_are_sampled(line, kinds):
    sampled = "" if line == "--attention causal" else "--sample 0.5"
    model = model_of(f"{line} {sampled}")
    blocks = [f for _, f in nnx.iter_modules(model) if isinstance(f, bsjax.nnx.BlockLinear)]
    taken = [f for _, f in nnx.iter_modules(model) if isinstance(f, bsjax.nnx.SampledLinear)]
    assert (len(blocks), len(taken)) == kinds
    assert type(model.head) is nnx.Linear


@pytest.mark.slow
def test_a_sampled_model_samples_in_training_and_is_exact_after_it():
    c = flags("--sparse none --sample 0.5")
    size = transformer.wide(c)
    exact = Transformer(c, size._replace(sample=0.0), nnx.Rngs(0))
    model = Transformer(c, size, nnx.Rngs(0))
    drawn = [call(model, some()) for _ in range(2)]
    assert jnp.abs(drawn[0] - drawn[1]).max() > 1e-3
    model.eval()
    np.testing.assert_array_equal(call(model, some()), call(exact, some()))


value_and_grad = nnx.jit(nnx.value_and_grad(mean_bits))


def gradient(model, data):
    """With the state that sampling leaves behind."""
    value, found = value_and_grad(model, data)
    return value, found, nnx.state(model, nnx.RngState)


@pytest.mark.slow
@pytest.mark.parametrize("line", ["--attention window", "--sparse mlp --sample 0.5"])
def test_remat_changes_no_gradient(line):
    models = [nnx.clone(model_of(f"{line} {more}")) for more in ("", "--remat")]
    (one, first, left), (two, second, right) = (gradient(m, some(6, L + 1)) for m in models)
    assert one == two
    for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True):
        assert_close(a, b, TERMS + 6 * L)  # and over all bytes
    for a, b in zip(*map(jax.tree.leaves, (left, right)), strict=True):
        assert (a == b).all()


def test_remat_keeps_less():
    """The residuals of the backward pass, beside parameters and data."""

    def kept(more):
        model = model_of(f"--attention window {more}")
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params):
            return mean_bits(nnx.merge(graph, params, rest, copy=True), some(2, L + 1))

        pull = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept("--remat") < 0.75 * kept("")


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model, data = nnx.clone(model_of("--attention window")), some(6, L + 1)
    value, want, _ = gradient(model, data)
    parts = nnx.jit(lambda model, data: accumulated(mean_bits, model, data, 3))
    total, found = parts(model, data)
    assert total == pytest.approx(float(value), rel=of_one_sign(6 * L))
    for a, b in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        assert_close(a, b, TERMS + 6 * L)  # and over all bytes


@pytest.mark.slow
def test_an_accumulated_sample_is_another_in_each_part():
    model = nnx.clone(model_of("--sparse none --sample 0.5"))
    before = int(model.blocks[0].up.rngs.count[...])
    nnx.jit(lambda model, data: accumulated(mean_bits, model, data, 3))(model, some(6, L + 1))
    assert int(model.blocks[0].up.rngs.count[...]) == before + 3


@pytest.mark.parametrize("line", ["--attention window", slow("--gated")])
def test_bfloat16_is_computed_in_and_float32_is_kept(line):
    c = flags(f"{line} --dtype bfloat16 --steps 2")
    run = Run.start(c, transformer.wide(c))
    exact = model_of(line)
    x = jax.eval_shape(lambda: run.model.blocks[0](run.model.embed(some(), False)))
    assert x.dtype == jnp.bfloat16
    logits, want = call(run.model, some()), call(exact, some())
    assert logits.dtype == jnp.float32
    # some ten products one after another, each rounded to 8 bits
    assert 0 < jnp.abs(logits - want).max() < 10 * 2**-8 * jnp.abs(want).max()
    for leaf in jax.tree.leaves(nnx.state(run)):  # moments too
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.uint32)
    gradients = nnx.eval_shape(nnx.grad(mean_bits), run.model, some(2, L + 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


MISTAKES = {
    "--sample 0.5": "--sample is of dense layers, and all are block-sparse: add --sparse mlp",
    "--sparse none": "nothing is sparse: give --attention or --sample, or another --sparse",
    "--sparse none --sample 0.5 --sample_block 3": r"--width 32 is no multiple of --sample_block",
    "--batch 3 --accumulate 2": r"--batch 3 is no multiple of --accumulate \(2\): try 2 or 4",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_flags_that_do_not_fit_are_refused(line):
    with pytest.raises(Mistake, match=MISTAKES[line]):
        transformer.check(dataclasses.replace(flags(line)))
