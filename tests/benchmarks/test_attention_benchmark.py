"""`python -m benchmarks.attention` on sequences so short that nothing takes long."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _attention as suite
from benchmarks import _attention_peers as peers
from benchmarks import attention
from tests.helpers import slow

FLAGS = ["--tokens", "80", "--heads", "1", "--head-dim", "8", "--block", "16", "--sparsity", "0.5"]


@pytest.mark.parametrize("pattern", ["window", slow("random")])
def test_a_run(pattern, tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    flags = [*FLAGS, "--rounds", "2", "--pattern", pattern, "--implementation", "xla"]
    done = attention.main([*flags, "--json", str(path)])
    assert done == 0
    records = [json.loads(text) for text in path.read_text().splitlines()]
    cases = [(one["pattern"], one["what"]) for one in records]
    assert cases == [(pattern, what) for what in suite.WHAT]
    for one in records:
        assert (one["refused"], one["skipped"], one["rounds"]) == (None, None, 2)
        assert one["ratio"] > 0
        assert one["ms_low"] <= one["ms"] <= one["ms_high"]
        assert one["ms"] > 0
        assert one["clock"] == "wall"
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


# ------------------------------------------------------------------------------ other packages

CASES = [suite.Case(64, 1, 8, 16, "float32", pattern, 0.5, "mosaic") for pattern in suite.PATTERNS]


def offers(change=0.0):
    """A package that is NumPy-like: dense attention with the stored blocks as a mask."""

    def of(made, args):
        q, k, v, dout = args
        run = suite.with_gradients(suite.sparse(made, "reference"))

        def both():
            y, *rest = run(q, k, v, dout, made.p, made.full)
            return y, *(a * (1 + change) for a in rest)

        forms = {suite.FORWARD: {"form": lambda: both()[0]}, suite.BOTH: {"form": both}}
        passes = {what: forms[what]["form"] for what in suite.WHAT}
        return peers.Attention(forms, passes, jax.block_until_ready, np.asarray, sparse=True)

    return of


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.pattern)
def test_a_peer_is_timed_where_it_is_right(case):
    good, bad = (list(peers.measure("it", case, 0, offers(change))) for change in (0.0, 0.1))
    for one in good:
        assert one["skipped"] is None
        assert (one["program"], one["reasons"]) == ("form", [])
        assert one["ratio"] > 0
        assert "as fast as dense" in suite.line(one)
    assert bad[0]["skipped"] is None  # the result itself is right
    assert bad[1]["skipped"].startswith("form: wrong by ")


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_that_is_missing_or_needs_a_gpu_says_so(name):
    found = list(peers.measure(name, CASES[0], 0))
    assert [one["what"] for one in found] == list(suite.WHAT)
    assert all(one["skipped"] and "ratio" not in one for one in found)
    assert all("skipped (" in suite.line(one) for one in found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.pattern)
def test_block_masks_of_flex_attention(case):
    """What it is told is the stored blocks, the full ones apart, and the mask inside the others."""
    made = suite.PATTERNS[case.pattern](case, 0)
    torch = types.SimpleNamespace(tensor=lambda a, device: a)
    mask = types.SimpleNamespace(from_kv_blocks=lambda *args, **options: (args, options))
    (some, at, whole, full), options = peers.block_mask(
        torch, types.SimpleNamespace(BlockMask=mask), made, case.tokens, "cpu"
    )
    assert options["BLOCK_SIZE"] == (16, 16)
    seen = np.zeros((case.tokens, case.tokens), bool)
    for counts, columns, inside in ((some, at, options["mask_mod"]), (whole, full, None)):
        for row in range(4):
            for column in columns[0, 0, row, : counts[0, 0, row]]:
                q, k = np.ogrid[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
                assert not seen[q, k].any()
                seen[q, k] = inside(0, 0, q, k) if inside else True
    want = np.kron(np.asarray(made.p.mask()), np.ones((16, 16), bool))
    if made.mask is not None:
        want &= np.asarray(made.mask(0, *np.ogrid[: case.tokens, : case.tokens]))
    np.testing.assert_array_equal(seen, want)


def test_dense_peers_are_compared_with_dense_attention():
    """Causal where the pattern is, else all of it."""
    random, window = (peers.whole(case, suite.PATTERNS[case.pattern](case, 0)) for case in CASES)
    args = suite.draws(CASES[0], 0)
    for made, causal in ((random, False), (window, True)):
        y = peers.wanted(made, args)[0]
        want = jax.nn.dot_product_attention(*args[:3], is_causal=causal)
        assert peers.relative(y, np.asarray(want)) is None
        assert peers.relative(y, np.asarray(want)[::-1] * 1.1)
