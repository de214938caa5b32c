"""The data parallel recipe: sampled rows are all that is summed, and all that there is to sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models import data_parallel
from models._cli import Mistake, parse
from models.data_parallel import Config, exchange_all, exchange_sampled, gradients, mesh_of

SMALL = ["--width", "32", "--batch", "4", "--steps", "2", "--block", "4"]


def test_the_sum_of_sampled_rows_is_the_sum():
    """Against the gradients of each device's own batch, one by one."""
    config = parse(Config, SMALL, command="it")
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(32, 32)), jnp.float32) for _ in range(2))
    weights = [jnp.asarray(rng.normal(size=(32, 32)) / 6, jnp.float32) for _ in range(2)]
    keys = jax.random.split(jax.random.key(0), 2)
    mesh = mesh_of(8)
    got, whole = (
        jax.jit(gradients(config, mesh, exchange))(weights, x, y, keys)
        for exchange in (exchange_sampled, exchange_all)
    )

    def loss(weights, x, y):
        off = data_parallel.network(config, weights, x, keys) - y
        return jnp.mean(jnp.square(off)) / 8

    one = jax.jit(jax.grad(loss))
    alone = [one(weights, x[i : i + 4], y[i : i + 4]) for i in range(0, 32, 4)]
    for ours, theirs, *each in zip(got[1], whole[1], *alone, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert (np.any(ours != 0, axis=1)).sum() == 8  # a quarter
        want = np.sum([np.asarray(a, np.float64) for a in each], axis=0)
        np.testing.assert_allclose(ours, want, atol=1e-5 * abs(want).max())


def test_counts_what_is_summed(capsys):
    assert data_parallel.main([*SMALL, "--fraction", "0.25"]) == 0
    printed = capsys.readouterr().out
    loss = 4  # which is summed as well
    assert f"{2 * 32 * 32 * 4 + loss:,}" in printed
    assert f"{2 * 8 * 32 * 4 + loss:,}" in printed
    assert "0.250 of the bytes; the weights differ by 0.0e+00 at most" in printed


def test_counts_all_reduces_of_a_program():
    mesh = mesh_of(2)

    def sums(a, b):
        return jax.lax.psum((a, b, 2 * b), "data")

    f = jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=P("data"), out_specs=P()))
    text = f.lower(jnp.ones((4, 3)), jnp.ones(2, jnp.bfloat16)).compile().as_text()
    assert data_parallel.summed_bytes(text) in (4 * 6 + 2 * 2, 4 * 6 + 2 * 4)  # CPUs may widen


def test_mistakes():
    with pytest.raises(Mistake, match=r"--width 30 is no multiple of --block \(4\)"):
        data_parallel.main([*SMALL, "--width", "30"])
    with pytest.raises(Mistake, match=r"--devices 9: 8 are there"):
        data_parallel.main([*SMALL, "--devices", "9"])
