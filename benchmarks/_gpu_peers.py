"""Packages that multiply block-sparse weights on a GPU: what each offers for our three products."""

import functools
import importlib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bsjax
from benchmarks import _products as products

MEMORY = 20e9  # bytes of temporaries


class Problem(NamedTuple):
    """A case in float32, on the host; the stored blocks in order of their columns."""

    x: np.ndarray
    dy: np.ndarray
    w: np.ndarray
    values: np.ndarray
    p: bsjax.BlockPattern
    dtype: str

    def rows(self, transpose: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pointers, columns and blocks of S (or of S^T), by block-rows."""
        row, col, values = np.asarray(self.p.row), np.asarray(self.p.col), self.values
        if transpose:
            row, col, values = col, row, values.swapaxes(1, 2)
        else:
            order = self.by_rows()
            row, col, values = row[order], col[order], values[order]
        blocks = self.p.grid[1 if transpose else 0]
        return np.searchsorted(row, np.arange(blocks + 1)), col, np.ascontiguousarray(values)

    def by_rows(self) -> np.ndarray:
        """The order of the slots by block-row."""
        return np.lexsort((np.asarray(self.p.col), np.asarray(self.p.row)))


class Forms(NamedTuple):
    """What a package offers: product -> name -> call; its dense products; how to wait for them."""

    sparse: dict[str, dict[str, Callable[[], Any]]]
    dense: dict[str, Callable[[], Any]]
    wait: Callable[[Any], None]
    host: Callable[[Any], np.ndarray]


def torch_forms(problem: Problem) -> Forms:
    """Block rows of PyTorch: `linear` has kernels of its own, `@` goes to cuSPARSE."""
    torch = importlib.import_module("torch")
    linear = torch.nn.functional.linear
    x, dy, w = (_torch(a, problem.dtype) for a in (problem.x, problem.dy, problem.w))
    s, t = (_bsr(problem, transpose) for transpose in (False, True))
    mask = torch.sparse_bsr_tensor(
        s.crow_indices(), s.col_indices(), torch.zeros_like(s.values()), s.shape
    )

    def sampled() -> Any:
        triton = importlib.import_module("torch.sparse._triton_ops")  # the public one takes CSR
        return triton.sampled_addmm(mask, x.T, dy, beta=0.0).values()

    return Forms(
        {
            "forward": {"linear": lambda: linear(x, t), "@": lambda: (t @ x.T).T},
            "dx": {"linear": lambda: linear(dy, s), "@": lambda: (s @ dy.T).T},
            "dvalues": {"sampled_addmm": sampled},
        },
        {"forward": lambda: x @ w, "dx": lambda: dy @ w.T, "dvalues": lambda: x.T @ dy},
        lambda _: torch.cuda.synchronize(),
        lambda y: y.float().cpu().numpy(),
    )


def stk_forms(problem: Problem) -> Forms:
    """stanford-stk: square blocks, as its kernels have them."""
    stk, torch = importlib.import_module("stk"), importlib.import_module("torch")
    x, dy, w = (_torch(a, problem.dtype) for a in (problem.x, problem.dy, problem.w))
    start, col, values = problem.rows()
    row = np.repeat(np.arange(len(start) - 1), np.diff(start))

    def index(a: np.ndarray, dtype: Any) -> Any:
        return torch.tensor(a, dtype=dtype, device="cuda")

    s = stk.Matrix(
        problem.p.shape,
        _torch(values, problem.dtype),
        index(row, torch.int16),
        index(col, torch.int16),
        index(start, torch.int32),
    )
    return Forms(
        {
            "forward": {"dds": lambda: stk.ops.dds(x, s)},
            "dx": {"dds of the transpose": lambda: stk.ops.dds(dy, s.t())},
            "dvalues": {"sdd": lambda: stk.ops.sdd(x.t(), dy, s).data},
        },
        {"forward": lambda: x @ w, "dx": lambda: dy @ w.T, "dvalues": lambda: x.T @ dy},
        lambda _: torch.cuda.synchronize(),
        lambda y: y.float().cpu().numpy(),
    )


def cupy_forms(problem: Problem) -> Forms:
    """cuSPARSE as CuPy offers it: single elements, in float32 (it has no blocks, and no product
    that gives the gradient of the values)."""
    cupy = importlib.import_module("cupy")
    csr_matrix = importlib.import_module("cupyx.scipy.sparse").csr_matrix
    x, dy, w = (cupy.asarray(a) for a in (problem.x, problem.dy, problem.w))
    s, t = (
        csr_matrix(tuple(cupy.asarray(a) for a in (data, column, start)), shape=shape)
        for transpose, shape in ((False, problem.p.shape), (True, problem.p.shape[::-1]))
        for start, column, data in [elements(problem, transpose)]
    )
    return Forms(
        {"forward": {"CSR": lambda: (t @ x.T).T}, "dx": {"CSR": lambda: (s @ dy.T).T}},
        {"forward": lambda: x @ w, "dx": lambda: dy @ w.T, "dvalues": lambda: x.T @ dy},
        lambda _: cupy.cuda.Device().synchronize(),
        cupy.asnumpy,
    )


def jax_forms(problem: Problem) -> Forms:
    """BCSR of single elements, in float32: it has no product with blocks as dense axes."""
    from jax.experimental import sparse

    x, dy, w = (jnp.asarray(a) for a in (problem.x, problem.dy, problem.w))
    s, t = (
        sparse.BCSR((jnp.asarray(data), jnp.asarray(column), jnp.asarray(start)), shape=shape)
        for transpose, shape in ((False, problem.p.shape), (True, problem.p.shape[::-1]))
        for start, column, data in [elements(problem, transpose)]
    )

    def turned(form: Any, tokens: jax.Array) -> Callable[[], Any]:
        built = functools.lru_cache(
            lambda: _small(jax.jit(lambda s, x: (s @ x.T).T).lower(form, tokens).compile())
        )
        return lambda: built()(form, tokens)

    full = {name: jax.jit(f) for name, f in products.FULL.items()}
    return Forms(
        {"forward": {"BCSR": turned(t, x)}, "dx": {"BCSR": turned(s, dy)}},
        {name: functools.partial(f, x, dy, w) for name, f in full.items()},
        jax.block_until_ready,
        np.asarray,
    )


PEERS: dict[str, Callable[[Problem], Forms]] = {
    "torch BSR": torch_forms,
    "stanford-stk": stk_forms,
    "cuSPARSE (CuPy)": cupy_forms,
    "jax.experimental.sparse": jax_forms,
}


def elements(problem: Problem, transpose: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pointers, columns and numbers of S (or of S^T) in CSR."""
    start, col, values = problem.rows(transpose)
    _, height, width = values.shape
    counts = np.repeat(np.diff(start) * width, height)
    pieces, columns = [], []
    for first, last in itertools.pairwise(start):
        pieces.append(values[first:last].swapaxes(0, 1).ravel())
        across = (col[first:last, None] * width + np.arange(width)).ravel()
        columns.append(np.tile(across, height))
    pointers = np.concatenate([[0], np.cumsum(counts)])
    one = np.concatenate([*pieces, np.empty(0, np.float32)])
    return pointers.astype(np.int32), np.concatenate([*columns, []]).astype(np.int32), one


def _small(program: Any) -> Any:
    needs = products.temporary_bytes(program) or 0
    if needs > MEMORY:
        raise MemoryError(f"{needs / 1e9:.0f} GB of temporaries, the limit is {MEMORY / 1e9:g}")
    return program


def _torch(a: np.ndarray, dtype: str) -> Any:
    torch = importlib.import_module("torch")
    return torch.tensor(a, device="cuda").to(getattr(torch, dtype))


def _bsr(problem: Problem, transpose: bool) -> Any:
    torch = importlib.import_module("torch")
    start, col, values = problem.rows(transpose)
    (r, c) = problem.p.shape
    return torch.sparse_bsr_tensor(
        torch.tensor(start, device="cuda"),
        torch.tensor(col.astype(np.int64), device="cuda"),
        _torch(values, problem.dtype),
        (c, r) if transpose else (r, c),
    )
