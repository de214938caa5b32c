"""What is timed, what counts as wrong, and which peers are left out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from benchmarks import _peers
from benchmarks._cases import Suite, cases
from benchmarks._products import FULL as DENSE
from benchmarks._products import SPARSE, Programs, canonical, differs, draws, stored, what_ran


def test_rounding_is_no_difference_and_a_second_rounding_is():
    want = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 8
    once = jnp.asarray(want, jnp.bfloat16)
    assert differs(once, want, "bfloat16", terms=64) is None
    assert differs(once, want, "float32", terms=64) is not None
    assert "1 of 1000" in str(differs(once.at[5].set(jnp.inf), want, "bfloat16", terms=64))


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
