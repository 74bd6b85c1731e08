"""The report of two runs side by side: A, and B against it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tasks.outcome.parts import Evaluation
from tasks.outcome.record import RunRecord
from tasks.report import figures, layer_figures
from tasks.report.parts import Figure, Page, Part, Section, Table, Text
from tasks.report.run import name, shown_config
from tasks.report.words import NONE, count, duration, known, number, percent, size

NOT_COMPARED = "not compared"
Show = Callable[[Any], str]


def page(a: RunRecord, b: RunRecord) -> Page:
    """What B changes against A, in numbers, config and layers."""
    same = same_text(a, b)
    sections: list[tuple[str, str, list[Part | None]]] = [
        ("summary", "Summary", [*_headline(a, b, same)]),
        ("numbers", "Numbers", [Table("A, B, and what B changes", ["", "A", "B", "B against A"], numbers(a, b, same is not None))]),
        ("measures", "Measures", [_measures(a, b)]),
        ("quality", "Quality against size", [_quality((a, same[0]), (b, same[1])) if same else None]),
        ("layers", "Error by layer", [layer_figures.difference(a.blocks, b.blocks)]),
        ("config", "Config", [_config(a, b)]),
    ]
    kept = [Section(key, title, [part for part in parts if part is not None]) for key, title, parts in sections]
    return Page(f"{name(a)} and {name(b)}", "Comparison of two runs", [section for section in kept if section.parts])


Pair = tuple[Evaluation, Evaluation]


def same_text(a: RunRecord, b: RunRecord) -> Pair | None:
    """The evaluations of both, if they are of the same held-out windows. Other windows, or another tokenizer: other numbers."""
    first, second = a.evaluation, b.evaluation
    return (first, second) if first and second and first.digest == second.digest else None


def _headline(a: RunRecord, b: RunRecord, same: Pair | None) -> list[Part]:
    before, after = a.assembly.bytes, b.assembly.bytes
    text = [f"A is {a.out}, B is {b.out}.", f"B is {size(after)} instead of {size(before)} ({percent(after / before - 1, signed=True)})."]
    if same is None:
        digests = [record.evaluation.digest[:12] for record in (a, b) if record.evaluation]
        why = "at least one was not evaluated"
        if len(digests) == 2:
            why = f"they were judged on different held-out windows (digests {' and '.join(digests)})"
        return [
            Text(" ".join(text), tone="lead"),
            Text(f"KL and perplexity are not compared: {why}. Two runs with the same evaluation section can be.", tone="warning"),
        ]
    for what, values in (("KL", [found.kl for found in same]), ("perplexity", [found.quantized_perplexity for found in same])):
        if all(map(known, values)):
            text.append(f"Its {what} is {number(values[1])} instead of {number(values[0])}.")
    return [Text(" ".join(text), tone="lead")]


def _numbers(record: RunRecord) -> list[tuple[str, Any, Show, bool]]:
    """[what, value, how it is shown, whether it is of the held-out text]."""
    sizes, found, peak = record.assembly, record.evaluation, record.peak_memory_bytes or {}
    return [
        ("size", sizes.bytes, size, False),
        ("bits per weight", sizes.bits_per_weight, number, False),
        ("quantized layers", sizes.quantized_layers, number, False),
        ("original perplexity", found and found.original_perplexity, number, True),
        ("perplexity", found and found.quantized_perplexity, number, True),
        ("KL per token (nats)", found and found.kl, number, True),
        ("same next token", found and found.top1_agreement, percent, True),
        ("answer flips", found and found.flips, percent, True),
        ("time", record.seconds, duration, False),
        ("peak memory", peak.get("host"), size, False),
        ("peak memory of the GPU", peak.get("gpu"), size, False),
    ]


def numbers(a: RunRecord, b: RunRecord, same: bool) -> list[list[str]]:
    """[what, A, B, difference]; numbers of the held-out text have none where the texts differ."""
    rows = []
    for (what, before, show, of_text), (_, after, _, _) in zip(_numbers(a), _numbers(b), strict=True):
        values = [before, after]
        if any(map(known, values)):
            shown = [show(value) if known(value) else NONE for value in values]
            rows.append([what, *shown, _change(values, of_text and not same, show)])
    if a.gate or b.gate:
        rows.append(["gate", *(record.gate.word if record.gate else "not set" for record in (a, b)), ""])
    return rows


def _change(values: list[Any], refused: bool, show: Show = number) -> str:
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


def _measures(a: RunRecord, b: RunRecord) -> Table | None:
    """Measures that both have by name, metric and protocol; one of another protocol is another measure."""
    lists = [record.evaluation.measures if record.evaluation else [] for record in (a, b)]
    found = [{(result.name, result.metric, result.protocol): result for result in results} for results in lists]
    rows = []
    for place in dict.fromkeys([*found[0], *found[1]]):
        pair = [side.get(place) for side in found]
        values = [result.quantized if result else None for result in pair]
        shown = [f"{number(result.quantized)} ({percent(result.recovery)})" if result else NONE for result in pair]
        rows.append([f"{place[0]} ({place[1]})", place[2] or "", *shown, _change(values, False)])
    return Table("Measures, and in brackets the recovery", ["measure", "protocol", "A", "B", "B against A"], rows) if rows else None


def _quality(a: tuple[RunRecord, Evaluation], b: tuple[RunRecord, Evaluation]) -> Figure:
    points = [
        figures.Point(f"{mark}: {name(record)}", record.assembly.bytes, found.quantized_perplexity, mark)
        for mark, (record, found) in (("A", a), ("B", b))
        if known(found.quantized_perplexity)
    ]
    return figures.quality_against_size(
        points,
        key="quality",
        title="Perplexity against size",
        label="perplexity",
        front=[],
        chosen=None,
        what="run",
        originals=figures.known_originals((record.assembly.original_bytes, found.original_perplexity) for record, found in (a, b)),
    )


def differences(a: Any, b: Any, key: str = "") -> list[list[str]]:
    """[dotted key, value in A, value in B] wherever the two differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [row for part in dict.fromkeys([*a, *b]) for row in differences(a.get(part), b.get(part), f"{key}.{part}" if key else part)]
    return [] if a == b else [[key, *("null" if value is None else str(shown_config(value)) for value in (a, b))]]


def _config(a: RunRecord, b: RunRecord) -> Part:
    rows = differences(a.config, b.config)
    same = "The two configs are equal." if not rows else ""
    return Table(f"{count(len(rows), 'key')} differ{'s' if len(rows) == 1 else ''}", ["key", "A", "B"], rows) if rows else Text(same)
