"""Figures of blocks and layers: maps of errors and of experts' tokens, scales and codes. Heat maps use cividis or PuOr."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import plotly.graph_objects as go

from tasks.outcome.parts import Block, Layer
from tasks.outcome.record import short_name
from tasks.report.parts import Figure, Table
from tasks.report.plots import BLUE, GREY, ORANGE, VERMILION, figure, name_axis, plain
from tasks.report.words import known, number, percent

MOST_ROWS = 64
"""Rows of a heat map; with more (the experts of a large MoE) one row shows the worst of all experts."""
EXPERT = re.compile(r"\bexperts\.(\d+)\b")
Place = tuple[str, int]
"""Name within the block, and block."""


def by_place(blocks: list[Block]) -> dict[Place, Layer]:
    """Layers by place; of more rows than a heat map takes, the worst of all experts under one name."""
    found = {(short_name(layer.name), block.block): layer for block in blocks for layer in block.layers}
    if len({name for name, _ in found}) <= MOST_ROWS:
        return found
    folded: dict[Place, Layer] = {}
    for (name, block), layer in found.items():
        place = EXPERT.sub("experts.*", name), block
        if place not in folded or (layer.relative_error or 0) > (folded[place].relative_error or 0):
            folded[place] = layer
    return folded


def _errors(layers: dict[Place, Layer]) -> dict[Place, float]:
    """The relative errors that are known."""
    return {place: layer.relative_error for place, layer in layers.items() if known(layer.relative_error)}


def errors(blocks: list[Block]) -> Figure | None:
    """Relative error of each layer's output, blocks by layers."""
    layers = by_place(blocks)
    found = _errors(layers)
    seen = [error for error in found.values() if error > 0]
    if not seen:
        return None
    lowest = min(seen)  # stands for 0, which has no logarithm
    values = {place: math.log10(max(error, lowest)) for place, error in found.items()}
    hover = {place: _layer_hover(layer, place[1]) for place, layer in layers.items()}
    low, high = math.log10(lowest), math.log10(max(seen))
    marks = [low, (low + high) / 2, high] if high > low else [low]
    texts = {place: number(layer.relative_error, 3) for place, layer in layers.items()}
    bar = {
        "tickvals": marks,
        "ticktext": [f"{10**mark:.2g}" for mark in marks],
        "title": {"text": "relative error, logarithmic", "side": "top"},
    }
    worst = layers[max(found, key=found.__getitem__)]
    description = (
        f"Heat map of {len(values)} layers, blocks across and layers down. Relative error from {min(seen):.2g} to {max(seen):.2g}; "
        f"highest in {worst.name}."
    )
    title, caption = "Relative error, block by layer", "Relative error of each layer's output"
    return _heat_map("errors", title, description, values, hover, texts, bar, "Cividis", caption)


def difference(first: list[Block], second: list[Block]) -> Figure | None:
    """log2 of the second's relative error over the first's, for layers that both have."""
    layers, (a, b) = by_place(first), [_errors(by_place(blocks)) for blocks in (first, second)]
    both = [place for place in a if place in b and a[place] > 0 and b[place] > 0]
    if not both:
        return None
    values = {place: math.log2(b[place] / a[place]) for place in both}
    end = max(map(abs, values.values())) or 1.0
    hover = {
        place: f"<b>{plain(layers[place].name)}</b><br>A {number(a[place], 3)}, B {number(b[place], 3)}<br>"
        f"B is {2 ** values[place]:.3g} times A"
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
    description = f"Heat map of {len(both)} layers, blocks across and layers down: the error of B is higher in {worse} of them."
    title, caption = "Relative error of B over A, block by layer", "Relative error of B over that of A"
    return _heat_map("difference", title, description, values, hover, texts, bar, "PuOr", caption, (-end, end))


def _layer_hover(layer: Layer, block: int) -> str:
    rows = {
        "block": block,
        "relative error": number(layer.relative_error, 3),
        "bits": layer.bits,
        "group size": layer.group_size,
        "shape (out, in)": f"{layer.out_features}, {layer.in_features}",
        "tokens": layer.tokens,
        "rounded to nearest": layer.fallback,
    }
    description = "<br>".join(f"{key} {plain(number(value))}" for key, value in rows.items() if value is not None)
    return f"<b>{plain(layer.name)}</b><br>{description}"


def _heat_map(
    key: str,
    title: str,
    description: str,
    values: dict[Place, float],
    hover: dict[Place, str],
    texts: dict[Place, str],
    bar: dict[str, Any],
    colors: str,
    caption: str,
    ends: tuple[float, float] | None = None,
) -> Figure:
    """A map of (name, block) to value: names down, blocks across."""
    names = list(dict.fromkeys(name for name, _ in hover))
    columns = sorted({block for _, block in hover})

    def grid(found: dict[Place, Any], missing: Any) -> list[list[Any]]:
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
        "yaxis": {"autorange": "reversed", "showgrid": False, **name_axis(names)},
    }
    table = Table(
        caption,
        ["layer", *(f"block {block}" for block in columns)],
        [[name, *row] for name, row in zip(names, grid(texts, ""), strict=True)],
    )
    return figure(key, title, description, [trace], layout, table)


# -- what was written -----------------------------------------------------------------------------------------------------


def scales(blocks: list[Block]) -> Figure | None:
    """How many scales lie in each octave, of all layers that tell it."""
    total: Counter[int] = Counter()
    for layer_scales in (layer.scales for block in blocks for layer in block.layers if layer.scales):
        for place, found in enumerate(layer_scales.counts):
            total[layer_scales.first_octave + place] += found
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
    description = f"Bar chart of {whole:,} scales by octave, from {2.0**first:.2g} to {2.0 ** (last + 1):.2g}."
    return figure("scales", "Distribution of the scales", description, [trace], layout, table)


def codes(blocks: list[Block]) -> Figure | None:
    """How often each code is used. Several widths share an axis from the first code to the last, and one scale: 1 is even use."""
    total: dict[int, Counter[int]] = {}
    for layer_codes in (layer.codes for block in blocks for layer in block.layers if layer.codes):
        total.setdefault(len(layer_codes), Counter()).update(dict(enumerate(layer_codes)))
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
    description = "How often each code is used, for " + ", ".join(f"{math.log2(levels):.0f} bits" for levels in total) + "."
    layout = {"height": 320, "bargap": 0.1, "xaxis": x, "yaxis": y | {"rangemode": "tozero"}}
    table = Table("Use of the codes", ["code", "width", "weights", "share"], rows)
    return figure("codes", "Use of the codes", description, traces, layout, table)


def expert_tokens(blocks: list[Block]) -> dict[Place, int]:
    """(expert, block) to the calibration tokens that reached it; {} where nothing is named so."""
    found: dict[Place, int] = {}
    for block in blocks:
        for layer in block.layers:
            expert = EXPERT.search(layer.name)
            if expert and layer.tokens is not None:
                place = f"expert {expert[1]}", block.block
                found[place] = max(found.get(place, 0), layer.tokens)
    return dict(sorted(found.items(), key=lambda item: (int(item[0][0].removeprefix("expert ")), item[0][1])))


def experts(blocks: list[Block]) -> Figure | None:
    """Calibration tokens by expert and block."""
    tokens = expert_tokens(blocks)
    if not tokens:
        return None
    hover = {place: f"<b>{place[0]}</b>, block {place[1]}<br>{found:,} tokens" for place, found in tokens.items()}
    bar = {"title": {"text": "calibration tokens", "side": "top"}}
    description = (
        f"Heat map of the calibration tokens that reached each expert, blocks across: from {min(tokens.values()):,} "
        f"to {max(tokens.values()):,}."
    )
    texts = {place: f"{found:,}" for place, found in tokens.items()}
    return _heat_map(
        "experts",
        "Tokens by expert",
        description,
        {place: float(found) for place, found in tokens.items()},
        hover,
        texts,
        bar,
        "Cividis",
        "Calibration tokens that reached each expert",
        (0.0, float(max(*tokens.values(), 1))),
    )
