"""Figures for MLflow and Prefect, drawn without matplotlib's global state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tasks.outcome.parts import Block
from tasks.outcome.record import SweepRecord, short_name

if TYPE_CHECKING:  # matplotlib is imported where it draws
    from matplotlib.figure import Figure


def relative_errors(blocks: list[Block]) -> Figure:
    """A heat map, blocks by layers, of each layer's relative error on the calibration data."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(short_name(layer.name) for block in blocks for layer in block.layers))
    found = {(short_name(layer.name), block.block): layer.relative_error for block in blocks for layer in block.layers}
    known = {place: error for place, error in found.items() if error is not None}
    columns = [block.block for block in blocks]
    grid = [[known.get((name, column), math.nan) for column in columns] for name in names]
    seen = [value for row in grid for value in row if math.isfinite(value) and value > 0]
    figure = Figure(figsize=(min(18, 3.5 + 0.45 * len(columns)), min(12, 1.5 + 0.35 * len(names))), layout="constrained")
    axes = figure.subplots()
    scale = LogNorm(min(seen), max(seen)) if seen and max(seen) > min(seen) else None
    image = axes.imshow(grid, aspect="auto", norm=scale, cmap="viridis", interpolation="nearest")
    axes.set_xticks(range(len(columns)), list(map(str, columns)))
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("block")
    axes.set_title("relative error of the layer's output on the calibration text")
    figure.colorbar(image, ax=axes)
    return figure


def front_figure(sweep: SweepRecord) -> Figure:
    """The cells of a sweep over size and quality, the front as a line, the recommended one marked."""
    from matplotlib.figure import Figure

    found = {cell.name: (cell.bytes, cell.quality(sweep.measure)) for cell in sweep.cells}
    points = {name: (size / 1e6, value) for name, (size, value) in found.items() if size is not None and value is not None}
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.scatter([x for x, _ in points.values()], [y for _, y in points.values()], color="#888888", zorder=2)
    on = [points[name] for name in sweep.front]
    axes.step([x for x, _ in on], [y for _, y in on], where="post", marker="o", color="#4477aa", label="front")
    for name, (x, y) in points.items():
        chosen = name == sweep.recommended.name
        weight = "bold" if chosen else "normal"
        axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7, fontweight=weight)
        if chosen:
            axes.scatter([x], [y], marker="*", s=160, color="#cc3311", label="recommended", zorder=3)
    if points and all(y > 0 for _, y in points.values()):
        axes.set_yscale("log")
    label = {"kl": "KL per token (nats)", "perplexity": "perplexity"}[sweep.measure]
    axes.set(xlabel="size of the checkpoint (MB)", ylabel=label + (", screening" if sweep.screening else ""))
    if on:
        axes.legend()
    axes.grid(alpha=0.3)
    return figure
