"""Figures for people, drawn without matplotlib's global state."""

from __future__ import annotations

import math
from typing import Any

from tasks.outcome.record import short_name


def relative_errors(blocks: list[dict[str, Any]]):  # noqa: ANN201 - matplotlib is imported lazily
    """A heat map, blocks by layers, of each layer's relative error on the calibration data."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(short_name(layer["name"]) for block in blocks for layer in block["layers"]))
    found = {(short_name(layer["name"]), block["block"]): layer["relative_error"] for block in blocks for layer in block["layers"]}
    columns = [block["block"] for block in blocks]
    grid = [[found.get((name, column), math.nan) for column in columns] for name in names]
    seen = [value for row in grid for value in row if value is not None and math.isfinite(value) and value > 0]
    figure = Figure(figsize=(min(18, 3.5 + 0.45 * len(columns)), min(12, 1.5 + 0.35 * len(names))), layout="constrained")
    axes = figure.subplots()
    grid = [[math.nan if value is None else value for value in row] for row in grid]
    scale = LogNorm(min(seen), max(seen)) if seen and max(seen) > min(seen) else None
    image = axes.imshow(grid, aspect="auto", norm=scale, cmap="viridis", interpolation="nearest")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("block")
    axes.set_title("relative error of the layer's output on the calibration text")
    figure.colorbar(image, ax=axes)
    return figure


def front(found: dict[str, Any]):  # noqa: ANN201 - matplotlib is imported lazily
    """The cells of a sweep over size and quality, the front as a line, the recommended one marked. `found`: sweep.json."""
    from matplotlib.figure import Figure

    measure, cells = found["measure"], [row for row in found["cells"] if row["bytes"] is not None and row[found["measure"]] is not None]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.scatter([row["bytes"] / 1e6 for row in cells], [row[measure] for row in cells], color="#888888", zorder=2)
    on = [row for name in found["front"] for row in cells if row["name"] == name]
    axes.step([row["bytes"] / 1e6 for row in on], [row[measure] for row in on], where="post", marker="o", color="#4477aa", label="front")
    for row in cells:
        chosen = row["name"] == found["recommended"]["name"]
        axes.annotate(
            row["name"],
            (row["bytes"] / 1e6, row[measure]),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=7,
            fontweight="bold" if chosen else "normal",
        )
        if chosen:
            axes.scatter([row["bytes"] / 1e6], [row[measure]], marker="*", s=160, color="#cc3311", label="recommended", zorder=3)
    if cells and all(row[measure] > 0 for row in cells):
        axes.set_yscale("log")
    label = {"kl": "KL per token (nats)", "perplexity": "perplexity"}[measure]
    axes.set(xlabel="size of the checkpoint (MB)", ylabel=label + (", screening" if found["mode"] == "screening" else ""))
    if on:
        axes.legend()
    axes.grid(alpha=0.3)
    return figure
