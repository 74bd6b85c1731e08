"""What the figures of a report share: colours, axes of names, and the making of a Figure from plotly traces.

Colours are those of Okabe and Ito, which can be told apart with any eyes. They are the light page's; draw.js puts others in their
place where the page is dark (DARK). Text that plotly shows goes through `plain`.
"""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from tasks.report.parts import Figure, Table

BLUE, ORANGE, VERMILION, GREY, BLACK = "#0072b2", "#e69f00", "#d55e00", "#6b6b6b", "#000000"
DARK = {BLUE: "#56b4e9", VERMILION: "#ff8a3d", GREY: "#a8a8a8", BLACK: "#ffffff"}
"""A colour of the light page: the one in its place on the dark page."""

LONGEST = 26
"""Characters of a name beside a plot."""


def plain(text: Any) -> str:
    """Text that plotly shows as it is: it would read tags in it."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def name_axis(names: list[str]) -> dict[str, Any]:
    """An axis of names: long ones lose their middle, or on a phone nothing would be left of the plot. Hover and table have them whole."""
    axis: dict[str, Any] = {"type": "category"}
    if any(len(name) > LONGEST for name in names):
        cut = [name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[1 - LONGEST // 2 :]}" for name in names]
        axis |= {"tickvals": list(map(plain, names)), "ticktext": list(map(plain, cut))}
    return axis


def figure(key: str, title: str, description: str, traces: list[Any], layout: dict[str, Any], table: Table) -> Figure:
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
    return Figure(key, title, description, {"data": plot["data"], "layout": plot["layout"]}, table)
