"""The sentiment recipe from a checkpoint to the pictures, on made-up reviews and a tiny model."""

import contextlib
import io
import json
import warnings

import numpy as np
import pytest
from matplotlib import image

from models import _encode as states
from models import _recurrent as recurrent
from models import _sentiment_report as shown
from models import sentiment
from models._cli import Mistake
from models._probe import Unit
from models._sentiment_report import Cell

SIZE = recurrent.Size(hidden=24, embedding=6, block=8, depth=2, links=1)
TINY = [
    "--states",
    "mean",
    "last",
    "--folds",
    "3",
    "--batch",
    "16",
    "--chunk",
    "8",
    "--penalties",
    "0.1",
    "0.02",
    "0.005",
]
SUBJECTS = ("it", "the film", "a long and winding story", "caf\u00e9 \u6620\u753b, said $5")


def made_up(n, seed):
    """(label, text) of n reviews; the last word tells."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 2)
    return [
        (label, f"{rng.choice(SUBJECTS)} number {rng.integers(100)} is {('poor', 'good')[label]}")
        for label in labels
    ]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """(what was printed, sentiment.json, the output folder, the flags)."""
    folder = tmp_path_factory.mktemp("sentiment")
    for name, seed in (("model", 0), ("dense", 1)):
        recurrent.save(folder / name, recurrent.make(SIZE, seed), {})
    for i, (part, n) in enumerate((("train", 60), ("dev", 20), ("test", 30))):
        rows = "".join(f'{label},"{text}"\n' for label, text in made_up(n, i))
        (folder / f"{part}_binary_sent.csv").write_text("label,sentence\n" + rows, "utf-8")
    rows = "".join(f"{label} {text}\n" for label, text in made_up(60, 3))
    (folder / "custrev.all").write_text(rows, "utf-8")
    data = [str(folder / f"{part}_binary_sent.csv") for part in ("train", "dev", "test")]
    models = ["--checkpoint", str(folder / "model"), "--dense", str(folder / "dense")]
    flags = [*TINY, *models, "--out", str(folder / "out")]
    flags += ["--data", *data, str(folder / "custrev.all")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert sentiment.main(flags) == 0
    results = json.loads((folder / "out" / "sentiment.json").read_text("utf-8"))
    return printed.getvalue(), results, folder / "out", flags


ROWS = [
    f"{name}, {kind} state{what}"
    for name in ("trained", "untrained", "dense")
    for kind in ("mean", "last")
    for what in ("", ", one unit")
]
ROWS += ["byte trigrams", "more frequent label"]


def test_every_method_on_every_set(story):
    printed, found, _, _ = story
    assert list(found["results"]) == ROWS
    for name in ROWS:
        assert set(found["results"][name]) == {"SST", "CR"}
        row = next(line for line in printed.splitlines() if line.strip().startswith(name))
        for cell in found["results"][name].values():
            assert f"{100 * cell['accuracy']:.1f} ({100 * cell['error']:.1f})" in row
    # the last word tells, and even an untrained state has read it
    assert found["results"]["trained, last state"]["SST"]["accuracy"] > 0.9
    assert found["results"]["byte trigrams"]["CR"]["accuracy"] == 1
    assert found["results"]["more frequent label"]["SST"]["accuracy"] == 0.5


def test_the_numbers_say_what_they_were_chosen_on(story):
    printed, found, _, _ = story
    assert (
        "SST: fitted to train (60), penalty chosen on dev (20), unit and threshold on both, mea"
        in printed
    )
    assert (
        "CR: 3-fold cross-validation of 60 texts; in each fold the penalty chosen on 10%" in printed
    )
    assert found["data"]["SST"]["protocol"].endswith("measured on test (30)")
    details = found["results"]["trained, last state"]["CR"]["details"]
    assert len(details["penalties"]) == len(details["weights"]) == 3
    assert set(details["penalties"]) <= {0.1, 0.02, 0.005}
    assert len(found["results"]["trained, last state, one unit"]["CR"]["details"]["units"]) == 3
    assert "-m models.sentiment --checkpoint" in found["where"]["command"]
    assert {"commit", "jax", "scikit-learn"} <= set(found["where"])


def test_the_untrained_model_is_of_the_same_shape(story):
    models = story[1]["models"]
    assert models["untrained"]["size"] == models["trained"]["size"] == SIZE._asdict()
    assert models["untrained"]["parameters"] == models["trained"]["parameters"]
    model = recurrent.make(SIZE, 0)
    fresh, again, other = (sentiment.untrained(model, seed) for seed in (0, 0, 1))
    for one, equal in ((model, False), (again, True), (other, False)):
        assert bool((one.embed.embedding[...] == fresh.embed.embedding[...]).all()) is equal


def test_pictures_are_of_the_first_kind_of_state(story):
    """--states mean last."""
    found = story[1]
    for name in ("SST", "CR"):
        units = found["results"]["trained, mean state, one unit"][name]["details"]["units"]
        drawn = {"state": "mean", **sentiment.usual_unit(units)._asdict()}
        assert found["units drawn"][name] == drawn


def test_pictures_are_drawn(story):
    for name in ("sentiment-unit.png", "sentiment-heatmap.png"):
        assert image.imread(story[2] / name).shape[0] > 200


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--checkpoint is missing: give the folder of a model .* none comes with"),
        (["--checkpoint", "nowhere"], "--data is missing: give files of labelled texts, such as"),
        (["--folds", "1"], "--folds must be at least 2, got 1"),
        (["--penalties", "0"], "--penalties must be above 0, got 0.0"),
        (["--write_reviews", "x"], r"no \.review files in --data, which is missing"),
    ],
)
def test_what_is_missing_is_said(flags, message):
    with pytest.raises(Mistake, match=message):
        sentiment.main(flags)


def test_a_folder_without_a_model(story, tmp_path):
    with pytest.raises(Mistake, match="no model in"):
        sentiment.main([*story[3], "--checkpoint", str(tmp_path), "--out", str(tmp_path)])


def test_reviews_are_written(tmp_path, capsys):
    entry = "<review><rating>5.0</rating><review_text>\nVery\ngood\n</review_text></review>"
    (tmp_path / "a.review").write_text(entry)
    target = tmp_path / "text"
    assert sentiment.main(["--data", str(tmp_path), "--write_reviews", str(target)]) == 0
    assert target.read_text() == "Very good\n"
    assert "1 reviews, 0.00 MB, are in" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- the report


def test_rounds_are_weighed_by_their_texts():
    cell = Cell.of([1.0, 0.5], [30, 10], {})
    assert cell.accuracy == pytest.approx(0.875)
    assert cell.error == pytest.approx((0.875 * 0.125 / 40) ** 0.5)
    assert cell.deviation == pytest.approx(0.5 / 2**0.5)
    assert str(cell) == "87.5 (5.2)"
    assert Cell.of([0.5], [4], {}).deviation is None


def test_the_end_of_a_grid_is_pointed_out():
    grids = {"state": (0.1, 0.01, 0.001), "byte trigrams": (0.1, 0.01)}

    def row(*penalties):
        return {"CR": Cell.of([0.5], [4], {"penalties": penalties})}

    assert shown.edges({"trained, state": row(0.01, 0.1), "one unit": row()}, grids) == []
    (line,) = shown.edges({"trained, state": row(0.001, 0.1, 0.001)}, grids)
    assert line.startswith("trained, state on CR: 0.001 was chosen, the end of --penalties")
    (line,) = shown.edges({"byte trigrams": row(0.1)}, grids)
    assert "0.1 was chosen, the end of --trigram_penalties" in line


def test_the_usual_unit():
    units = [Unit(3, 0.1, True), Unit(5, 9.0, True), Unit(3, 0.3, True), Unit(3, 7.0, False)]
    assert sentiment.usual_unit([unit._asdict() for unit in units]) == Unit(3, 0.2, True)


def test_texts_to_draw_are_the_longest_of_the_test_that_fit(story):
    config = sentiment.cli.parse(sentiment.Config, story[3], command="it")
    long = "x" * (sentiment.SHOWN + 1)
    texts = ("no, of train", "short", "a bit longer", long, "1", "one", " ")
    labels = np.array([0, 0, 0, 1, 1, 1, 1], np.int32)
    one = sentiment.Labelled("it", texts, labels, {}, "")
    chosen = sentiment.Round(*map(np.array, ([0], [0], [0], [1, 2, 3, 4, 5, 6])))
    assert sentiment.shown(config, one, chosen) == ["a bit longer", "one"]
    own = sentiment.cli.parse(sentiment.Config, ["--review", "mine"], command="it")
    assert sentiment.shown(own, one, chosen) == ["mine"]


def test_a_character_has_the_value_after_its_last_byte():
    text = " ".join(["caf\u00e9"] * 30)
    lines, last = shown._lines(text)
    framed = states.frame(text)
    assert "".join(lines) == text
    assert max(map(len, lines)) <= shown.COLUMNS
    assert [framed[: at + 1].decode()[-1] for at in last] == list(text)


@pytest.mark.parametrize("text", ["$x^$ \u6620\u753b \U0001f600", "word " * 40 + "x" * 200])
def test_any_text_can_be_drawn(tmp_path, text):
    values = np.linspace(-1, 1, len(states.frame(text))).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown.heatmap(tmp_path / "a.png", Unit(0, 0.1, False), [(text, values)])
    assert (tmp_path / "a.png").exists()
