"""The plotly figures, each a function from plain numbers to a Figure: plot, words and table say the same.

Colours are those of Okabe and Ito, and cividis or PuOr for heat maps: told apart with any eyes. They are the light page's; draw.js
puts others in their place where the page is dark (DARK). Text that plotly shows goes through `plain`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import plotly.graph_objects as go

from tasks.outcome.record import short_name
from tasks.report.parts import Figure, Table
from tasks.report.words import duration, known, number, percent, size, size_unit

BLUE, ORANGE, VERMILION, GREY, BLACK = "#0072b2", "#e69f00", "#d55e00", "#6b6b6b", "#000000"
DARK = {BLUE: "#56b4e9", VERMILION: "#ff8a3d", GREY: "#a8a8a8", BLACK: "#ffffff"}
"""A colour of the light page: the one in its place on the dark page."""
MOST_ROWS = 64
"""Rows of a heat map; with more (the experts of a large MoE) one row tells the worst of all experts."""

LONGEST = 26
"""Characters of a name beside a plot."""

EXPERT = re.compile(r"\bexperts\.(\d+)\b")
Blocks = list[dict[str, Any]]


def plain(text: Any) -> str:
    """Text that plotly shows as it is: it would read tags in it."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _names(names: list[str]) -> dict[str, Any]:
    """An axis of names: long ones lose their middle, or on a phone nothing would be left of the plot. Hover and table have them whole."""
    axis: dict[str, Any] = {"type": "category"}
    if any(len(name) > LONGEST for name in names):
        cut = [name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[1 - LONGEST // 2 :]}" for name in names]
        axis |= {"tickvals": list(map(plain, names)), "ticktext": list(map(plain, cut))}
    return axis


def _figure(key: str, title: str, told: str, traces: list[Any], layout: dict[str, Any], table: Table) -> Figure:
    axes = {axis: {"automargin": True, "zeroline": False, **layout.pop(axis, {})} for axis in ("xaxis", "yaxis")}
    for axis in axes.values():
        if "title" in axis:
            axis["title"] = {"standoff": 10} | axis["title"]
    look = {
        "template": "none",
        "dragmode": False,
        "margin": {"l": 8, "r": 16, "t": 24, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
    }
    drawn = go.Figure(traces, look | axes | layout)
    plot = drawn.to_plotly_json()
    plot["layout"].pop("template", None)
    return Figure(key, title, told, {"data": plot["data"], "layout": plot["layout"]}, table)


# -- quality and size -----------------------------------------------------------------------------------------------------


def quality_against_size(
    points: list[dict[str, Any]],
    *,
    key: str,
    title: str,
    label: str,
    front: list[str],
    chosen: str | None,
    originals: list[tuple[float, float]],
    what: str,
) -> Figure:
    """points: {"name", "bytes", "value", "mark": short text beside the point, "group": what it may be compared within}.

    originals: (bytes, value) of the unquantized model, one for each model or text. what: points are called so in the table.
    """
    points = [point for point in points if known(point["bytes"]) and known(point["value"])]
    scale, unit = size_unit(max([point["bytes"] for point in points] + [bytes_ for bytes_, _ in originals], default=1))
    values = [point["value"] for point in points if point["value"] > 0]
    log = bool(values) and max(values) > 10 * min(values)
    floor = min(values) / 2 if log else 0.0  # a logarithmic axis has no 0: the original's KL stands at its lower edge
    rest = [point for point in points if point["name"] not in front and point["name"] != chosen]
    on = sorted((point for point in points if point["name"] in front), key=lambda point: point["bytes"])
    traces = [_points(rest, what + "s", GREY, "circle", scale, unit, label)] if rest else []
    for index, group in enumerate(dict.fromkeys(point.get("group") for point in on)):
        alike = [point for point in on if point.get("group") == group]
        trace = _points(alike, "Pareto front", BLUE, "circle", scale, unit, label)
        traces.append(trace.update(mode="lines+markers+text", line={"shape": "hv", "color": BLUE, "width": 2}, showlegend=index == 0))
    best = [point for point in points if point["name"] == chosen]
    if best:
        shown = [{**point, "mark": "" if point in on else point.get("mark", "")} for point in best]
        traces.append(_points(shown, "recommended" if front else what, VERMILION, "star", scale, unit, label).update(marker_size=16))
    for index, (bytes_, value) in enumerate(originals):
        at = value if value > 0 or not log else floor
        edge = " (0 has no place on this axis: at its lower edge)" if at != value else ""
        traces.append(
            go.Scatter(
                x=[bytes_ / scale],
                y=[at],
                mode="markers+text",
                text=["original" if at == value else "original (0)"],
                textposition="bottom left" if at == value else "top left",
                name="original",
                showlegend=index == 0,
                marker={"symbol": "diamond", "size": 12, "color": ORANGE},
                hoverinfo="text",
                hovertext=[f"original<br>{size(bytes_)}<br>{label} {number(value)}{edge}"],
                cliponaxis=False,
            )
        )
    table = Table(
        title,
        [what, "size", label, "on the front"],
        [
            [point["name"], size(point["bytes"]), number(point["value"]), "yes" if point["name"] in front else "no"]
            for point in sorted(points, key=lambda point: point["bytes"])
        ]
        + [["original", size(bytes_), number(value), ""] for bytes_, value in originals],
    )
    told = (
        f"Scatter plot of {len(points)} {what}{'' if len(points) == 1 else 's'}: {label} against size in {unit}; lower and further "
        "left is better." + (f" {len(on)} on the Pareto front." if front else "")
    )
    drawn = [point["value"] for point in points] + [value for _, value in originals]
    y = _logarithmic(min(filter(None, [*drawn, floor])), max(drawn)) if log else _linear(drawn)
    layout = {
        "height": 420,
        "xaxis": {"title": {"text": f"size ({unit})"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": label + (", logarithmic" if log else "")}, **y},
    }
    return _figure(key, title, told, traces, layout, table)


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
    """At least a tenth of the largest value from end to end: an axis of its own would make any difference look large."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = max(0.08 * (high - low), (0.1 * abs(high) - (high - low)) / 2)
    return {"type": "linear", "range": [low - pad, high + pad]}


def _points(points: list[dict[str, Any]], name: str, color: str, symbol: str, scale: float, unit: str, label: str) -> go.Scatter:
    return go.Scatter(
        x=[point["bytes"] / scale for point in points],
        y=[point["value"] for point in points],
        mode="markers+text",
        name=name,
        text=[plain(point.get("mark", "")) for point in points],
        textposition="top right",
        cliponaxis=False,
        hoverinfo="text",
        hovertext=[
            f"<b>{plain(point['name'])}</b><br>{point['bytes'] / scale:.4g} {unit}<br>{plain(label)} {number(point['value'])}"
            for point in points
        ],
        marker={"color": color, "symbol": symbol, "size": 10},
    )


def recovery(measures: list[dict[str, Any]]) -> Figure | None:
    """What is left of each score of the original, with its interval."""
    rows = [row for row in measures if known(row.get("recovery"))]
    if not rows:
        return None
    traces = []
    for inside, name, color, symbol in (
        (True, "inside the noise", BLUE, "circle"),
        (False, "outside the noise", VERMILION, "diamond"),
        (None, "noise not known", GREY, "square"),
    ):
        some = [row for row in rows if row.get("inside_noise") is inside]
        if not some:
            continue
        low, high = ([_end(row, end) for row in some] for end in (0, 1))
        traces.append(
            go.Scatter(
                x=[row["recovery"] for row in some],
                y=[plain(measure_name(row)) for row in some],
                mode="markers",
                name=name,
                hoverinfo="text",
                hovertext=[plain(f"{measure_name(row)}: {percent(row['recovery'])} {interval(row)}") for row in some],
                marker={"color": color, "symbol": symbol, "size": 11},
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "color": color,
                    "thickness": 2,
                    "array": [end - row["recovery"] for row, end in zip(some, high, strict=True)],
                    "arrayminus": [row["recovery"] - end for row, end in zip(some, low, strict=True)],
                },
            )
        )
    table = Table(
        "Recovery by measure",
        ["measure", "recovery", "95 % interval"],
        [[measure_name(row), percent(row["recovery"]), interval(row)] for row in rows],
    )
    layout = {
        "height": 120 + 34 * len(rows),
        "xaxis": {"title": {"text": "recovery (1: as good as the original)"}},
        "yaxis": {"autorange": "reversed", **_names([measure_name(row) for row in rows])},
        "shapes": [{"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": GREY, "dash": "dot"}}],
    }
    told = f"Recovery of {len(rows)} measures with 95 % intervals; the dotted line at 1 is the original."
    return _figure("recovery", "What is left of the original's scores", told, traces, layout, table)


def measure_name(row: dict[str, Any]) -> str:
    return f"{row.get('name', '?')} ({row.get('metric', '?')})"


def _end(row: dict[str, Any], end: int) -> float:
    ends = row.get("interval") or [None, None]
    return ends[end] if known(ends[end]) else row["recovery"]


def interval(row: dict[str, Any]) -> str:
    ends = row.get("interval") or []
    return f"{percent(ends[0])} to {percent(ends[1])}" if len(ends) == 2 and all(map(known, ends)) else "no interval"


# -- layers ---------------------------------------------------------------------------------------------------------------


def by_place(blocks: Blocks) -> dict[tuple[str, int], dict[str, Any]]:
    """(name within the block, block) to layer; of more rows than a heat map takes, the worst of all experts under one name."""
    found = {(short_name(layer["name"]), block["block"]): layer for block in blocks for layer in block["layers"]}
    if len({name for name, _ in found}) <= MOST_ROWS:
        return found
    folded: dict[tuple[str, int], dict[str, Any]] = {}
    for (name, block), layer in found.items():
        place = EXPERT.sub("experts.*", name), block
        if place not in folded or (layer["relative_error"] or 0) > (folded[place]["relative_error"] or 0):
            folded[place] = layer
    return folded


def errors(blocks: Blocks) -> Figure | None:
    """Relative error of each layer's output, blocks by layers."""
    layers = by_place(blocks)
    seen = [layer["relative_error"] for layer in layers.values() if known(layer["relative_error"]) and layer["relative_error"] > 0]
    if not seen:
        return None
    lowest = min(seen)  # stands for 0, which has no logarithm
    values = {place: math.log10(max(layer["relative_error"], lowest)) for place, layer in layers.items() if known(layer["relative_error"])}
    hover = {place: _layer_hover(layer, place[1]) for place, layer in layers.items()}
    low, high = math.log10(lowest), math.log10(max(seen))
    marks = [low, (low + high) / 2, high] if high > low else [low]
    texts = {place: number(layer["relative_error"], 3) for place, layer in layers.items()}
    bar = {
        "tickvals": marks,
        "ticktext": [f"{10**mark:.2g}" for mark in marks],
        "title": {"text": "relative error, logarithmic", "side": "top"},
    }
    worst = max(layers.values(), key=lambda layer: layer["relative_error"] if known(layer["relative_error"]) else -1)
    told = (
        f"Heat map of {len(values)} layers, blocks across and layers down. Relative error from {min(seen):.2g} to {max(seen):.2g}; "
        f"highest in {worst['name']}."
    )
    return _heat_map(
        "errors", "Relative error, block by layer", told, values, hover, texts, bar, "Cividis", "Relative error of each layer's output"
    )


def difference(first: Blocks, second: Blocks) -> Figure | None:
    """log2 of the second's relative error over the first's, for layers that both have."""
    a, b = by_place(first), by_place(second)
    both = [
        place
        for place in a
        if place in b and all(known(found[place]["relative_error"]) and found[place]["relative_error"] > 0 for found in (a, b))
    ]
    if not both:
        return None
    values = {place: math.log2(b[place]["relative_error"] / a[place]["relative_error"]) for place in both}
    end = max(map(abs, values.values())) or 1.0
    hover = {
        place: f"<b>{plain(a[place]['name'])}</b><br>A {number(a[place]['relative_error'], 3)}, B "
        f"{number(b[place]['relative_error'], 3)}<br>B is {2 ** values[place]:.3g} times A"
        for place in both
    }
    texts = {place: f"{2 ** values[place]:.2f} x" for place in both}
    marks = [-end, 0, end]
    bar = {
        "tickvals": marks,
        "ticktext": [f"{2**mark:.2g} x" for mark in marks],
        "title": {"text": "error of B over error of A", "side": "top"},
    }
    worse = sum(value > 0 for value in values.values())
    told = f"Heat map of {len(both)} layers, blocks across and layers down: the error of B is higher in {worse} of them."
    return _heat_map(
        "difference",
        "Relative error of B over A, block by layer",
        told,
        values,
        hover,
        texts,
        bar,
        "PuOr",
        "Relative error of B over that of A",
        (-end, end),
    )


def _layer_hover(layer: dict[str, Any], block: int) -> str:
    rows = {
        "block": block,
        "relative error": number(layer["relative_error"], 3),
        "bits": layer.get("bits"),
        "group size": layer.get("group_size"),
        "shape (out, in)": f"{layer.get('out_features')}, {layer.get('in_features')}",
        "tokens": layer.get("tokens"),
        "rounded to nearest": layer.get("fallback"),
    }
    told = "<br>".join(f"{key} {plain(number(value))}" for key, value in rows.items() if value is not None)
    return f"<b>{plain(layer['name'])}</b><br>{told}"


def _heat_map(
    key: str,
    title: str,
    told: str,
    values: dict[tuple[str, int], float],
    hover: dict[tuple[str, int], str],
    texts: dict[tuple[str, int], str],
    bar: dict[str, Any],
    colors: str,
    caption: str,
    ends: tuple[float, float] | None = None,
) -> Figure:
    """A map of (name, block) to value: names down, blocks across."""
    names = list(dict.fromkeys(name for name, _ in hover))
    columns = sorted({block for _, block in hover})

    def grid(found: dict[tuple[str, int], Any], missing: Any) -> list[list[Any]]:
        return [[found.get((name, block), missing) for block in columns] for name in names]

    trace = go.Heatmap(
        z=grid(values, None),
        x=[str(block) for block in columns],
        y=[plain(name) for name in names],
        hovertext=grid(hover, ""),
        hoverinfo="text",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        colorscale=colors,
        zmin=ends and ends[0],
        zmax=ends and ends[1],
        colorbar={"orientation": "h", "y": 1.0, "yanchor": "bottom", "thickness": 10, "len": 1, "outlinewidth": 0, **bar},
    )
    layout = {
        "height": 130 + max(100, min(1200, 24 * len(names))),
        "margin": {"l": 8, "r": 16, "t": 8, "b": 8},
        # from the axis, not from its labels: of these plotly does not know the height here
        "xaxis": {"title": {"text": "block", "standoff": 32}, "type": "category", "showgrid": False},
        "yaxis": {"autorange": "reversed", "showgrid": False, **_names(names)},
    }
    table = Table(
        caption,
        ["layer", *(f"block {block}" for block in columns)],
        [[name, *row] for name, row in zip(names, grid(texts, ""), strict=True)],
    )
    return _figure(key, title, told, [trace], layout, table)


# -- what was written -----------------------------------------------------------------------------------------------------


def scales(blocks: Blocks) -> Figure | None:
    """How many scales lie in each octave, of all layers that tell it."""
    total: Counter[int] = Counter()
    for layer in (layer for block in blocks for layer in block["layers"] if layer.get("scales")):
        for place, found in enumerate(layer["scales"]["counts"]):
            total[layer["scales"]["first_octave"] + place] += found
    if not sum(total.values()):
        return None
    first, last = min(place for place, found in total.items() if found), max(place for place, found in total.items() if found)
    octaves, whole = list(range(first, last + 1)), sum(total.values())
    shares = [total[octave] / whole for octave in octaves]
    names = [f"2<sup>{octave}</sup>" for octave in octaves]
    trace = go.Bar(
        x=names,
        y=shares,
        marker={"color": BLUE},
        hoverinfo="text",
        hovertext=[
            f"from {2.0**octave:.3g} to {2.0 ** (octave + 1):.3g}<br>{total[octave]:,} scales, {percent(share, 2)}"
            for octave, share in zip(octaves, shares, strict=True)
        ],
    )
    table = Table(
        "Scales by octave",
        ["scale from", "to", "scales", "share"],
        [
            [f"{2.0**octave:.4g}", f"{2.0 ** (octave + 1):.4g}", f"{total[octave]:,}", percent(share, 2)]
            for octave, share in zip(octaves, shares, strict=True)
        ],
    )
    layout = {
        "height": 320,
        "bargap": 0.1,
        "xaxis": {"title": {"text": "size of the scale, by octave"}, "type": "category"},
        "yaxis": {"title": {"text": "share of all scales"}, "tickformat": ".0%", "rangemode": "tozero"},
    }
    told = f"Bar chart of {whole:,} scales by octave, from {2.0**first:.2g} to {2.0 ** (last + 1):.2g}."
    return _figure("scales", "Distribution of the scales", told, [trace], layout, table)


def codes(blocks: Blocks) -> Figure | None:
    """How often each code is used. Several widths share an axis from the first code to the last, and one scale: 1 is even use."""
    total: dict[int, Counter[int]] = {}
    for layer in (layer for block in blocks for layer in block["layers"] if layer.get("codes")):
        total.setdefault(len(layer["codes"]), Counter()).update(dict(enumerate(layer["codes"])))
    total = {levels: found for levels, found in sorted(total.items()) if sum(found.values())}
    if not total:
        return None
    several, traces, rows = len(total) > 1, [], []
    for (levels, found), color in zip(total.items(), (BLUE, VERMILION, ORANGE, GREY), strict=False):
        whole, bits = sum(found.values()), f"{math.log2(levels):.0f} bits"
        shares = [found[code] / whole for code in range(levels)]
        look: dict[str, Any] = {"name": bits, "marker": {"color": color}, "hoverinfo": "text"}
        look["hovertext"] = [f"{bits}, code {code}<br>{found[code]:,} times, {percent(share, 2)}" for code, share in enumerate(shares)]
        if several:
            traces.append(
                go.Scatter(
                    x=[(code + 0.5) / levels for code in range(levels)],
                    y=[share * levels for share in shares],
                    mode="lines+markers",
                    line={"color": color},
                    **look,
                )
            )
        else:
            traces.append(go.Bar(x=list(range(levels)), y=shares, **look))
        rows += [[f"{code}", bits, f"{found[code]:,}", percent(share, 2)] for code, share in enumerate(shares)]
    x = {"title": {"text": "place between the first code and the last"}, "range": [0, 1]} if several else {"title": {"text": "code"}}
    y = {"title": {"text": "use (1: all codes alike)"}} if several else {"title": {"text": "share of all weights"}, "tickformat": ".0%"}
    told = "How often each code is used, for " + ", ".join(f"{math.log2(levels):.0f} bits" for levels in total) + "."
    layout = {"height": 320, "bargap": 0.1, "xaxis": x, "yaxis": y | {"rangemode": "tozero"}}
    table = Table("Use of the codes", ["code", "width", "weights", "share"], rows)
    return _figure("codes", "Use of the codes", told, traces, layout, table)


def expert_tokens(blocks: Blocks) -> dict[tuple[str, int], int]:
    """(expert, block) to the calibration tokens that reached it; {} where nothing is named so."""
    found: dict[tuple[str, int], int] = {}
    for block in blocks:
        for layer in block["layers"]:
            expert = EXPERT.search(layer["name"])
            if expert and layer.get("tokens") is not None:
                place = f"expert {expert[1]}", block["block"]
                found[place] = max(found.get(place, 0), layer["tokens"])
    return dict(sorted(found.items(), key=lambda item: (int(item[0][0].removeprefix("expert ")), item[0][1])))


def experts(blocks: Blocks) -> Figure | None:
    """Calibration tokens by expert and block."""
    tokens = expert_tokens(blocks)
    if not tokens:
        return None
    hover = {place: f"<b>{place[0]}</b>, block {place[1]}<br>{found:,} tokens" for place, found in tokens.items()}
    bar = {"title": {"text": "calibration tokens", "side": "top"}}
    told = (
        f"Heat map of the calibration tokens that reached each expert, blocks across: from {min(tokens.values()):,} "
        f"to {max(tokens.values()):,}."
    )
    texts = {place: f"{found:,}" for place, found in tokens.items()}
    return _heat_map(
        "experts",
        "Tokens by expert",
        told,
        {place: float(found) for place, found in tokens.items()},
        hover,
        texts,
        bar,
        "Cividis",
        "Calibration tokens that reached each expert",
        (0.0, float(max(*tokens.values(), 1))),
    )


def stages(seconds: dict[str, float], total: float | None) -> Figure | None:
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
        "yaxis": {"autorange": "reversed", **_names(list(found))},
    }
    longest = next(iter(found))
    told = f"Bar chart of {len(found)} stages, {duration(whole)} in all; the longest: {longest}, {percent(found[longest] / whole, 0)}."
    return _figure("stages", "Time by stage", told, [trace], layout, table)
