"""What else runs attention on a GPU, on our cases: JAX's own Mosaic kernel, which is dense, and
PyTorch's FlexAttention, which skips blocks. What is missing, fails or is wrong is skipped, and the
record says why. Times are those of the wall over calls that are queued back to back, beside the
fused dense attention of the same framework.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bsjax
from benchmarks import _attention as suite
from benchmarks import _gpu_kernels as kernels
from benchmarks._attention import FORWARD, WHAT, Case, Made, Record
from benchmarks._timing import beside
from benchmarks.peers import race, relative, timed

type Run = Callable[[], Any]  # y, or (y, dq, dk, dv)


class Attention(NamedTuple):
    """What a package offers: forms of each pass, its dense ones, how to wait, and to fetch."""

    forms: Mapping[str, Mapping[str, Run]]
    dense: Mapping[str, Run]
    wait: Callable[[Any], Any]
    host: Callable[[Any], np.ndarray]
    sparse: bool = False


def mosaic_dense(made: Made, args: Any) -> Attention:
    """`attention_mgpu` of JAX: dense or causal, no scale; its backward pass has no causal form."""
    mgpu = importlib.import_module("jax.experimental.pallas.ops.gpu.attention_mgpu")
    q, k, v, dout = args

    def attend(config: Any) -> Callable[..., Any]:
        return lambda q, k, v: mgpu.attention(q * q.shape[-1] ** -0.5, k, v, config)

    def both(f: Callable[..., Any]) -> Run:
        run = suite.with_gradients(f)
        return lambda: run(q, k, v, dout)

    def only(f: Callable[..., Any]) -> Run:
        run = jax.jit(f)
        return lambda: run(q, k, v)

    forward, backward = {}, {}
    for side, steps in itertools.product((128, 64), (2, 4)):
        back = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 64)
        config = mgpu.TuningConfig(
            block_q=64, block_kv=side, max_concurrent_steps=steps, causal=made.causal, **back
        )
        name = f"64 x {side}, {steps} steps"
        forward[name] = only(attend(config))
        if not made.causal:
            backward[name] = both(attend(config))
    dense: Any = suite.dense(made, suite.peer(q.dtype))
    return Attention(
        dict(zip(WHAT, (forward, backward), strict=True)),
        dict(zip(WHAT, (only(dense), both(dense)), strict=True)),
        jax.block_until_ready,
        lambda a: np.asarray(a.astype(jnp.float32)),
    )


def flex(made: Made, args: Any) -> Attention:
    """FlexAttention, compiled, with the stored blocks as its block mask; beside PyTorch's
    `scaled_dot_product_attention`. Heads come before positions there."""
    torch = importlib.import_module("torch")
    flexible = importlib.import_module("torch.nn.attention.flex_attention")
    kind = {jnp.dtype(jnp.bfloat16): torch.bfloat16}.get(args[0].dtype, torch.float16)
    q, k, v, dout = (
        torch.tensor(np.asarray(a.astype(jnp.float32)).swapaxes(1, 2), dtype=kind, device="cuda")
        for a in args
    )
    for a in (q, k, v):
        a.requires_grad_()
    blocks = block_mask(torch, flexible, made, q.shape[2], "cuda")
    compiled = torch.compile(flexible.flex_attention)
    dot = torch.nn.functional.scaled_dot_product_attention

    def passes(attend: Callable[[], Any]) -> dict[str, Run]:
        def both() -> Any:
            y = attend()
            return y, *torch.autograd.grad(y, (q, k, v), dout)

        def only() -> Any:
            with torch.no_grad():
                return attend()

        return dict(zip(WHAT, (only, both), strict=True))

    ours = passes(lambda: compiled(q, k, v, block_mask=blocks))
    return Attention(
        {what: {"compiled": run} for what, run in ours.items()},
        passes(lambda: dot(q, k, v, is_causal=made.causal)),
        lambda _: torch.cuda.synchronize(),
        lambda a: a.detach().float().cpu().numpy().swapaxes(1, 2),
        sparse=True,
    )


def block_mask(torch: Any, flexible: Any, made: Made, tokens: int, device: str) -> Any:
    """The stored blocks, as FlexAttention counts them: partial ones, and full ones."""
    mask = full = np.asarray(made.p.mask())
    width = made.window
    if width is not None:
        full, at = np.zeros_like(mask), np.flatnonzero(np.asarray(made.full))
        full[np.asarray(made.p.row)[at], np.asarray(made.p.col)[at]] = True

    def see(b: Any, h: Any, q: Any, k: Any) -> Any:
        del b, h
        return (q >= k) & (q - k <= width)

    def listed(stored: np.ndarray) -> tuple[Any, Any]:
        """Of each block of queries how many, and the columns of these first."""
        order = np.argsort(~stored, axis=1, kind="stable")
        both = (stored.sum(1)[None, None], order[None, None])
        return tuple(torch.tensor(a.astype(np.int32), device=device) for a in both)  # pyright: ignore[reportReturnType]

    return flexible.BlockMask.from_kv_blocks(
        *listed(mask & ~full),
        *listed(full),
        BLOCK_SIZE=made.p.block,
        mask_mod=see if made.causal else None,
        seq_lengths=(tokens, tokens),
    )


def whole(case: Case, made: Made) -> Made:
    """Dense attention, or causal if that is."""
    if made.causal:
        return suite.window(case, case.tokens)
    every = np.ones(made.p.grid, bool)
    return Made(bsjax.BlockPattern.from_mask(every, case.block))


def wanted(made: Made, args: Any) -> tuple[np.ndarray, ...]:
    """y, dq, dk and dv by XLA, in float32."""
    run = suite.with_gradients(suite.sparse(made, "xla"))
    with jax.default_matmul_precision("highest"):
        found = run(*(a.astype(jnp.float32) for a in args), made.p, made.full)
    return tuple(map(np.asarray, found))


PEERS = {"jax attention_mgpu": mosaic_dense, "FlexAttention": flex}


def measure(
    name: str, case: Case, seed: int, offers: Callable[[Made, Any], Attention] | None = None
) -> Iterator[Record]:
    """A record for each pass."""
    made, args = suite.PATTERNS[case.pattern](case, seed), suite.draws(case, seed)
    about = {"benchmark": "attention peers"} | suite.describe(case, made)
    about |= {"implementation": name, "clock": "wall"}
    try:
        found = (offers or PEERS[name])(made, args)
    except Exception as error:  # not installed, too old, no such mask: all of it is a reason
        for what in WHAT:
            yield about | {"what": what, "skipped": kernels.said(error)}
        return
    want = wanted(made if found.sparse else whole(case, made), args)
    yield from (about | {"what": what} | _timed(what, found, want) for what in WHAT)


def _timed(what: str, found: Attention, want: tuple[np.ndarray, ...]) -> Record:
    """The fastest form of a pass that is right, or why there is none."""

    def wrong(got: Any) -> str | None:
        got = map(found.host, (got,) if what == FORWARD else got)
        return next(filter(None, map(relative, got, want)), None)

    def clock(run: Run) -> Record:
        return beside(**race({"ours": run, "dense": found.dense[what]}, found.wait))

    times, reasons = timed(found.forms[what], wrong, clock)
    if not times:
        return {"skipped": "; ".join(reasons) or "it has no such pass"}
    best = min(times, key=lambda form: times[form]["ms"])
    return {"program": best, "reasons": reasons} | times[best]
