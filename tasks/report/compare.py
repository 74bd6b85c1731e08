"""Two runs side by side: A, and B against it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tasks.report import figures
from tasks.report.parts import Figure, Page, Part, Section, Table, Text
from tasks.report.run import name, shown_config
from tasks.report.words import NONE, count, duration, known, number, percent, size

NOT_COMPARED = "not compared"


def page(a: dict[str, Any], b: dict[str, Any]) -> Page:
    """What B changes against A, in numbers, config and layers."""
    same = same_text(a, b)
    sections = [
        ("summary", "Summary", _headline(a, b, same)),
        ("numbers", "Numbers", [Table("A, B, and what B changes", ["", "A", "B", "B against A"], numbers(a, b, same))]),
        ("measures", "Measures", [_measures(a, b)]),
        ("quality", "Quality against size", [_quality(a, b) if same else None]),
        ("layers", "Error by layer", [figures.difference(a.get("blocks") or [], b.get("blocks") or [])]),
        ("config", "Config", [_config(a, b)]),
    ]
    kept = [Section(key, title, [part for part in parts if part is not None]) for key, title, parts in sections]
    return Page(f"{name(a)} and {name(b)}", "Comparison of two runs", [section for section in kept if section.parts])


def same_text(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether KL and perplexity of both are of the same held-out windows. Other windows, or another tokenizer: other numbers."""
    digests = [(record.get("evaluation") or {}).get("digest") for record in (a, b)]
    return digests[0] is not None and digests[0] == digests[1]


def _headline(a: dict[str, Any], b: dict[str, Any], same: bool) -> list[Part]:
    sizes = [(record.get("assembly") or {}).get("bytes") for record in (a, b)]
    told = [f"A is {a.get('out')}, B is {b.get('out')}."]
    if all(map(known, sizes)):
        told.append(f"B is {size(sizes[1])} instead of {size(sizes[0])} ({percent(sizes[1] / sizes[0] - 1, signed=True)}).")
    found = [record.get("evaluation") or {} for record in (a, b)]
    if not same:
        digests = " and ".join(str(numbers.get("digest"))[:12] for numbers in found)
        why = f"they were judged on different held-out windows (digests {digests})" if all(found) else "at least one was not evaluated"
        return [
            Text(" ".join(told), tone="lead"),
            Text(f"KL and perplexity are not compared: {why}. Two runs with the same evaluation section can be.", tone="warning"),
        ]
    for key, what in (("kl", "KL"), ("quantized_perplexity", "perplexity")):
        before, after = (numbers.get(key) for numbers in found)
        if known(before) and known(after):
            told.append(f"Its {what} is {number(after)} instead of {number(before)}.")
    return [Text(" ".join(told), tone="lead")]


def numbers(a: dict[str, Any], b: dict[str, Any], same: bool) -> list[list[str]]:
    """[what, A, B, difference]; numbers of the held-out text have none where the texts differ."""
    rows = []
    for what, place, key, show, of_text in (
        ("size", "assembly", "bytes", size, False),
        ("bits per weight", "assembly", "bits_per_weight", number, False),
        ("quantized layers", "assembly", "quantized_layers", number, False),
        ("original perplexity", "evaluation", "original_perplexity", number, True),
        ("perplexity", "evaluation", "quantized_perplexity", number, True),
        ("KL per token (nats)", "evaluation", "kl", number, True),
        ("same next token", "evaluation", "top1_agreement", percent, True),
        ("answer flips", "evaluation", "flips", percent, True),
        ("time", None, "seconds", duration, False),
        ("peak memory", "peak_memory_bytes", "host", size, False),
        ("peak memory of the GPU", "peak_memory_bytes", "gpu", size, False),
    ):
        values = [((record.get(place) or {}) if place else record).get(key) for record in (a, b)]
        if any(map(known, values)):
            shown = [show(value) if known(value) else NONE for value in values]
            rows.append([what, *shown, _change(values, of_text and not same, show)])
    gates = [record.get("gate") for record in (a, b)]
    if any(gates):
        rows.append(["gate", *("not set" if not gate else "passed" if gate["passed"] else "failed" for gate in gates), ""])
    return rows


def _change(values: list[Any], refused: bool, show: Callable[[Any], str] = number) -> str:
    """What B has more, in the unit of the two, and as a share of A."""
    if refused:
        return f"{NOT_COMPARED}: other held-out text"
    if not all(map(known, values)):
        return NONE
    before, after = values
    if before == after:
        return "the same"
    text = ("+" if after > before else "-") + show(abs(after - before))
    if show is percent:
        return f"{text.removesuffix(' %')} points"
    return f"{text} ({percent(after / before - 1, signed=True)})" if before else text


def _measures(a: dict[str, Any], b: dict[str, Any]) -> Table | None:
    """Measures that both have by name, metric and protocol; one of another protocol is another measure."""
    lists = [(record.get("evaluation") or {}).get("measures") or [] for record in (a, b)]
    found = [{(row.get("name"), row.get("metric"), row.get("protocol")): row for row in rows} for rows in lists]
    rows = []
    for place in dict.fromkeys([*found[0], *found[1]]):
        pair = [side.get(place) for side in found]
        values = [row.get("quantized") if row else None for row in pair]
        told = [f"{number(value)} ({percent(row.get('recovery'))})" if row else NONE for row, value in zip(pair, values, strict=True)]
        rows.append([f"{place[0]} ({place[1]})", str(place[2] or ""), *told, _change(values, False)])
    return Table("Measures, and in brackets the recovery", ["measure", "protocol", "A", "B", "B against A"], rows) if rows else None


def _quality(a: dict[str, Any], b: dict[str, Any]) -> Figure | None:
    points, originals = [], set()
    for mark, record in (("A", a), ("B", b)):
        found, assembly = record["evaluation"], record.get("assembly") or {}
        points.append(
            {"name": f"{mark}: {name(record)}", "bytes": assembly.get("bytes"), "value": found.get("quantized_perplexity"), "mark": mark}
        )
        originals.add((assembly.get("original_bytes"), found.get("original_perplexity")))
    return figures.quality_against_size(
        points,
        key="quality",
        title="Perplexity against size",
        label="perplexity",
        front=[],
        chosen=None,
        what="run",
        originals=sorted((bytes_, value) for bytes_, value in originals if known(bytes_) and known(value)),
    )


def differences(a: Any, b: Any, key: str = "") -> list[list[str]]:
    """[dotted key, value in A, value in B] wherever the two differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [row for part in dict.fromkeys([*a, *b]) for row in differences(a.get(part), b.get(part), f"{key}.{part}" if key else part)]
    return [] if a == b else [[key, *("null" if value is None else str(shown_config(value)) for value in (a, b))]]


def _config(a: dict[str, Any], b: dict[str, Any]) -> Part:
    rows = differences(a.get("config") or {}, b.get("config") or {})
    same = "The two configs are equal." if not rows else ""
    return Table(f"{count(len(rows), 'key')} differ{'s' if len(rows) == 1 else ''}", ["key", "A", "B"], rows) if rows else Text(same)
