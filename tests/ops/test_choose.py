"""What `auto` runs: a pure function of sizes, tested as a table, without running anything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax.ops import _choose, _mosaic, _sampled
from bsjax.ops._choose import Problem, fastest
from tests.helpers import FEW, Case, assert_close, random_mask


def problem(op="matmul", n=4096, density=0.1, block=64, blocks=32):
    return Problem(
        op=op,
        n=n,
        grid=(blocks, blocks),
        block=block if isinstance(block, tuple) else (block, block),
        capacity=round(density * blocks**2),
        dtype=jnp.float32,
    )


@pytest.mark.parametrize("op", ["matmul", "sddmm"])
@pytest.mark.parametrize("block", [8, 16, 32, 64, 128, 256])
def test_few_stored_blocks_are_worth_it_and_all_are_not(op, block):
    assert fastest(problem(op, density=0.02, block=block), "cpu") == "xla"
    assert fastest(problem(op, density=1.0, block=block), "cpu") == "dense"


@pytest.mark.parametrize("op", ["matmul", "sddmm"])
def test_one_break_even_density(op):
    """Once dense wins it wins for all larger densities, and larger blocks move that up."""
    break_even = []
    for block in (4, 8, 16, 32, 64, 128, 256):
        densities = np.linspace(0, 1, 101)
        chosen = [fastest(problem(op, density=d, block=block), "cpu") for d in densities]
        assert chosen == sorted(chosen, reverse=True)  # xla, ..., xla, dense, ..., dense
        break_even.append(chosen.index("dense"))
    assert break_even == sorted(break_even)


@pytest.mark.parametrize("op", ["matmul", "sddmm"])
def test_odd_blocks_count_by_their_shorter_side(op):
    densities = np.linspace(0, 1, 101)
    for wide, narrow in (((16, 256), 16), ((48, 64), 32), ((200, 300), 128)):
        for density in densities:
            # so many tokens and features that nothing but the products counts
            got, want = (
                fastest(problem(op, n=1 << 24, blocks=128, density=density, block=b), "cpu")
                for b in (wide, narrow)
            )
            assert got == want


def test_narrow_weights_of_many_tokens_are_dense():
    """As in 1x1 convolutions: what turning x and y around costs, so few products do not repay.
    Their dvalues need no turning."""
    for blocks, chosen in ((2, "dense"), (4, "dense"), (16, "xla")):
        given = {"n": 25088, "blocks": blocks, "density": 0.25, "block": 32}
        assert fastest(problem("matmul", **given), "cpu") == chosen
        assert fastest(problem("sddmm", **given), "cpu") == "xla"


@pytest.mark.parametrize("op", ["matmul", "sddmm"])
def test_kernels_where_they_were_measured_to_be_faster(op):
    def chosen(**sizes):
        return fastest(problem(op, **{"n": 8192, "blocks": 8192 // sizes["block"]} | sizes), "cuda")

    assert chosen(block=64, density=0.1) == chosen(block=128, density=0.5) == "mosaic"
    assert chosen(block=64, density=0.5) == chosen(block=128, density=0.7) == "dense"
    assert chosen(block=8, density=0.01) == chosen(block=64, density=0.1, n=64) == "dense"
    assert fastest(problem(op, n=8192, density=0.1), "rocm") == "dense"


def test_small_products_are_not_worth_a_loop():
    small = problem(n=600, density=0.25, block=16, blocks=8)
    assert fastest(small, "cpu") == "dense"
    assert fastest(problem(n=600, density=0.25, block=16, blocks=128), "cpu") == "xla"


def test_fewer_tokens_never_make_dense_better():
    """Scattering values into a matrix costs the same at one token as at many."""
    for density in np.linspace(0, 1, 21):
        chosen = [fastest(problem(n=n, density=density), "cpu") for n in (1, 64, 512, 4096)]
        assert chosen == sorted(chosen, reverse=True)


@pytest.mark.parametrize("n", [0, 1, 4096])
@pytest.mark.parametrize("op", ["matmul", "sddmm"])
def test_edges(op, n):
    """Nothing stored, no grid, no tokens: some answer, and no division by zero."""
    for blocks, density in ((4, 0.0), (0, 0.0), (1, 1.0)):
        assert fastest(problem(op, n, density, blocks=blocks), "cpu") in ("xla", "dense")


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_the_choice_is_what_runs(density):
    """`auto` compiles to the program of the implementation that was chosen."""
    case = Case(mask=random_mask(8, 8, density), block=16, n=FEW)
    p, x, values, _ = case.inputs()

    def program(implementation):
        f = jax.jit(lambda x, v, p: bsjax.matmul(x, v, p, implementation=implementation))
        text = f.lower(x, values, p).compile().as_text()
        return text.count("gather("), text.count("scatter"), text.count("dot(")

    chosen = fastest(problem(n=FEW, density=density, block=16, blocks=8), "cpu")
    assert program("auto") == program(chosen)
    assert program("xla") != program("dense")


def test_what_auto_stages_for_a_gpu_can_run_on_the_cpu_beside_it(monkeypatch):
    """Where there is a Hopper GPU kernels are staged, and a program may still be for the CPU."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (24, 128), (128, 64), (24, 64)
    x, w, dy = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=False))
    p = bsjax.BlockPattern.from_mask(random_mask(2, 1, 0.5), 64)

    def step(x, w, dy):
        options = {"key": keys[3], "fraction": 0.5, "block": 64}
        y, pull = jax.vjp(lambda x, w: bsjax.sampled_matmul(x, w, **options), x, w)
        return y, *pull(dy), bsjax.matmul(x, w[None, :64], p)

    want = jax.jit(step)(x, w, dy)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_mosaic, "_no_hopper", lambda device: None)
    monkeypatch.setattr(_mosaic, "several_gpus", lambda: False)
    monkeypatch.setattr(_sampled, "LEAST", 0)
    monkeypatch.setattr(_choose, "GPU_FLOPS", 0)
    monkeypatch.setitem(_choose.GPU_BREAK_EVEN["matmul"], 64, 1)
    staged = []
    for kernel in (_mosaic.gathered, _mosaic.matmul):

        def seen(*args, kernel=kernel, **options):
            staged.append(kernel.__name__)
            return kernel(*args, **options)

        monkeypatch.setattr(_mosaic, kernel.__name__, seen)
    found = jax.jit(lambda *args: step(*args))(x, w, dy)
    assert staged.count("gathered") >= 3
    assert staged.count("matmul") >= 1
    for got, one in zip(found, want, strict=True):
        assert_close(got, np.asarray(one, np.float32), 128)
    nothing = bsjax.sampled_matmul(x[:0], w, key=keys[3], fraction=0.5, block=64)
    assert nothing.shape == (0, 64)
