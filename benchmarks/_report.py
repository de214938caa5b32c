"""What people read of the records: a line while it runs, then tables, a summary and a picture."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import _plot as plot
from benchmarks._cases import AUTO, AUTO_FROM, GOALS, TEMPORARIES
from benchmarks._products import PRODUCTS, Record

COLORS = {8: "#5f6b73", 16: "#c2a02e", 32: "#3f8f5b", 64: "#d1662b", 128: "#17456e"}


def lines(records: Sequence[Record]) -> Iterator[str]:
    """The records of one case, a line for each implementation. Where `auto` is another's program in
    every product, the other's line says so."""
    groups = {name: ones for (name,), ones in _groups(records, "implementation")}
    auto = list(dict.fromkeys(one["program"] for one in groups.get("auto", [])))
    same = auto[0] if len(auto) == 1 and auto[0] != "auto" and auto[0] in groups else None
    for name, ones in groups.items():
        if name == "auto" and same:
            continue
        note = f" ({', '.join(auto)})" if name == "auto" else " = auto" if name == same else ""
        text = f"{where(ones[0])} {ones[0]['density']:.3f} {name}{note}:"
        yield text + "".join(f"  {one['product']} {_outcome(one)}" for one in ones)


def where(record: Record) -> str:
    """Size, pattern and block of a record."""
    k, m = record["shape"]
    dtype = "" if record["dtype"] == "float32" else f" {record['dtype']}"
    return f"{record['tokens']} tokens {k}x{m}{dtype} {record['pattern']} b={record['block'][0]}"


def _outcome(one: Record) -> str:
    if one["refused"]:
        return f"WRONG, not timed: {one['refused']}"
    if one["skipped"]:
        return f"skipped ({one['skipped']})"
    return f"{one['ratio']:.2f} ({one['ratio_low']:.2f}-{one['ratio_high']:.2f}) {one['ms']:.2f} ms"


def timed(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """The records that hold a time and these fields."""
    return [
        one for one in records if "ratio" in one and all(one[k] == v for k, v in wanted.items())
    ]


def _groups(
    records: Iterable[Record], *fields: str
) -> Iterator[tuple[tuple[Any, ...], list[Record]]]:
    def key(one: Record) -> tuple[Any, ...]:
        return tuple(tuple(v) if isinstance(v := one[f], list) else v for f in fields)

    for name, group in itertools.groupby(sorted(records, key=key), key):
        yield name, list(group)


def tables(records: Sequence[Record]) -> Iterator[str | Table]:
    """Time over dense time, one table for each size: forward, dx and dvalues in each cell."""
    ours = [one for one in records if not one["peer"]]
    for (dtype, shape, tokens), group in _groups(ours, "dtype", "shape", "tokens"):
        densities = sorted({one["density_asked"] for one in group})
        yield (
            f"\ntime / dense time of forward, dx and dvalues, by density: "
            f"{tokens} tokens, {shape[0]} x {shape[1]}, {dtype}"
        )
        table = Table()
        for name in ("pattern", "block", "run"):
            table.add_column(name, justify="right" if name == "block" else "left")
        for density in densities:
            table.add_column(f"{density:g}", justify="center")
        for key, rows in _groups(group, "pattern", "block", "implementation"):
            cells = [
                " ".join(
                    _cell([one for one in rows if (one["density_asked"], one["product"]) == at])
                    for at in itertools.product([density], PRODUCTS)
                )
                for density in densities
            ]
            table.add_row(key[0], str(key[1][0]), key[2], *cells)
        yield table


def _cell(found: Sequence[Record]) -> str:
    if not found:
        return "   -"
    one = found[0]
    if one["refused"]:
        return "[bold red]WRONG[/]"
    missed = one["met"] is False
    style = "red" if missed else "green" if one["ratio"] < 1 else "default"
    return f"[{style}]{one['ratio']:.2f}{'!' if missed else ''}[/]"


def summary(records: Sequence[Record]) -> Iterator[str]:
    """What the house wants to know, in a few lines."""
    refused = [one for one in records if one["refused"]]
    if refused:
        yield f"WRONG RESULTS, not timed: {len(refused)}"
        yield from (f"  {_named(one)}: {one['refused']}" for one in refused)
    auto = [one for one in timed(records, implementation="auto") if one["tokens"] >= AUTO_FROM]
    yield from _worst(auto, "ratio", f"`auto` from {AUTO_FROM} tokens up, time / dense time", AUTO)
    with_goal = [one for one in timed(records) if one["goal"] is not None]
    if with_goal:
        missed = [one for one in with_goal if not one["met"]]
        yield f"goals met: {len(with_goal) - len(missed)} of {len(with_goal)}"
        missed.sort(key=lambda one: one["goal"] / one["ratio"])
        yield from (
            f"  missed: {_named(one)}: {_spread(one, 'ratio')}, goal {one['goal']:.2f}"
            for one in missed[:8]
        )
        if len(missed) > 8:
            yield f"  and {len(missed) - 8} more, marked ! in the tables"
    hubs = [one for one in timed(records) if "over_random" in one]
    yield from _worst(hubs, "over_random", "hubs, time / that of a random pattern of equal blocks")
    ours = timed(records, tokens=2048, peer=False)
    memory = [one for one in ours if one["temporary_ratio"] is not None]
    for key, group in _groups(memory, "implementation"):
        what = f"temporaries of {key[0]} at 2048 tokens / bytes of x, y and values"
        yield from _worst(group, "temporary_ratio", what, TEMPORARIES)
    for _, group in _groups([one for one in records if one["peer"]], "tokens", "block"):
        yield from _peers(group, records)


def _worst(records: Sequence[Record], key: str, what: str, most: float | None = None) -> list[str]:
    if not records:
        return []
    worst = max(records, key=lambda one: one[key])
    verdict = "" if most is None else f" ({'met' if worst[key] <= most else 'MISSED'}: {most:g})"
    middle = sorted(one[key] for one in records)[len(records) // 2]
    return [
        f"{what}: at most {_spread(worst, key)}{verdict}, mostly {middle:.2f}",
        f"  worst: {_named(worst)}",
    ]


def _peers(group: Sequence[Record], records: Sequence[Record]) -> Iterator[str]:
    for _, rows in _groups(group, "density_asked"):
        size = {key: rows[0][key] for key in ("tokens", "shape", "block", "density", "pattern")}
        yield f"peers, {where(rows[0])} {rows[0]['density']:.3f}, time / dense time:"
        ours = timed(records, implementation="auto", **size)
        for (name,), ones in _groups([*ours, *rows], "implementation"):
            yield f"  {name}: " + ", ".join(f"{one['product']} {_peer(one)}" for one in ones)


def _peer(one: Record) -> str:
    return f"skipped ({one['skipped']})" if one["skipped"] else f"{one['ratio']:.2f}"


def _spread(one: Record, key: str) -> str:
    if f"{key}_low" not in one:
        return f"{one[key]:.2f}"
    return f"{one[key]:.2f} ({one[f'{key}_low']:.2f}-{one[f'{key}_high']:.2f})"


def _named(one: Record) -> str:
    return f"{one['product']}, {where(one)} {one['density']:.3f} {one['implementation']}"


def break_even(points: Iterable[tuple[float, float]]) -> tuple[float, str]:
    """The density where a ratio reaches 1, between two that were measured; for order and for
    people."""
    points = sorted(points)
    (before, low), _ = points[0], None
    if low >= 1:
        return 0.0, f"< {before:.2g}"
    for density, ratio in points[1:]:
        if ratio >= 1:
            at = before + (density - before) * (1 - low) / (ratio - low)
            return at, f"{at:.2f}"
        before, low = density, ratio
    return 1.0, f"> {before:.2g}"


def break_even_table(records: Sequence[Record]) -> Iterator[str | Table]:
    """Below which density the stored blocks alone are faster, as measured with random patterns."""
    found = timed(records, implementation="xla", pattern="random")
    if not found:
        return
    yield "\nbreak-even density of xla, random patterns"
    table = Table()
    for name in ("tokens", "weight", "dtype", "block", *PRODUCTS, "the least"):
        table.add_column(name, justify="right")
    for key, group in _groups(found, "tokens", "shape", "dtype", "block"):
        tokens, (k, m), dtype, block = key
        at = [
            break_even((one["density"], one["ratio"]) for one in ones)
            for ones in ([o for o in group if o["product"] == name] for name in PRODUCTS)
            if ones
        ]
        cells = [text for _, text in at] + ["-"] * (len(PRODUCTS) - len(at))
        table.add_row(str(tokens), f"{k}x{m}", dtype, str(block[0]), *cells, min(at)[1])
    yield table


def picture(records: Sequence[Record], path: Path, environment: Record) -> bool:
    """The PNG: a row for each size, a panel for each product. False if there is nothing to draw."""
    found = timed(records, pattern="random")
    found = [one for one in found if one["implementation"] in ("xla", "auto", "dense")]
    grid = []
    for (shape, tokens, dtype), group in _groups(found, "shape", "tokens", "dtype"):
        title = f"{{}}: {tokens} tokens, {shape[0]} x {shape[1]}, {dtype}"
        goals = _goals(tokens, shape, dtype)
        grid.append(
            [
                plot.Panel(
                    title.format(product),
                    goals + _lines([one for one in group if one["product"] == product]),
                )
                for product in PRODUCTS
            ]
        )
    if grid:
        cpu, jax = environment["cpu"], environment["jax"]
        machine = f"{cpu}, {environment['cores']} cores" if environment["platform"] == "cpu" else ""
        title = f"block-sparse over dense: {machine or environment['device']}, jax {jax}"
        plot.draw(path, grid, title)
    return bool(grid)


def _lines(records: Sequence[Record]) -> list[plot.Line]:
    keys = ("density", "ratio", "ratio_low", "ratio_high")
    return [
        plot.Line(
            name=f"block {block[0]}, {name}",
            color=COLORS.get(block[0], "#8d5a97"),
            points=[tuple(one[key] for key in keys) for one in group],  # pyright: ignore
            dashed=name != "xla",
        )
        for (block, name), group in _groups(records, "block", "implementation")
    ]


def _goals(tokens: int, shape: Sequence[int], dtype: str) -> list[plot.Line]:
    if (tokens, *shape, dtype) != (2048, 2048, 2048, "float32"):
        return []

    def line(slope: float, start: float) -> Callable:
        return lambda density: slope * density + start

    return [
        plot.Line(f"goal, block {block}", COLORS[block], goal=line(slope, start))
        for block, (slope, start) in sorted(GOALS.items())
    ]
