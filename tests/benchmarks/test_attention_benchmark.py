"""`python -m benchmarks.attention` on sequences so short that nothing takes long."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _attention as suite
from benchmarks import attention

FLAGS = ["--tokens", "80", "--heads", "1", "--head-dim", "8", "--block", "16", "--sparsity", "0.5"]


def test_a_run(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    done = attention.main([*FLAGS, "--rounds", "2", "--implementation", "xla", "--json", str(path)])
    assert done == 0
    records = [json.loads(text) for text in path.read_text().splitlines()]
    cases = [(one["pattern"], one["what"]) for one in records]
    assert cases == [(name, what) for name in ("random", "window") for what in suite.WHAT]
    for one in records:
        assert (one["refused"], one["skipped"], one["rounds"]) == (None, None, 2)
        assert one["ratio"] > 0
        assert one["ms"] > 0
        assert one["stored"] == pytest.approx(0.5, abs=0.1)
        assert one["goal"] is None
    assert "as fast as dense" in capsys.readouterr().out


def test_what_cannot_run_is_skipped(tmp_path, capsys):
    flags = [*FLAGS, "--pattern", "random", "--implementation", "mosaic"]
    assert attention.main([*flags, "--json", str(tmp_path / "out.jsonl")]) == 0
    assert capsys.readouterr().out.count("skipped (attention: implementation=") == 2


@pytest.mark.parametrize("which", range(4))
def test_a_wrong_result_is_not_timed(which):
    """One number of y, dq, dk or dv, by a thousandth."""
    case = suite.Case(64, 1, 8, 16, "float32", "window", 0.5, "xla")
    made = suite.PATTERNS["window"](case, 0)
    args = [
        jnp.asarray(a) for a in np.random.default_rng(0).normal(size=(4, 1, 64, 1, 8)).astype("f")
    ]
    rows = np.sort(np.random.default_rng(3).choice(64, suite.CHECKED, replace=False))
    seen = np.asarray(made.mask(0, np.arange(64)[:, None], np.arange(64)[None]))

    def exact(q, k, v, dout, p, full):
        def dense(q, k, v):
            return jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(seen)[None, None])

        out, pull = jax.vjp(dense, q, k, v)
        return [out, *pull(dout)]

    def off(*args):
        results = exact(*args)
        at = (0, rows[5] if which < 2 else 33, 0, 2)
        results[which] = results[which].at[at].add(1e-3)
        return results

    assert suite.wrong(made, exact, args, 3) is None
    assert suite.wrong(made, off, args, 3).startswith(("y", "dq", "dk", "dv")[which] + " is off")


def test_summary():
    one = {
        "tokens": 4096, "pattern": "random", "block": 64, "stored": 0.1, "dtype": "float32",
        "implementation": "xla", "what": "forward", "refused": None, "skipped": None,
        "ratio": 0.2, "ratio_low": 0.1, "ratio_high": 0.25, "ms": 3.0, "goal": 0.25, "met": True,
    }  # fmt: skip
    slow = one | {"ratio": 1.25, "ratio_low": 1.0, "ratio_high": 2.0, "met": False}
    assert list(suite.summary([one, slow])) == [
        "goals (4 times as fast as dense) met: 1 of 2",
        "  missed: 4096 tokens random b=64 0.100 xla forward: 0.8x (0.5-1.0) as fast as dense, "
        "3.0 ms",
        "slower than dense: 4096 tokens random b=64 0.100 xla forward: 0.8x (0.5-1.0) as fast as "
        "dense, 3.0 ms",
    ]
