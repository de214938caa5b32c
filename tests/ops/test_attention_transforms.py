"""`attention` under the transformations of JAX, on meshes, its memory, and what may not retrace."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bsjax
from bsjax import masks
from bsjax.ops import _attention_choose as choose
from bsjax.ops._attention_core import _compiled
from bsjax.ops._attention_tile import Fixed, Operands, Spec
from tests.helpers import assert_close, normal, slow, unchecked
from tests.ops.attention import oracle

pytestmark = pytest.mark.usefixtures("quick_compilations")
N, S, H, G, D, B = 8, 24, 4, 2, 8, 8
MASK = masks.strided(4)
P, FULL = MASK.pattern((S, S), B)


def arrays(n=N):
    rng = np.random.default_rng(0)
    return [normal(rng, (n, S, heads, D)) for heads in (H, G, G)]


def attend(q, k, v, p=P, full=FULL, **more):
    return bsjax.attention(q, k, v, p, mask=MASK, full=full, implementation="xla", **more)


def gradients(f, *args):
    """The result and the gradients by one random cotangent."""
    out, pull = jax.vjp(f, *args)
    return out, *pull(normal(np.random.default_rng(9), out.shape))


def seen_by(mask):
    return np.asarray(mask(0, np.arange(S)[:, None], np.arange(S)[None]))


PLAIN = jax.jit(lambda *args: gradients(attend, *args))


TERMS = D + D + S  # products behind one number: of a score, of its gradient, of a sum over keys


def assert_same(got, want, layers=1):
    """The result and the gradients of q, k and v; after these, of what all queries share."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, layers * TERMS * (1 if i < 4 else N * S))


@pytest.mark.slow
def test_leading_axes():
    q, k, v = arrays()
    want = PLAIN(q, k, v)[0]
    split = lambda a: a.reshape(2, 4, *a.shape[1:])  # noqa: E731
    got = jax.jit(lambda *a: (attend(*map(split, a)), attend(*(x[0] for x in a))))(q, k, v)
    np.testing.assert_array_equal(got[0], split(want))
    np.testing.assert_array_equal(got[1], want[0])


@pytest.mark.slow
def test_vmap_over_elements():
    q, k, v = arrays()
    batched = jax.jit(lambda *args: gradients(jax.vmap(attend), *args))
    assert_same(batched(q, k, v), PLAIN(q, k, v))


def test_vmap_over_patterns():
    q, k, v = arrays()
    others = [masks.causal() & masks.window(i) for i in (1, 9)]
    made = [m.pattern((S, S), B, capacity=6) for m in others]
    p, full = jax.tree.map(lambda *a: jnp.stack(a), *made)
    reach = jnp.array([1, 9])

    def one(q, k, v, p, full, reach):
        mask = lambda h, q, k: (k <= q) & (k >= q - reach)  # noqa: E731
        return bsjax.attention(q, k, v, p, mask=mask, full=full, implementation="xla")

    got = jax.jit(jax.vmap(one))(q[:2], k[:2], v[:2], p, full, reach)
    seen = np.stack([seen_by(mask) for mask in others])[:, None]
    assert_close(got, oracle(q[:2], k[:2], v[:2], got, seen).out, TERMS)


WEIGHTS = (0.5, 1.5)


def test_scan_remat_and_checkpoint():
    q, k, v = arrays(2)

    def stack(q, k, v, wrap):
        def layer(x, w):
            return wrap(lambda x, w: x + attend(x * w, k, v))(x, w), None

        return jax.lax.scan(layer, q, jnp.array(WEIGHTS))[0]

    def unrolled(q, k, v):
        for w in WEIGHTS:
            q = q + attend(q * w, k, v)
        return q

    want = jax.jit(lambda *a: gradients(unrolled, *a))(q, k, v)
    got = jax.jit(lambda *a: gradients(lambda *b: stack(*b, jax.checkpoint), *a))(q, k, v)
    assert_same(got, want, len(WEIGHTS))


def test_another_mask_compiles_nothing():
    q, k, v = arrays(1)
    traces = []

    @jax.jit
    def f(q, k, v, ids, p, full):
        traces.append(0)
        mask = masks.causal() & masks.documents(ids)
        return bsjax.attention(q, k, v, p, mask=mask, full=full, implementation="xla")

    for cut in (5, 8, 23):
        ids = (np.arange(S) >= cut).astype(np.int32)
        mask = masks.causal() & masks.documents(ids)
        p, full = mask.pattern((S, S), B, capacity=6)
        got = f(q, k, v, ids, p, full)
        assert_close(got, oracle(q, k, v, got, seen_by(mask)).out, TERMS)
    assert len(traces) == 1


def test_outside_jit_an_equal_program_is_compiled_once():
    q, k, v = arrays(1)
    call = lambda shift: bsjax.attention(  # noqa: E731
        q, k, v, P, mask=lambda h, q, k: k <= q + shift, implementation="xla"
    )
    call(jnp.int32(0))
    before = _compiled._cache_size()
    call(jnp.int32(3))
    assert _compiled._cache_size() == before


def test_no_array_over_all_queries_and_keys():
    """Temporaries grow with the queries, and not with queries times keys."""

    def temporary(s, implementation):
        p, full = masks.causal().pattern((s, s), 64)
        shape = jax.ShapeDtypeStruct((1, s, 1, 32), jnp.float32)

        def f(q, k, v):
            return bsjax.attention(
                q, k, v, p, mask=masks.causal(), full=full, implementation=implementation
            ).sum()

        done = jax.jit(jax.grad(f, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
        square = re.findall(rf"\[(?:\d+,)*{s},(?:1,)?{s}\]", done.as_text())
        return square, done.memory_analysis().temp_size_in_bytes

    square, small = temporary(2048, "xla")
    assert square == []
    square, large = temporary(4096, "auto")
    assert square == []
    assert large < 2.2 * small
    assert large < 4096 * 4096 / 4  # a sixteenth of the scores
    assert temporary(512, "dense")[0]  # what is looked for can be found


def test_a_mask_of_128k_tokens_takes_milliseconds():
    for mask in (masks.streaming(4096, 64), masks.strided(512), masks.documents(np.arange(131072))):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            p, full = mask.pattern((131072, 131072), 128)
            jax.block_until_ready((p.row, full))
            times.append(time.perf_counter() - start)
        assert min(times) < 0.5  # some 30 ms on an idle machine


def on_a_mesh(q, k, v, bias, sinks, lengths, full=FULL):
    return attend(
        q, k, v, full=full, bias=bias, sinks=sinks, kv_lengths=lengths,
        dropout_rate=0.1, key=jax.random.key(2),
    )  # fmt: skip


def mesh_arguments():
    rng = np.random.default_rng(5)
    bias, sinks = normal(rng, (P.capacity, B, B)), normal(rng, (H,))
    return *arrays(), bias, sinks, jnp.arange(N, dtype=jnp.int32) + S - N


def on_mesh_gradients(*args):
    *differentiated, lengths = args
    return gradients(lambda *a: on_a_mesh(*a, lengths), *differentiated)


@pytest.mark.parametrize("kind", ["automatic", slow("explicit")])
def test_meshes(kind):
    """Batch elements stay where they are, and drop what they would drop on one device."""
    args = mesh_arguments()
    want = jax.jit(on_mesh_gradients)(*args)
    (_automatic if kind == "automatic" else _explicit)(args, want)


def _automatic(args, want):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    own = NamedSharding(mesh, PartitionSpec("data"))
    placed = [jax.device_put(a, own) if i in (0, 1, 2, 5) else a for i, a in enumerate(args)]
    done = jax.jit(on_mesh_gradients).lower(*placed).compile()
    assert "all-gather" not in done.as_text()
    assert_same(done(*placed), want)


def _explicit(args, want):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spec = PartitionSpec("data")
        placed = [
            jax.sharding.reshard(a, spec if i in (0, 1, 2, 5) else PartitionSpec())
            for i, a in enumerate(args)
        ]
        done = jax.jit(on_mesh_gradients).lower(*placed).compile()
        assert "all-gather" not in done.as_text()
        assert_same(done(*placed), want)


@pytest.mark.slow
def test_shard_map_over_elements_and_heads():
    q, k, v = arrays()
    want = PLAIN(q, k, v)
    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("data", None, "heads")
    local = jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    assert_same(jax.jit(lambda *a: gradients(local, *a))(q, k, v), want)


def test_shard_map_sums_what_devices_share():
    *args, lengths = mesh_arguments()
    f = lambda q, k, v, bias, sinks, lengths: attend(  # noqa: E731
        q, k, v, bias=bias, sinks=sinks, kv_lengths=lengths
    )
    want = jax.jit(lambda *a: gradients(lambda *b: f(*b, lengths), *a))(*args)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    own, whole = PartitionSpec("data"), PartitionSpec()
    local = jax.shard_map(f, mesh=mesh, in_specs=(own, own, own, whole, whole, own), out_specs=own)
    got = jax.jit(lambda *a: gradients(lambda *b: local(*b, lengths), *a))(*args)
    assert_same(got, want)


def test_export():
    q, k, v = arrays(1)
    exported = jax.export.export(jax.jit(attend))(q, k, v)
    loaded = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(loaded.call(q, k, v), attend(q, k, v))


def test_what_auto_runs():
    def on(platform, s, b, density):
        shape = jax.ShapeDtypeStruct((1, s, 8, 64), jnp.float32)
        row = jax.ShapeDtypeStruct((1, 1, round(density * (s // b) ** 2)), jnp.int32)
        x = Operands(shape, shape, shape, None, [], None)
        p = Fixed(row, row, None, [], [], [], None, None, None, None)
        spec = Spec(
            name="auto", grid=(s // b, s // b), block=(b, b), lengths=(s, s), scale=1.0,
            softcap=None, dropout_rate=0.0, masks=(), bias=None,
        )  # fmt: skip
        with unchecked():  # shapes in the place of arrays
            return choose.fastest(spec, x, p, platform)

    assert on("cpu", 512, 64, 0.9) == "dense"
    assert on("cpu", 512, 64, 0.2) == "xla"
    assert on("cpu", 4096, 64, 1.0) == "xla"
    assert on("cuda", 4096, 64, 0.1) == "dense"
    assert on("cuda", 131072, 128, 0.1) == "xla"
