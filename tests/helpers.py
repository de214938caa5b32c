"""Named cases and one derived tolerance, shared by the tests and the benchmarks.

A case is a pattern and a number of tokens. Cases of equal sizes differ only in coordinates, which
are leaves: one compiled function serves them all, and the tests stay quick.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import bsjax

FEW, MANY = 7, 137  # tokens: each side of where the XLA implementation changes its formulation


class Inputs(NamedTuple):
    """Arguments of a product, and `dy`: a random cotangent of its result."""

    p: bsjax.BlockPattern
    x: jax.Array
    values: jax.Array
    dy: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """Stored blocks `mask` (r, c), the block, and tokens; `capacity` beyond the stored is spare."""

    mask: np.ndarray
    block: int | tuple[int, int] = 8
    n: int = FEW
    capacity: int | None = None

    @property
    def pattern(self) -> bsjax.BlockPattern:
        return bsjax.BlockPattern.from_mask(self.mask, self.block, capacity=self.capacity)

    @property
    def terms(self) -> int:
        """The most products that are summed in one number of y, dx or dvalues."""
        br, bc = self.pattern.block
        return max(1, self.n, br * int(self.mask.sum(0).max()), bc * int(self.mask.sum(1).max()))

    def inputs(self, dtype: Any = jnp.float32, *, transpose: bool = False) -> Inputs:
        """Standard normal arrays; the values of spare slots are NaN."""
        p, rng = self.pattern, np.random.default_rng(0)
        k, m = p.shape[::-1] if transpose else p.shape
        values = normal(rng, (p.capacity, *p.block), dtype).at[p.nnz :].set(jnp.nan)
        return Inputs(p, normal(rng, (self.n, k), dtype), values, normal(rng, (self.n, m), dtype))


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Standard normal numbers, the same in every dtype but for their rounding."""
    return jnp.asarray(rng.normal(size=shape)).astype(dtype)


def random_mask(r: int, c: int, density: float = 0.4, seed: int = 0) -> np.ndarray:
    """Exactly `round(density * r * c)` blocks, anywhere."""
    stored = np.arange(r * c) < round(density * r * c)
    return np.random.default_rng(seed).permutation(stored).reshape(r, c)


def hub_mask(r: int, c: int) -> np.ndarray:
    """A diagonal, and a block-row and a block-column that hold everything."""
    mask = np.arange(r)[:, None] % c == np.arange(c)
    mask[r // 2] = mask[:, c // 2] = True
    return mask


def islands_mask(r: int, c: int) -> np.ndarray:
    """Odd block-rows and odd block-columns only: the even ones are empty."""
    return (np.arange(r) % 2 == 1)[:, None] & (np.arange(c) % 2 == 1)


def corner_mask(r: int, c: int) -> np.ndarray:
    """The last block alone: where an index that is clamped too early would land."""
    return (np.arange(r) == r - 1)[:, None] & (np.arange(c) == c - 1)


def _shared(r: int, c: int) -> dict[str, np.ndarray]:
    return {
        "random": random_mask(r, c),
        "hub": hub_mask(r, c),
        "islands": islands_mask(r, c),
        "corner": corner_mask(r, c),
        "only spare": np.zeros((r, c), bool),
    }


# A hub column of 23 blocks: a few large products, and a remainder in pieces of every size.
SHARED = {
    f"{name}, {n} tokens": Case(mask=mask, n=n, capacity=48)
    for n in (FEW, MANY)
    for name, mask in _shared(23, 4).items()
}
CASES = SHARED | {
    "one token": Case(mask=random_mask(5, 3), n=1),
    "no token": Case(mask=random_mask(5, 3), n=0),
    "wide grid": Case(mask=hub_mask(3, 17), n=MANY),
    "tall blocks": Case(mask=random_mask(3, 4), block=(32, 8), n=MANY),
    "wide blocks": Case(mask=random_mask(3, 4), block=(8, 32)),
    "full": Case(mask=np.ones((3, 4), bool), n=MANY),
    "a single block": Case(mask=np.ones((1, 1), bool), block=16),
    "nothing stored, few tokens": Case(mask=np.zeros((3, 4), bool)),
    "nothing stored, many tokens": Case(mask=np.zeros((3, 4), bool), n=MANY),
}


def accumulator(dtype: Any) -> Any:
    """What sums of `dtype` are kept in: float64 for float64, float32 for all others."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def tolerance(dtype: Any, terms: int) -> dict[str, float]:
    """The error of `terms` products of unit size, summed in float32 and rounded once to `dtype`.

    One rounding is half a unit in the last place, `eps / 2` of the result. The sum is of size
    `sqrt(terms)` and its `terms` roundings, of `eps32 / 2` each, add up like a random walk:
    `eps32 / 2 * terms`. A factor 8 is for the largest of many results, and because what they are
    compared with has such an error too. Two roundings to `dtype` do not pass.
    """
    eps, kept = (float(jnp.finfo(d).eps) for d in (dtype, accumulator(dtype)))
    return {"rtol": eps / 2, "atol": 4 * kept * terms}


def of_one_sign(terms: int, dtype: Any = jnp.float32) -> float:
    """How far two sums of `terms` numbers of one sign are apart, as a share of the sum.

    Nothing cancels, so no partial sum is larger than the sum: each of the `terms` roundings in each
    of the two is `eps / 2` of it at most, and they add up like a random walk.
    """
    return float(jnp.finfo(dtype).eps) / 2 * (2 * terms) ** 0.5


def assert_close(got: Any, want: Any, terms: int) -> None:
    """`got` is `want` (kept in float32 or float64) but for the rounding to the dtype of `got`."""
    got, want = jnp.asarray(got), np.asarray(want)
    assert want.dtype in (np.float32, np.float64)
    np.testing.assert_allclose(
        np.asarray(got).astype(want.dtype), want, **tolerance(got.dtype, terms)
    )


@functools.partial(jax.jit, static_argnames=("transpose", "implementation"))
def products(inputs: Inputs, *, transpose: bool = False, implementation: str) -> tuple[Any, ...]:
    """y, dx and dvalues of `matmul`: every kernel once. Compiled once for each size of a case."""
    p, x, values, dy = inputs

    def f(x: jax.Array, values: jax.Array) -> jax.Array:
        return bsjax.matmul(x, values, p, transpose=transpose, implementation=implementation)

    y, pull = jax.vjp(f, x, values)
    return y, *pull(dy)


def kept(inputs: Inputs) -> Inputs:
    """The same numbers in the dtype that the library sums in: what rounding is compared with."""
    p, *arrays = inputs
    return Inputs(p, *(a.astype(accumulator(a.dtype)) for a in arrays))


def loop_bodies(text: str) -> str:
    """Of a compiled program: the bodies of its loops, with what they call."""
    parts = re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ \()", text)
    named = {re.findall(r"%([\w.\-]+)", part)[0]: part for part in parts[1:]}
    todo, seen = re.findall(r"body=%([\w.\-]+)", text), set()
    while todo:
        name = todo.pop()
        if name in named and name not in seen:
            seen.add(name)
            todo += re.findall(r"%([\w.\-]+)", named[name])
    return "\n".join(named[name] for name in sorted(seen))


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Without the checks of a test run (jaxtyping, beartype), as users run the library."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def slow(*case: Any) -> Any:
    """A case for `make test-all`."""
    return pytest.param(*case, marks=pytest.mark.slow)


def assert_raises(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """`call` is answered by exactly this sentence: the one that users see."""
    with unchecked(), pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
