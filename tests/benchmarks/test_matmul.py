"""`python -m benchmarks.matmul` on weights so small that nothing takes long."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from benchmarks import _peers, _report, matmul
from benchmarks._cases import FULL, NEAR, PATTERNS, QUICK, Suite, cases, goal, nearest
from benchmarks._products import FULL as DENSE
from benchmarks._products import (
    PRODUCTS,
    SPARSE,
    Programs,
    canonical,
    differs,
    draws,
    stored,
    what_ran,
)

TINY = ["--shape", "128x128", "--tokens", "16", "--block", "8", "--rounds", "2", "--no-peers"]


def run(tmp_path, *flags):
    """Exit status and records of a run."""
    path = tmp_path / "out" / "result.jsonl"
    status = matmul.main([*TINY, "--json", str(path), *flags])
    return status, [json.loads(text) for text in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with every pattern, implementation and peer: status, records, folder."""
    path = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks._cases.PEER_BLOCKS", (8,))
        flags = ["--density", "0.25", "--implementation", "xla,auto,dense", "--peers"]
        return *run(path, *flags), path / "out"


def test_every_case_has_a_line_for_each_product_and_implementation(whole):
    status, records, _ = whole
    assert status == 0
    got = {(one["pattern"], one["implementation"], one["product"]) for one in records}
    ours = {
        (pattern, implementation, product)
        for pattern in PATTERNS
        for implementation in ("xla", "auto", "dense")
        for product in PRODUCTS
    }
    assert ours <= got
    assert len(records) == len(got)


def test_a_line_carries_machine_case_and_times(whole):
    for one in whole[1]:
        assert {"device", "cpu", "cores", "jax", "commit"} <= set(one)
        assert (one["shape"], one["tokens"], one["block"]) == ([128, 128], 16, [8, 8])
        assert one["density"] == pytest.approx(one["stored_blocks"] / (16 * 16), abs=1e-6)
        assert (one["refused"], one["clock"]) == (None, "wall") if not one["skipped"] else True
        if one["skipped"]:
            continue
        assert 0 < one["ratio_low"] <= one["ratio"] <= one["ratio_high"]
        assert 0 < one["ms_low"] <= one["ms"] <= one["ms_high"]
        assert one["dense_ms"] > 0
        hub = one["pattern"] == "barabasi_albert" and one["program"] == "xla"
        assert ("over_random" in one) == hub
        if not one["peer"]:
            k, m, n = *one["shape"], one["tokens"]
            bytes_ = 4 * (n * k + n * m + 64 * one["stored_blocks"])
            assert one["temporary_ratio"] == pytest.approx(
                one["temporary_bytes"] / bytes_, abs=1e-4
            )


def test_equal_programs_are_timed_once(whole):
    records = {
        (one["pattern"], one["density"], one["product"], one["implementation"]): one
        for one in whole[1]
    }
    for (*key, name), one in records.items():
        if name == "auto":
            assert one["ms"] == records[*key, one["program"]]["ms"]


def test_peers_are_right_and_say_what_they_lack(whole):
    peers = [one for one in whole[1] if one["peer"]]
    assert {one["implementation"] for one in peers} == {"scipy BSR", "jax.experimental.sparse"}
    skipped = {(one["implementation"], one["product"], one["skipped"]) for one in peers}
    assert {one for one in skipped if one[2]} == {("scipy BSR", "dvalues", "no such product")}


def test_a_picture_is_drawn(whole):
    png = (whole[2] / "result.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000


def test_tables_and_summary_are_printed(tmp_path, capsys):
    run(tmp_path, "--density", "0.25", "--pattern", "random")
    text = capsys.readouterr().out
    for words in (
        "[1/1] 16 tokens 128x128 random b=8 0.250 xla",
        "by density: 16 tokens, 128 x 128",
    ):
        assert words in text
    assert "break-even density of xla" in text
    assert "result.jsonl" in text
    assert "result.png" in text


# ---------------------------------------------------------------- a wrong kernel has no speed


def wrong_xla(monkeypatch, spoil):
    right = bsjax.matmul

    def wrong(x, values, p, *, implementation):
        values = spoil(values) if implementation == "xla" else values
        return right(x, values, p, implementation=implementation)

    monkeypatch.setattr(bsjax, "matmul", wrong)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda v: jnp.roll(v, 1, axis=0),
        lambda v: v.at[3, 1, 2].add(0.01),
        lambda v: v.at[0, 0, 0].set(jnp.nan),
    ],
    ids=["blocks in a wrong order", "one number off", "nan"],
)
def test_a_wrong_result_is_refused_and_not_timed(tmp_path, monkeypatch, capsys, spoil):
    wrong_xla(monkeypatch, spoil)
    flags = ["--density", "0.25", "--pattern", "random", "--implementation", "xla,dense"]
    status, records = run(tmp_path, *flags)
    assert status == 1
    by_name = {
        (one["implementation"], one["product"]): one
        for one in records
        if one["product"] != "dvalues"
    }
    assert "numbers differ from the reference" in by_name["xla", "forward"]["refused"]
    for key in ("ms", "ratio", "goal"):
        assert key not in by_name["xla", "forward"]
        assert key in by_name["dense", "forward"]
    assert "not timed" in capsys.readouterr().out


def test_rounding_is_no_difference_and_a_second_rounding_is():
    want = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 8
    once = jnp.asarray(want, jnp.bfloat16)
    assert differs(once, want, "bfloat16", terms=64) is None
    assert differs(once, want, "float32", terms=64) is not None
    assert "1 of 1000" in str(differs(once.at[5].set(jnp.inf), want, "bfloat16", terms=64))


# ---------------------------------------------------------------- what is timed


@pytest.mark.parametrize("product", ["dx", "dvalues"])
def test_a_gradient_runs_no_forward_product(product):
    """The gradients are taken of `matmul`; its own result must be gone from the program."""
    case = next(cases(Suite(shapes=[(64, 64)], tokens=[256], blocks=[8], densities=[0.25])))
    d = draws((64, 64), 256, "float32", 0)[0]
    args = (d.x, d.dy, stored(d.w, case.p), case.p)

    def direct(x, dy, values, p):
        if product == "dx":
            return bsjax.matmul(dy, values, p, transpose=True, implementation="xla")
        return bsjax.sddmm(x, dy, p, implementation="xla")

    gradient = functools.partial(SPARSE[product], implementation="xla")
    programs = Programs().compile({"vjp": (gradient, args), "direct": (direct, args)})
    text = {name: canonical(program) for name, program in programs.items()}
    assert text["vjp"] == text["direct"]
    assert " while(" in text["direct"]


def test_equal_machine_code_is_recognised_and_other_code_is_not():
    x = jnp.ones((8, 8))
    jobs = {
        "auto": lambda x: jax.lax.cond(jnp.array(True), lambda x: x @ x + 1, lambda x: x, x),
        "xla": lambda x: x @ x + 2,
        "dense": lambda y: y @ y + 1,
    }
    programs = Programs().compile({name: (f, (x,)) for name, f in jobs.items()})
    assert what_ran("auto", programs) == "dense"
    assert what_ran("xla", programs) == "xla"
    assert what_ran("auto", programs | {"dense": programs["xla"]}) == "auto"


def test_the_stored_dense_weight_does_the_same_products():
    d = draws((64, 128), 16, "float32", 0)[0]
    x, dy, w = (np.asarray(a, np.float64) for a in d)
    for product, want in (("forward", x @ w), ("dx", dy @ w.T), ("dvalues", x.T @ dy)):
        np.testing.assert_allclose(DENSE[product](*d), want, atol=1e-4)


def test_inputs_are_random_and_rotate():
    inputs = draws((64, 128), 16, "bfloat16", 0)
    assert len(inputs) >= 2
    assert {a.dtype for d in inputs for a in d} == {jnp.dtype("bfloat16")}
    for one, other in zip(inputs[0], inputs[1], strict=True):
        assert one.astype(jnp.float32).std() == pytest.approx(1, abs=0.1)
        assert not jnp.array_equal(one, other)


# ---------------------------------------------------------------- which cases, which goals


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("density", [0.03, 0.1, 0.5])
@pytest.mark.parametrize("grid", [(16, 16), (8, 32), (64, 256)])
def test_a_pattern_is_near_the_density_or_left_out(pattern, density, grid):
    mask = nearest(pattern, grid, density)
    if mask is None:
        assert pattern != "random"
        assert grid != (64, 256) or density < 0.1
    else:
        assert mask.shape == grid
        assert density / NEAR <= mask.mean() <= density * NEAR


def test_a_graph_takes_the_nearest_number_of_links():
    for density in (0.1, 0.25, 0.5):
        mask = nearest("barabasi_albert", (32, 32), density)
        every = [bsjax.patterns.barabasi_albert(32, m).mean() for m in range(1, 32)]
        assert abs(np.log(mask.mean() / density)) == pytest.approx(
            min(abs(np.log(np.array(every) / density)))
        )


def test_the_suites_are_those_of_the_documentation():
    full, quick = list(cases(FULL)), list(cases(QUICK))
    assert {(case.shape, case.tokens) for case in full} == {
        *(((2048, 2048), n) for n in (64, 512, 2048)),
        *(((1024, 4096), n) for n in (64, 512, 2048, 4096)),
    }
    assert {case.block for case in full} == {16, 32, 64, 128}
    assert {case.pattern for case in full if case.tokens == 2048} == set(PATTERNS)
    assert {case.implementations for case in full if case.tokens == 512} == {("auto",)}
    assert any(case.peers for case in full)
    assert len(quick) * 5 < len(full)


def test_goals_hold_where_the_house_set_them():
    square = cases(Suite(shapes=[(2048, 2048)], patterns=["random"]))
    goals = {
        (case.tokens, case.block, case.density, name): goal(case, name)
        for case in square
        for name in ("xla", "auto", "dense")
    }
    assert goals[2048, 128, 0.25, "xla"] == pytest.approx(1.8 * 0.25 + 0.15)
    assert goals[2048, 64, 0.1, "xla"] == pytest.approx(2.8 * 102 / 1024 + 0.2)
    assert goals[2048, 64, 0.5, "auto"] == goals[512, 16, 0.5, "auto"] == 1.08
    assert goals[2048, 64, 0.1, "auto"] == goals[2048, 64, 0.1, "xla"]
    for key in ((64, 64, 0.1, "auto"), (2048, 32, 0.1, "xla"), (2048, 64, 0.1, "dense")):
        assert goals[key] is None


@pytest.mark.parametrize(
    ("points", "text"),
    [
        ([(0.1, 0.5), (0.3, 1.5)], "0.20"),
        ([(0.3, 1.5), (0.1, 0.5), (0.2, 0.6)], "0.24"),
        ([(0.1, 1.0), (0.3, 1.5)], "< 0.1"),
        ([(0.1, 0.2), (0.5, 0.99)], "> 0.5"),
    ],
)
def test_break_even_lies_between_what_was_measured(points, text):
    assert _report.break_even(points)[1] == text


# ---------------------------------------------------------------- peers that are too slow or large


def test_a_slow_peer_is_skipped_with_the_reason(monkeypatch):
    case, inputs = _peer_case()
    monkeypatch.setattr(_peers, "LIMIT", 0.0)
    forms = _peers.scipy_forms(case, stored(inputs.w, case.p))["forward"]
    best, reason = _peers.fastest(forms, inputs, lambda _: None)
    assert best is None
    assert "too slow, about" in str(reason)


def test_a_large_peer_is_skipped_with_the_reason(monkeypatch):
    case, inputs = _peer_case()
    monkeypatch.setattr(_peers, "MEMORY", -1.0)
    forms = _peers.jax_forms(case, stored(inputs.w, case.p))["forward"]
    best, reason = _peers.fastest(forms, inputs, lambda _: None)
    assert best is None
    assert "GB of temporaries" in str(reason)


def test_a_wrong_peer_is_skipped_with_the_reason():
    case, inputs = _peer_case()
    forms = _peers.scipy_forms(case, stored(inputs.w, case.p))["dx"]
    best, reason = _peers.fastest(forms, inputs, lambda _: "3 of 4 numbers differ")
    assert best is None
    assert "3 of 4 numbers differ" in str(reason)


def _peer_case():
    suite = Suite(shapes=[(64, 32)], tokens=[16], blocks=[8], densities=[0.25])
    return next(cases(suite)), draws((64, 32), 16, "float32", 0)[0]


# ---------------------------------------------------------------- the command


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    right, seen = matmul.measure, []

    def interrupted(case, *args, **kwargs):
        seen.append(case)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return right(case, *args, **kwargs)

    monkeypatch.setattr(matmul, "measure", interrupted)
    status, records = run(tmp_path, "--density", "0.25,0.5", "--implementation", "xla")
    assert status == 130
    assert len(records) == len(PRODUCTS)
    text = capsys.readouterr().out
    assert "interrupted" in text
    assert "break-even" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "0"], "expected a positive whole number, got '0'"),
        (["--tokens", "64,many"], "expected a positive whole number, got 'many'"),
        (["--density", "1.5"], "expected a density above 0, at most 1, got '1.5'"),
        (["--density", "nan"], "expected a density above 0, at most 1, got 'nan'"),
        (["--shape", "2048"], "expected KxM, such as 1024x4096, got '2048'"),
        (["--pattern", "butterfly"], "expected one of random, barabasi_albert, banded"),
        (["--implementation", "cuda"], "expected one of xla, auto, dense, got 'cuda'"),
        (["--dtype", "int8"], "expected one of float32, bfloat16, float16, got 'int8'"),
        (["--block", "48"], "--shape 2048x2048 is no multiple of --block 48: change one of them"),
        (["--budget", "0"], "expected seconds above 0"),
        (["--seed", "-1"], "expected a whole number from 0 up, got '-1'"),
        (["--fast"], "unrecognized arguments: --fast"),
        (
            ["--block", "128", "--density", "0.03", "--pattern", "banded"],
            "no case is left: give fewer filters",
        ),
    ],
)
def test_a_bad_flag_is_one_line(capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        matmul.main(flags)
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("benchmarks.matmul: ")
    assert err.count("\n") == 1


def test_an_unwritable_place_is_one_line_before_anything_runs(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        matmul.main([*TINY, "--json", str(tmp_path / "file" / "result.jsonl")])
    err = capsys.readouterr().err
    assert "--json: cannot write" in err
    assert err.count("\n") == 1


def test_jax_device_is_what_the_record_names(whole):
    assert {one["device"] for one in whole[1]} == {jax.devices()[0].device_kind}
