"""Figures of quality, measures and time, each a function from plain numbers to a Figure: plot, words and table say the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import plotly.graph_objects as go

from tasks.outcome.parts import MeasureResult
from tasks.report.parts import Figure, Table
from tasks.report.plots import BLUE, GREY, ORANGE, VERMILION, figure, name_axis, plain
from tasks.report.words import duration, known, number, percent, size, size_unit


@dataclass(frozen=True)
class Point:
    """A checkpoint in a plot of quality against size."""

    name: str
    bytes: float
    value: float
    mark: str = ""
    """Short text beside the point."""
    group: str | None = None
    """Points of one group can be compared."""


def known_originals(found: Iterable[tuple[int | None, float | None]]) -> list[tuple[float, float]]:
    """(bytes, value) of the originals of which both are known, each once, in order."""
    return sorted({(bytes_, value) for bytes_, value in found if known(bytes_) and known(value)})


def quality_against_size(
    points: list[Point],
    *,
    key: str,
    title: str,
    label: str,
    front: list[str],
    chosen: str | None,
    originals: list[tuple[float, float]],
    what: str,
) -> Figure:
    """Checkpoints by size and quality, with the front as a line; the value of each point is known.

    originals: (bytes, value) of the unquantized model, one for each model or text. what: points are called so in the table.
    """
    scale, unit = size_unit(max([point.bytes for point in points] + [bytes_ for bytes_, _ in originals], default=1))
    values = [point.value for point in points if point.value > 0]
    log = bool(values) and max(values) > 10 * min(values)
    floor = min(values) / 2 if log else 0.0  # a logarithmic axis has no 0: the original's KL stands at its lower edge
    rest = [point for point in points if point.name not in front and point.name != chosen]
    on = sorted((point for point in points if point.name in front), key=lambda point: point.bytes)
    traces = [_points(rest, what + "s", GREY, "circle", scale, unit, label)] if rest else []
    for index, group in enumerate(dict.fromkeys(point.group for point in on)):
        alike = [point for point in on if point.group == group]
        trace = _points(alike, "Pareto front", BLUE, "circle", scale, unit, label)
        traces.append(trace.update(mode="lines+markers+text", line={"shape": "hv", "color": BLUE, "width": 2}, showlegend=index == 0))
    best = [point for point in points if point.name == chosen]
    if best:
        shown = [replace(point, mark="" if point in on else point.mark) for point in best]
        traces.append(_points(shown, "recommended" if front else what, VERMILION, "star", scale, unit, label).update(marker_size=16))
    for index, (bytes_, value) in enumerate(originals):
        at = value if value > 0 or not log else floor
        traces.append(_original(bytes_, value, at, scale, label).update(showlegend=index == 0))
    table = Table(
        title,
        [what, "size", label, "on the front"],
        [
            [point.name, size(point.bytes), number(point.value), "yes" if point.name in front else "no"]
            for point in sorted(points, key=lambda point: point.bytes)
        ]
        + [["original", size(bytes_), number(value), ""] for bytes_, value in originals],
    )
    description = (
        f"Scatter plot of {len(points)} {what}{'' if len(points) == 1 else 's'}: {label} against size in {unit}; lower and further "
        "left is better." + (f" {len(on)} on the Pareto front." if front else "")
    )
    drawn = [point.value for point in points] + [value for _, value in originals]
    y = _logarithmic(min(filter(None, [*drawn, floor])), max(drawn)) if log else _linear(drawn)
    layout = {
        "height": 420,
        "xaxis": {"title": {"text": f"size ({unit})"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": label + (", logarithmic" if log else "")}, **y},
    }
    return figure(key, title, description, traces, layout, table)


def _original(bytes_: float, value: float, at: float, scale: float, label: str) -> go.Scatter:
    """at: where on the axis it stands."""
    edge = " (0 has no place on this axis: at its lower edge)" if at != value else ""
    return go.Scatter(
        x=[bytes_ / scale],
        y=[at],
        mode="markers+text",
        text=["original" if at == value else "original (0)"],
        textposition="bottom left" if at == value else "top left",
        name="original",
        marker={"symbol": "diamond", "size": 12, "color": ORANGE},
        hoverinfo="text",
        hovertext=[f"original<br>{size(bytes_)}<br>{label} {number(value)}{edge}"],
        cliponaxis=False,
    )


def _logarithmic(low: float, high: float) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 of every power of ten: plotly's own would stand too close."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [lead * 10.0**power for power in powers for lead in (1, 2, 5)]
    return {
        "type": "log",
        "tickvals": marks,
        "ticktext": [f"{mark:.4g}" for mark in marks],
        "range": [math.log10(low) - 0.1, math.log10(high) + 0.1],
    }


def _linear(values: list[float]) -> dict[str, Any]:
    """An axis of at least a tenth of the largest value: a shorter one would make any difference look large."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = max(0.08 * (high - low), (0.1 * abs(high) - (high - low)) / 2)
    return {"type": "linear", "range": [low - pad, high + pad]}


def _points(points: list[Point], name: str, color: str, symbol: str, scale: float, unit: str, label: str) -> go.Scatter:
    return go.Scatter(
        x=[point.bytes / scale for point in points],
        y=[point.value for point in points],
        mode="markers+text",
        name=name,
        text=[plain(point.mark) for point in points],
        textposition="top right",
        cliponaxis=False,
        hoverinfo="text",
        hovertext=[
            f"<b>{plain(point.name)}</b><br>{point.bytes / scale:.4g} {unit}<br>{plain(label)} {number(point.value)}" for point in points
        ],
        marker={"color": color, "symbol": symbol, "size": 10},
    )


def recovery(results: list[MeasureResult]) -> Figure | None:
    """What is left of each score of the original, with its interval."""
    rows = [(row.recovery, row) for row in results if known(row.recovery)]
    if not rows:
        return None
    traces = []
    for inside, name, color, symbol in (
        (True, "inside the noise", BLUE, "circle"),
        (False, "outside the noise", VERMILION, "diamond"),
        (None, "noise not known", GREY, "square"),
    ):
        some = [row for row in rows if row[1].inside_noise is inside]
        if not some:
            continue
        traces.append(
            go.Scatter(
                x=[value for value, _ in some],
                y=[plain(measure_name(row)) for _, row in some],
                mode="markers",
                name=name,
                hoverinfo="text",
                hovertext=[plain(f"{measure_name(row)}: {percent(value)} {interval(row)}") for value, row in some],
                marker={"color": color, "symbol": symbol, "size": 11},
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "color": color,
                    "thickness": 2,
                    "array": [_end(row, 1, value) - value for value, row in some],
                    "arrayminus": [value - _end(row, 0, value) for value, row in some],
                },
            )
        )
    table = Table(
        "Recovery by measure",
        ["measure", "recovery", "95 % interval"],
        [[measure_name(row), percent(value), interval(row)] for value, row in rows],
    )
    layout = {
        "height": 120 + 34 * len(rows),
        "xaxis": {"title": {"text": "recovery (1: as good as the original)"}},
        "yaxis": {"autorange": "reversed", **name_axis([measure_name(row) for _, row in rows])},
        "shapes": [{"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": GREY, "dash": "dot"}}],
    }
    description = f"Recovery of {len(rows)} measures with 95 % intervals; the dotted line at 1 is the original."
    return figure("recovery", "What is left of the original's scores", description, traces, layout, table)


def measure_name(result: MeasureResult) -> str:
    return f"{result.name} ({result.metric})"


def _end(result: MeasureResult, end: int, recovery: float) -> float:
    """An end of the interval; the recovery itself where there is none."""
    bound = result.interval[end] if result.interval else None
    return bound if known(bound) else recovery


def interval(result: MeasureResult) -> str:
    ends = result.interval
    return f"{percent(ends[0])} to {percent(ends[1])}" if ends and all(map(known, ends)) else "no interval"


def stages(seconds: Mapping[str, float | None], total: float | None) -> Figure | None:
    """Where the time went, longest first; what no stage counted is `other`."""
    found = {stage: spent for stage, spent in seconds.items() if known(spent)}
    if not found:
        return None
    if known(total) and total > sum(found.values()):
        found["other"] = total - sum(found.values())
    found = dict(sorted(found.items(), key=lambda item: -item[1]))
    whole = sum(found.values()) or 1.0
    trace = go.Bar(
        x=list(found.values()),
        y=[plain(stage) for stage in found],
        orientation="h",
        marker={"color": BLUE},
        hoverinfo="text",
        hovertext=[f"{plain(stage)}: {duration(spent)}, {percent(spent / whole, 0)}" for stage, spent in found.items()],
        text=[duration(spent) for spent in found.values()],
        textposition="auto",
    )
    table = Table(
        "Time by stage",
        ["stage", "seconds", "share"],
        [[stage, number(spent), percent(spent / whole, 0)] for stage, spent in found.items()],
    )
    layout = {
        "height": 100 + 32 * len(found),
        "xaxis": {"title": {"text": "seconds"}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", **name_axis(list(found))},
    }
    longest = next(iter(found))
    description = (
        f"Bar chart of {len(found)} stages, {duration(whole)} in all; the longest: {longest}, {percent(found[longest] / whole, 0)}."
    )
    return figure("stages", "Time by stage", description, [trace], layout, table)
