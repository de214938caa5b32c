"""Attention kernels in the interpreter: races are errors, memory that nobody wrote is NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import attention_config, attention_lists
from tests.kernels.attention import arguments, compiled, conforms
from tests.kernels.attention_cases import CASES, FEATURES, MORE, MORE_FEATURES

pytestmark = pytest.mark.interpreted
bf16, f16 = jnp.bfloat16, jnp.float16


def run(case, dtype=bf16, workers=2):
    inputs = case.inputs(dtype)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        run = compiled(case, workers, stages=2)  # few, so that each is used again
        got = jax.block_until_ready(run(*arguments(case, inputs)))
    conforms(case, inputs, got)
    return got


@pytest.mark.parametrize("name", CASES)
def test_attention_and_its_gradients(name):
    run(CASES[name])


@pytest.mark.parametrize("name", FEATURES)
def test_what_is_added_masked_and_dropped(name):
    run(FEATURES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MORE, *MORE_FEATURES])
def test_more(name):
    run({**MORE, **MORE_FEATURES}[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_float16(name):
    run(CASES[name], f16, workers=3)


@pytest.mark.slow
def test_the_same_bits_again_and_for_other_workers():
    """Every sum has one place and one order, whoever computes it."""
    case = CASES["causal, shared heads"]
    for a, b in zip(run(case), run(case, workers=1), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_lists():
    """Full blocks first, each kind by its other block; spare slots nowhere."""
    own = jnp.array([[2, 0, 0, 2, 3, 0]])
    other = jnp.array([[1, 4, 2, 0, 5, 1]])
    partial = jnp.array([[False, True, False, True, True, False]])
    lists = attention_lists.of_pattern(own, other, partial, (3, 5))
    assert lists.ptr.tolist() == [[0, 2, 3, 3, 3, 4, 5]]
    assert lists.other[0, :5].tolist() == [1, 2, 4, 1, 0]


def test_work_is_shared_evenly():
    """Every tile once, few heads at a time; shares differ by the longest tile at most."""
    steps = jnp.asarray(np.random.default_rng(0).integers(0, 50, (6, 40)), jnp.int32)
    order = np.asarray(attention_lists.ordered(steps, 7))
    assert sorted(order) == list(range(240))
    flat = np.asarray(steps).ravel()
    shares = [flat[order[worker::7]].sum() for worker in range(7)]
    assert max(shares) - min(shares) <= 50
    assert set(order[:28] // 40) == {0}
    assert set(order[28:56] // 40) == {0, 1}


@pytest.mark.parametrize(
    ("arguments_", "sentence"),
    [
        (("float32", 64, (64, 64)), "there is no kernel for float32"),
        (("bfloat16", 80, (64, 64)), "heads of 80: kernels know sizes of 32, 64"),
        (("float16", 64, (64, 32)), "blocks of 64 x 32: each side must be a multiple of 64"),
    ],
)
def test_what_cannot_run(arguments_, sentence):
    assert sentence in attention_config.why_not(*arguments_)
    assert attention_config.why_not("bfloat16", 128, (64, 128)) is None


def test_configurations_fit_in_shared_memory():
    """For all that can run, with two stages at least."""
    for d in attention_config.HEADS:
        for block in [(64, 64), (128, 128), (192, 64), (256, 512)]:
            for shared in (1, 4):
                for one in (
                    attention_config.for_forward(d, block, shared=shared),
                    attention_config.for_dq(d, block, shared=shared),
                    attention_config.for_dq(d, block, shared=shared, everywhere=True, apart=True),
                    attention_config.for_dkv(d, block),
                    attention_config.for_dkv(d, block, crowded=True),
                ):
                    assert one.stages >= 2, (d, block, one)
                    assert one.slots >= 1
