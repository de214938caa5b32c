"""What the width sweep says: FLOPs, learning rates, the table."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from models import _flops, _widths_report, widths
from models._language import bits
from models._widths import Kind, Run, make
from tests.models.sweep import config, equations

# ---------------------------------------------------------------------------------------- FLOPs


def products(jaxpr):
    """Multiplications and additions of all `dot_general`s."""
    total = 0
    for e, times in equations(jaxpr):
        if e.primitive.name == "dot_general":
            (contracted, _), _ = e.params["dimension_numbers"]
            terms = math.prod(e.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * times * terms * math.prod(e.outvars[0].aval.shape)
    return total


@pytest.mark.parametrize("fraction", [None, 0.3])
def test_products_cost_what_the_formula_says(fraction):
    c, kind = config("--layers", "3"), Kind(32, fraction)
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: make(c, kind, 0)), nnx.Param, ...)

    def loss(params, rest, data):
        return bits(nnx.merge(graph, params, rest, copy=True), data).mean()

    data = jax.ShapeDtypeStruct((c.batch, c.length + 1), jnp.int32)
    counted = products(jax.make_jaxpr(jax.grad(loss))(params, rest, data).jaxpr)
    step = widths.spent(c, kind)
    assert counted == step.linears + step.attention + step.head
    assert (step.norms > 0) == (step.sampler > 0) == (fraction is not None)


@pytest.mark.slow
def test_a_dense_step_costs_little_more_than_its_products_in_the_compiled_program():
    c = config("--layers", "1")
    graph, params = nnx.split(make(c, Kind(64, None), 0))

    def loss(params, data):
        return bits(nnx.merge(graph, params, copy=True), data).mean()

    data = jnp.zeros((c.batch, c.length + 1), jnp.int32)
    found = jax.jit(jax.grad(loss)).lower(params, data).compile().cost_analysis()["flops"]
    step = widths.spent(c, Kind(64, None)).total
    assert step < found < 1.2 * step  # norms, activations, the softmax


def test_scores_and_draws_of_one_sampled_layer_by_hand():
    step = _flops.training_step(tokens=5, length=5, layers=1, width=4, fraction=0.5, block=2)
    norms = sampler = 0
    for k, m in ((4, 12), (4, 4), (4, 16), (16, 4)):
        norms += sum(2 for _ in range(5 * k)) + sum(2 for _ in range(k * m))
        groups = k // 2
        sampler += 2 * (k // 2) * m + 3 * groups * int(math.log2(groups)) + 20 * groups
    assert (step.norms, step.sampler) == (norms, sampler)
    assert step.total == sum(step)
    one_group = _flops.training_step(tokens=5, length=5, layers=1, width=4, fraction=0.5, block=4)
    assert one_group.linears > step.linears  # the square layers cannot be sampled, and are exact


# ------------------------------------------------------------------------------------ the report


def results_of(*found):
    """Of `(width, fraction, rate, bits to choose by of each seed, held-out ones of each seed)`."""
    return {
        (Kind(width, fraction), Run(rate, seed)): {
            "validation": chosen_by,
            "heldout": reported,
            "heldout_sampled": reported,
            "flops": 1000 * width,
            "parameters": width,
            "seconds": 1.0,
        }
        for width, fraction, rate, *pairs in found
        for seed, (chosen_by, reported) in enumerate(zip(*pairs, strict=True))
    }


MADE = results_of(
    (8, None, 0.1, (2.0, 4.0), (1.0, 1.0)),  # has the best seed, and the best held-out text
    (8, None, 0.2, (2.5, 2.6), (2.0, 3.0)),  # is the best on average
    (8, None, 0.4, (1.0, None), (1.0, None)),  # diverged with the other seed
    (8, 0.5, 0.1, (None,), (None,)),
    (16, None, 0.1, (3.0,), (3.0,)),
    (16, None, 0.2, (4.0,), (4.0,)),
    (16, 0.5, 0.1, (3.6,), (3.6,)),
    (16, 0.5, 0.2, (3.5,), (3.5,)),
    (32, None, 0.1, (3.0,), (3.0,)),
)


def test_the_rate_is_the_best_on_average_on_the_text_to_choose_by():
    found = _widths_report.points(MADE)
    assert {name: [*line] for name, line in found.items()} == {
        "dense": [8, 16, 32],
        "sampled 0.5": [16],
    }
    narrow, wide = found["dense"][8], found["dense"][16]
    assert (narrow.learning_rate, narrow.edge, narrow.heldout) == (0.2, False, [2.0, 3.0])
    assert (wide.learning_rate, wide.edge) == (0.1, True)
    assert (found["sampled 0.5"][16].learning_rate, found["sampled 0.5"][16].edge) == (0.2, True)
    assert not found["dense"][32].edge  # of one there is no choice


def test_the_table_has_a_row_for_each_width_and_kind(text, tmp_path, capsys):
    _widths_report.show(tmp_path, "a title", MADE, text)
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    rows = [line for line in lines if line and line[0] in ("8,", "16,")]
    assert [row[:2] for row in rows] == [["8,", "dense"], ["16,", "dense"], ["16,", "sampled"]]
    assert rows[0][-4:-1] == ["2.500", "0.500", "2.500"]  # mean and half the range of two seeds
    assert "* the best of the learning rates" in printed


def test_a_sweep_that_diverged_says_so(text, tmp_path, capsys):
    _widths_report.show(tmp_path, "a title", results_of((8, None, 0.1, (None,), (None,))), text)
    assert capsys.readouterr().out == "Every run diverged: give lower --learning_rates\n"
