"""What one would use without this library, on the same inputs in the same run.

Peers get what they like for nothing: the weight is stored in both orientations, and every form that
their documentation offers is tried. The fastest is reported.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse
from scipy.sparse import bsr_array

from benchmarks import _products as products
from benchmarks._cases import Case
from benchmarks._products import Inputs, Programs, Record
from benchmarks._timing import race, seconds

LIMIT = 3.0  # seconds that one product may take; what needs longer is predicted, and skipped
MEMORY = 4e9  # bytes of temporaries that one product may take
ROUNDS = 5

type Form = Callable[[Inputs], Callable[[], Any]]  # inputs -> a product that is ready to run


def measure_peers(case: Case, programs: Programs, *, seed: int) -> Iterator[Record]:
    """A record for each product and peer; `skipped` says why there is no time in it."""
    inputs = products.draws(case.shape, case.tokens, case.dtype, seed)[0]
    values = products.stored(inputs.w, case.p)
    want = products.reference(programs, inputs.x, inputs.dy, values, case.p)
    scipy, jax_sparse = scipy_forms(case, values), jax_forms(case, values)
    full = programs.compile({name: (f, inputs) for name, f in products.FULL.items()})
    for product in products.PRODUCTS:
        most = products.terms(case, product)

        def check(got: Any, want=want[product], most=most) -> str | None:
            return products.differs(got, want, case.dtype, most)

        for peer, forms in (("scipy BSR", scipy), ("jax.experimental.sparse", jax_sparse)):
            best, skipped = fastest(forms.get(product, {}), inputs, check)
            record = products.describe(case, product, peer)
            record |= {"peer": True, "program": best, "skipped": skipped}
            if best is not None:
                run = forms[product][best](inputs)
                runs = {
                    peer: lambda _, run=run: run(),
                    products.DENSE: products.Runner(full[product], [inputs]),
                }
                record |= products.timing(race(runs, rounds=ROUNDS), peer, None, "wall")
            yield record


def fastest(
    forms: dict[str, Form], inputs: Inputs, check: Callable[[Any], str | None]
) -> tuple[str | None, str | None]:
    """The fastest form that is right and not too slow, or the reason why there is none."""
    times, reasons = {}, []
    for name, form in forms.items():
        try:
            _refuse_slow(form, inputs)
            run = form(inputs)
            if reason := check(run()):
                raise Refused(reason)
            times[name] = _refuse(seconds(lambda _, run=run: run(), 0))
        except Refused as why:
            reasons.append(f"{name}: {why}")
    best = min(times, key=times.__getitem__, default=None)
    return best, None if best else ("; ".join(reasons) or "no such product")


class Refused(Exception):
    """Why a form is not timed."""


def _refuse_slow(form: Form, inputs: Inputs) -> None:
    """Predicts the time from an eighth of the tokens."""
    some = max(1, len(inputs.x) // 8)
    run = form(Inputs(inputs.x[:some], inputs.dy[:some], inputs.w))
    time = seconds(lambda _: run(), 0)
    if time < LIMIT:  # then the first call, which warms up, need not be the judge
        time = seconds(lambda _: run(), 0)
    _refuse(time * len(inputs.x) / some)


def _refuse(time: float) -> float:
    if time > LIMIT:
        raise Refused(f"too slow, about {time:.1f} s where the limit is {LIMIT:g} s")
    return time


def scipy_forms(case: Case, values: jax.Array) -> dict[str, dict[str, Form]]:
    """product -> form. There is no product that gives the gradient of the values."""
    s, t = _bsr(case, values, transpose=False), _bsr(case, values, transpose=True)

    def on(name: str, f: Callable[[np.ndarray], Any]) -> Form:
        return lambda inputs: functools.partial(f, np.asarray(getattr(inputs, name)))

    return {
        "forward": {
            "x @ S": on("x", lambda x: x @ s),
            "(T @ x.T).T": on("x", lambda x: (t @ x.T).T),
        },
        "dx": {
            "dy @ T": on("dy", lambda y: y @ t),
            "(S @ dy.T).T": on("dy", lambda y: (s @ y.T).T),
        },
    }


def jax_forms(case: Case, values: jax.Array) -> dict[str, dict[str, Form]]:
    """product -> form, of single elements: a product with blocks as dense axes is not implemented,
    and neither is a dense matrix times BCSR."""
    s, t = _bsr(case, values, transpose=False).tocsr(), _bsr(case, values, transpose=True).tocsr()
    rows, cols = (sparse.BCSR.from_scipy_sparse(a) for a in (t, s))
    pairs = sparse.BCOO.from_scipy_sparse(s)
    at, contract = _elements(case), (((0,), (0,)), ((), ()))

    def sampled(x: jax.Array, dy: jax.Array, at: jax.Array) -> jax.Array:
        found = sparse.bcoo_dot_general_sampled(x, dy, at, dimension_numbers=contract)
        return found.reshape(values.shape)

    def turned(x: jax.Array, w: Any) -> jax.Array:
        return (w @ x.T).T

    return {
        "forward": {
            "BCSR, (T @ x.T).T": lambda inputs: _ready(turned, inputs.x, rows),
            "BCOO, x @ S": lambda inputs: _ready(lambda x, w: x @ w, inputs.x, pairs),
        },
        "dx": {
            "BCSR, (S @ dy.T).T": lambda inputs: _ready(turned, inputs.dy, cols),
            "BCOO, dy @ S.T": lambda inputs: _ready(lambda y, w: y @ w.T, inputs.dy, pairs),
        },
        "dvalues": {"BCOO, sampled": lambda inputs: _ready(sampled, inputs.x, inputs.dy, at)},
    }


def _ready(f: Callable, *args: Any) -> Callable[[], Any]:
    program = jax.jit(f).lower(*args).compile()
    needs = products.temporary_bytes(program) or 0
    if needs > MEMORY:
        raise Refused(f"{needs / 1e9:.1f} GB of temporaries where the limit is {MEMORY / 1e9:g} GB")
    return lambda: program(*args)


def _bsr(case: Case, values: jax.Array, *, transpose: bool) -> Any:
    """The weight S, or T = S^T, as scipy stores it: rows of blocks, each block contiguous."""
    p = case.p
    if transpose:
        row, col, data = np.asarray(p.col), np.asarray(p.row), np.asarray(values).swapaxes(1, 2)
    else:
        flipped, order = p.transpose()
        row, col, data = flipped.col, flipped.row, np.asarray(values)[np.asarray(order)]
    shape, rows = (p.shape[::-1], p.grid[1]) if transpose else (p.shape, p.grid[0])
    start = np.searchsorted(np.asarray(row), np.arange(rows + 1))
    return bsr_array((np.ascontiguousarray(data), np.asarray(col), start), shape=shape)


def _elements(case: Case) -> jax.Array:
    """Row and column of every stored element, in the order of the values."""
    (br, bc), p = case.p.block, case.p
    i, j = np.indices((br, bc))
    row = np.asarray(p.row)[:, None, None] * br + i
    col = np.asarray(p.col)[:, None, None] * bc + j
    return jnp.asarray(np.stack([row.ravel(), col.ravel()], axis=1))
