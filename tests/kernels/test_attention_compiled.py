"""Attention kernels compile to machine code for an H200, without one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import bsjax
from bsjax import masks
from tests.kernels import h200
from tests.kernels.attention import Case, kernels
from tests.kernels.attention_cases import ALIBI, CAUSAL, SEGMENTS
from tests.kernels.test_compiled import toolchain  # noqa: F401

pytestmark = pytest.mark.h200
bf16, f16, i32 = jnp.bfloat16, jnp.float16, jnp.int32

EVERYTHING = {
    **SEGMENTS,
    "softcap": 30.0,
    "keys": 16_000,
    "mask": lambda head, q, k: (q >= k) & (q - k < 1000 * (1 + head)),
}
STRIDED = {"mask": lambda head, q, k: (q >= k) & ((q - k) % 128 == 0)}
# bytes of registers that JAX 0.11 finds no room for in dk and dv of heads of 128, with a mask
FEW = 80 if jax.__version_info__ < (0, 12) else 0
LONG = Case(heads=(8, 8), blocks=(128, 128), block=(128, 128), d=128, scores=CAUSAL)


@pytest.fixture(autouse=True)
def compile_everything():
    jax.clear_caches()  # what was compiled before is not dumped again


def variants():
    """One or two at a time from what is most common: 16k tokens, causal, heads of 128."""

    def case(**changes):
        changes = {"block": (128, 128), **changes}
        blocks = tuple(16384 // side for side in changes["block"])
        return dataclasses.replace(LONG, blocks=blocks, **changes)

    yield pytest.param(case(), bf16, id="heads of 128")
    yield pytest.param(case(block=(64, 64), d=64, scores={}), bf16, id="blocks of 64, heads of 64")
    everything = {"scores": EVERYTHING, "sinks": True, "lists": "element"}
    yield pytest.param(case(**everything), f16, id="everything")
    yield pytest.param(case(d=64, scores=STRIDED), bf16, id="strided", marks=pytest.mark.slow)
    features = {
        "dropout": {"rate": 0.1},
        "masks by slot": {"masks": ("rows", "columns", "all"), "lists": "element"},
        "bias": {"scores": {**CAUSAL, "bias": ALIBI}},
        "numbers by slot": {"numbers": True},
    }
    quick = {(64, "masks by slot"), (128, "dropout")}
    for d in (64, 128):
        for name, options in features.items():
            one, marks = case(d=d, **options), () if (d, name) in quick else pytest.mark.slow
            yield pytest.param(one, bf16, id=f"heads of {d}, {name}", marks=marks)
    shapes = [((64, 64), (8, 8)), ((64, 128), (8, 2)), ((128, 128), (8, 2))]
    for d in (32, 64, 96, 128, 192, 256):
        for block, heads in shapes:
            for name, options in {"": {}, "everything": everything}.items():
                id = f"{d}, {block[0]} x {block[1]}, heads {heads} {name}"
                one = case(d=d, block=block, heads=heads, **options)
                yield pytest.param(one, bf16, id=id, marks=pytest.mark.slow)


@pytest.mark.parametrize(("case", "dtype"), [*variants()])
def test_attention_and_its_gradients(case, dtype):
    kernels_ = compiled(case, dtype)
    assert len(kernels_) == 3
    for kernel in kernels_:
        assert kernel.wgmma, kernel
        assert kernel.tma, kernel
        assert not kernel.serialized, kernel
        # gradients of the largest heads keep some numbers in memory
        assert kernel.spilled <= FEW or (case.d == 256 and kernel.spilled < 2048), kernel


def test_bsjax_attention():
    """With a pattern that is data, and a derivative."""
    place, mask = h200.mesh(), masks.causal() & masks.window(2047)
    given = functools.partial(h200.argument, place)
    e = 128 * 17

    def step(q, k, v, dy, row, col, full):
        p = bsjax.BlockPattern(row, col, (128, 128), (128, 128))
        options = {"mask": mask, "full": full, "implementation": "mosaic"}
        y, pull = jax.vjp(lambda q, k, v: bsjax.attention(q, k, v, p, **options), q, k, v)
        return y, *pull(dy)

    args = [given((2, 16384, heads, 128), bf16) for heads in (8, 2, 2, 8)]
    args += [given((e,), i32), given((e,), i32), given((e,), jnp.bool_)]
    program, found = h200.compiled(step, *args)
    assert len(found) == 3
    assert program.as_text().count('custom_call_target="mosaic_gpu') == 3
    assert all(kernel.wgmma and kernel.spilled <= FEW for kernel in found), found
    # lists and numbers for each query; no array of queries times keys
    assert program.memory_analysis().temp_size_in_bytes < 200e6


def compiled(case, dtype):
    place, (q, k), (h, g) = h200.mesh(), case.lengths, case.heads
    e = round(0.1 * case.blocks[0] * case.blocks[1])
    lists = {"one": 1, "head": h, "element": case.n * h}[case.lists]
    limits = [(case.n,)] * case.spec.lengths + [(case.n, q), (case.n, k)] * case.spec.segments
    br, bc = case.block
    ends = {"rows": (1, br), "columns": (bc // 32, 1), "all": (bc // 32, br)}
    flipped = {"rows": (br // 32, 1), "columns": (1, bc), "all": (br // 32, bc)}

    def given(shape, dtype):
        return h200.argument(place, shape, dtype)

    args: list[Any] = [
        given((case.n, q, h, case.d), dtype),
        *[given((case.n, k, g, case.d), dtype)] * 2,
    ]
    args += [args[0], given((h,), jnp.float32) if case.sinks else None]
    args += [given((lists, e), kind) for kind in (i32, i32, jnp.bool_)]
    args.append([])
    for of_words in (ends, flipped):
        shapes = limits + [(case.n, h, e, *of_words[kind]) for kind in case.masks]
        arrays = [given(shape, i32) for shape in shapes]
        arrays += [given((case.n, h, e), jnp.float32)] * case.numbers
        arrays += [given((2, case.n, h, q), i32)] * (case.rate > 0)
        args[-1].append(arrays)
    _, found = h200.compiled(kernels(case, 132), *args)
    assert max(h200.shared_memory()) <= 232_448
    return found
