"""Every step of every output tile is taken once, and all workers take as many."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _workers, config, sampled_dense
from pallas_kernels._workers import WHOLE

LENGTHS = st.lists(st.integers(0, 7), min_size=4, max_size=4)  # shapes compile, so they are few


@hypothesis.settings(max_examples=40)  # an example compiles
@hypothesis.given(LENGTHS, st.sampled_from([1, 2, 5]), st.sampled_from([1, 3, 14]), st.booleans())
def test_all_steps_of_all_tiles(lengths, tiles, workers, split):
    steps = np.array(lengths) + 1  # one more, to write
    starts = np.concatenate([[0], np.cumsum(steps * tiles)]).astype(np.int32)
    shares = _workers.shares(jnp.asarray(starts), tiles, workers, split=split)
    pieces, loads = walked(np.asarray(shares.spans), steps.repeat(tiles))
    joins = {int(tile): (w, int(n)) for w, (tile, n) in enumerate(shares.joins) if n}
    for tile, many in pieces.items():
        many.sort()
        assert [first for first, _, _ in many] == [0, *(last for _, last, _ in many[:-1])]
        assert many[-1][1] == steps.repeat(tiles)[tile]
        owners = [worker for _, _, worker in many]
        assert owners == list(range(owners[0], owners[0] + len(owners)))
        if len(many) > 1:
            assert split
            assert joins.pop(tile) == (owners[0], len(many) - 1)
    assert joins == {}
    assert sorted(pieces) == list(range(len(lengths) * tiles))
    assert not split or max(loads) - min(loads) <= 1


def walked(spans, steps):
    """Pieces (first, last, worker) of each tile, and the steps of each worker."""
    pieces, loads = {}, [0] * (len(spans) // 2)
    for i, (begin, into, count, end) in enumerate(spans):
        for k in range(count):
            tile = int(begin + k)
            first = int(into) if k == 0 else 0
            last = min(int(end), int(steps[tile])) if k == count - 1 else int(steps[tile])
            assert 0 <= first < last <= steps[tile]
            pieces.setdefault(tile, []).append((first, last, i // 2))
            loads[i // 2] += last - first
    return pieces, loads


def test_a_share_is_walked_from_the_first_tokens_on():
    """Workers whose share holds the start of a column begin there, all with the same tokens."""
    starts = jnp.arange(5, dtype=jnp.int32) * 8 * 10  # four columns of ten tiles of eight steps
    spans = np.asarray(_workers.shares(starts, 10, 3, split=True).spans)
    early = spans[::2]
    assert [int(tile) % 10 for tile in early[:, 0]] == [0, 0, 0]
    assert np.all(early[:, 1] == 0)
    assert np.all(spans[1::2, 3] == WHOLE)  # late ones end where a column does


@hypothesis.settings(max_examples=30)
@hypothesis.given(LENGTHS, st.sampled_from([1, 3]), st.integers(0, 2))
def test_groups(lengths, most, spare):
    ptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    e = int(ptr[-1]) + spare
    room = max(1, min(e, e // most + len(lengths)))
    table, total = sampled_dense._groups(jnp.asarray(ptr), most, room)
    assert table.shape == (3, room)
    slots = []
    for first, count, column in np.asarray(table).T[: int(total)]:
        assert 1 <= count <= most
        assert ptr[column] <= first < first + count <= ptr[column + 1]
        slots += range(first, first + count)
    assert slots == list(range(ptr[-1]))  # each once, no spare one
    sizes = np.asarray(table)[1, : int(total)]
    for column in range(len(lengths)):
        mine = sizes[np.asarray(table)[2, : int(total)] == column]
        assert len(mine) == 0 or mine.max() - mine.min() <= 1  # as even as can be


BLOCKS = [(a, b) for a in config.SIDES for b in config.SIDES if a * b <= config.BLOCK]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("out_bytes", [2, 4])
def test_every_block_has_a_launch_that_fits(block, out_bytes):
    assert config.why_not("bfloat16", block) is None
    for n in (1, 64, 65, 300, 8192):
        chosen = config.for_matmul(n, block, out_bytes)
        assert fits(chosen, block[1], out_bytes)
        assert block[0] % chosen.depth == 0
        padded = -(-n // chosen.tile) * chosen.tile
        assert padded <= max(config.ROWS, 1.25 * n, n + 127)
    chosen = config.for_sddmm(block, out_bytes)
    assert fits(chosen, block[1], out_bytes)
    assert chosen.tile % block[0] == 0


def fits(chosen, width, out_bytes):
    rows, odd = divmod(chosen.tile, chosen.warpgroups)
    staged = chosen.stages * 2 * chosen.depth * (chosen.tile + chosen.columns * width)
    out = chosen.tile * min(config.SLICE, width) * out_bytes
    return (
        odd == 0
        and rows % config.ROWS == 0
        and rows * chosen.columns * width <= config.ACCUMULATOR
        and chosen.stages >= 2
        and staged + out <= config.SHARED_MEMORY
    )


@pytest.mark.parametrize(
    ("tiles", "groups", "strands"), [(1, 1, 1), (6, 5, 1), (6, 5, 2), (8, 3, 8)]
)
def test_an_order_has_every_tile_once(tiles, groups, strands):
    """And as many steps before each as all tiles before it take."""
    order = _workers.Order(tiles, groups, strands)
    numbers = jnp.arange(tiles * groups)
    group, token = np.asarray(order.group(numbers)), np.asarray(order.token(numbers))
    assert sorted(zip(group, token, strict=True)) == [
        (g, t) for g in range(groups) for t in range(tiles)
    ]
    each = np.arange(1, groups + 1) ** 2  # steps
    steps = jnp.asarray(np.append(0, each.cumsum()), jnp.int32)
    before = np.append(0, each[group].cumsum())
    np.testing.assert_array_equal(order.starts(steps), before[:: tiles // strands])
    # tiles that are walked one after the other are of one group, `strands` apart
    one = token[: tiles // strands]
    np.testing.assert_array_equal(np.diff(one), strands)


def test_strands_keep_what_is_under_way_in_a_cache():
    """8192 x 8192 in groups of 128 columns, x 134 MB."""
    x = 2 * 8192**2

    def strands(density):
        return config.interleaved(32, 64, 132, x, round(density * x))

    assert [strands(density) for density in (0.05, 0.1, 0.25, 0.5)] == [1, 1, 4, 8]
    assert config.interleaved(1, 64, 132, x, x) == 1
    assert config.interleaved(6, 128, 132, x // 16, 3 * x) == 2
