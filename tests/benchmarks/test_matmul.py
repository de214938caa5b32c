"""`python -m benchmarks.matmul` on weights so small that nothing takes long."""

import json

import jax
import jax.numpy as jnp
import pytest

import bsjax
from benchmarks import _report, matmul
from benchmarks._cases import PATTERNS
from benchmarks._products import PRODUCTS

TINY = ["--shape", "128x128", "--tokens", "16", "--block", "8", "--rounds", "2", "--no-peers"]
WHERE = ("shape", "tokens", "dtype", "pattern", "block", "density", "implementation", "peer")


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


def test_the_summary_knows_every_kind_of_record(whole):
    records = [one | {"tokens": 2048} for one in whole[1]]
    records[0] = {key: records[0][key] for key in ("product", *WHERE)} | {
        "refused": "3 of 4 numbers differ",
        "skipped": None,
        "program": "xla",
    }
    text = "\n".join(_report.summary(records))
    for words in (
        "WRONG RESULTS, not timed: 1",
        "3 of 4 numbers differ",
        "`auto` from 512 tokens up, time / dense time: at most",
        "hubs, time / that of a random pattern",
        "temporaries of xla at 2048 tokens",
        "peers, 2048 tokens 128x128 random b=8 0.250",
        "dvalues skipped (no such product)",
    ):
        assert words in text


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
        pytest.param(lambda v: v.at[3, 1, 2].add(0.01), id="one number off"),
        pytest.param(lambda v: v.at[0, 0, 0].set(jnp.nan), id="nan"),
        pytest.param(lambda v: jnp.roll(v, 1, 0), id="wrong order", marks=pytest.mark.slow),
    ],
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
