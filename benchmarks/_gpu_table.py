"""The end of a run book: a short table of what was measured."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

type Record = dict[str, Any]

WORDS = 160  # of a reason


def table(records: Sequence[Record]) -> Iterator[str]:
    """Lines, the most telling last: that is where a terminal stops."""
    latest = {one["item"] or one["step"]: one for one in records}
    failed = {name: one["failed"] for name, one in latest.items() if one.get("failed")}
    if failed:
        yield "\n== failed"
    for name, why in failed.items():
        yield f"{name}: {_short(why)}"
    yield from _tests(records)
    yield from _tuner(records)
    yield from _peers(records)
    yield from sampled(records)
    yield from _products(records)
    yield from _ceilings(records)


def _of(records: Sequence[Record], benchmark: str) -> list[Record]:
    return [one for one in records if one.get("benchmark") == benchmark and not one.get("failed")]


def _tests(records: Sequence[Record]) -> Iterator[str]:
    tests = _of(records, "tests")
    if not tests:
        return
    counts = Counter(one["outcome"] for one in tests)
    yield "\n== tests: " + ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
    for one in tests:
        if one["outcome"] == "failed":
            yield f"{one['item'].rpartition('::')[2]}: {_short(one['why'])}"


def _tuner(records: Sequence[Record]) -> Iterator[str]:
    found = [one for one in _of(records, "tune") if one["us"]]
    if not found:
        return
    yield "\n== tuner: microseconds, heuristic -> best"
    for name in dict.fromkeys(one["item"] for one in found):
        ones = [one for one in found if one["item"] == name]
        best = min(ones, key=lambda one: one["us"])
        before = next((f"{one['us']:.1f}" for one in ones if one["heuristic"]), "none")
        config = {key: value for key, value in best["config"].items() if key != "workers"}
        yield f"{name}: {before} -> {best['us']:.1f} {config}"


def _peers(records: Sequence[Record]) -> Iterator[str]:
    found = _of(records, "peers gpu")
    if not found:
        return
    yield "\n== peers: time over dense time"
    for one in found:
        said = f"skipped: {_short(one['skipped'])}" if one["skipped"] else f"{one['ratio']:.3f}"
        yield f"{one['case']} {one['product']} {one['implementation']}: {said}"


def _products(records: Sequence[Record]) -> Iterator[str]:
    found = _of(records, "matmul gpu")
    if not found:
        return
    yield "\n== products: efficiency is FLOP/s of stored blocks over the dense product's"
    head = f"{'case':38} {'product':8} {'ms':>8} {'dense':>8} {'speed-up':>8} {'effic.':>7} "
    yield head + f"{'goal':>6} {'/floor':>7} {'/tiles':>7}"
    for one in found:
        start = f"{one['case']:38} {one['product']:8} "
        if one["refused"]:
            yield f"{start} REFUSED {_short(one['refused'])}"
            continue
        wanted = {name: value for name, value in one["goal"].items() if name != "of_floor"}
        goal = " ".join(
            f"{value:g}{'' if one['met'].get(name) else '!'}" for name, value in wanted.items()
        )
        yield (
            f"{start}{one['ms']:8.4f} {one['dense_ms']:8.4f} {one['speedup']:8.2f} "
            f"{one['efficiency']:7.3f} {goal or '-':>6} {one['of_floor']:7.2f} "
            f"{one['of_tile_floor']:7.2f}"
            + (f" over twin {one['over_twin']:.2f}" if "over_twin" in one else "")
            + (" (kernels)" if one["clock"] == "kernels" else "")
            + (" DIFFERS" if one["differs"] else "")
        )
    reached = [ok for one in found for ok in (one.get("met") or {}).values()]
    yield f"goals reached: {sum(reached)} of {len(reached)}; ! is one that was missed"


def sampled(records: Sequence[Record]) -> Iterator[str]:
    """A line for each sampled layer, its parts at the end."""
    found = _of(records, "sampled")
    if not found:
        return
    yield "\n== sampled layers: y, dx and dw, scores and sampling included, over the dense layer"
    width = max(len(one["case"]) for one in found)
    head = f"{'case':{width}} {'ms':>9} {'dense':>9} {'speed-up':>8} {'of ideal':>8} {'goal':>5} "
    yield head + f"{'/floor':>6}  ms of parts"
    for name in dict.fromkeys(one["case"] for one in found):
        parts = {one["part"]: one for one in found if one["case"] == name}
        layer = parts.pop("layer", {"skipped": "the layer was not asked for"})
        start = f"{name:{width}} "
        if "ms" not in layer:
            refused = layer.get("refused")
            said = f"REFUSED {_short(refused)}" if refused else "not measured"
            yield start + said + (f": {_short(layer['skipped'])}" if layer["skipped"] else "")
            continue
        wanted = layer["goal"].get("speedup")
        mark = "" if wanted is None or layer["met"]["speedup"] else "!"
        alone = (
            f"{part} {one['ms']:.4f}" if "ms" in one else f"{part} REFUSED"
            for part, one in parts.items()
        )
        goal = "-" if wanted is None else f"{wanted:g}{mark}"
        line = f"{start}{layer['ms']:9.4f} {layer['dense_ms']:9.4f} {layer['speedup']:8.2f} "
        line += f"{layer['efficiency']:8.2f} {goal:>5} {layer['of_floor']:6.2f}  "
        yield (line + ", ".join(alone)).rstrip()
    if reached := [ok for one in found for ok in (one.get("met") or {}).values()]:
        yield f"goals met: {sum(reached)} of {len(reached)}; ! is one that was missed"


def _ceilings(records: Sequence[Record]) -> Iterator[str]:
    found = _of(records, "ceilings")
    if found:
        text = (f"{one['ceiling']} {one['value']:.4g} {one['unit']}" for one in found)
        yield "\n== ceilings: " + ", ".join(text)


def _short(text: str) -> str:
    return " ".join(text.split())[:WORDS]
