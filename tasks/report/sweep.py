"""The report of a sweep, from its record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tasks.outcome.parts import SweptCell
from tasks.outcome.record import SweepRecord
from tasks.report import figures
from tasks.report.parts import Code, Figure, Items, Page, Part, Section, Table, Text, Tiles
from tasks.report.run import as_yaml
from tasks.report.words import NONE, count, duration, known, number, percent, size
from tasks.sweep.pareto import pareto_front

LABELS = {"kl": "KL per token (nats)", "perplexity": "perplexity"}
SCREENING = (
    "Screening: all numbers come from one pass through the original model, no checkpoint was written. Good for a first choice; "
    "run the chosen cell with mode: exact before you use it."
)


def page(sweep: SweepRecord) -> Page:
    """Table, front and choice."""
    screening, cells = sweep.screening, ordered(sweep)
    sections: list[tuple[str, str, list[Part | None]]] = [
        ("summary", "Summary", [Text(_headline(sweep), tone="lead"), Text(_why(sweep)), _tiles(sweep)]),
        ("quality", "Quality against size", _quality(sweep, cells)),
        ("cells", "Cells", [_cells(sweep, cells), _time(cells)]),
        ("failed", "What went wrong", _failed(cells)),
        ("config", "Config, and how to make it again", _again(sweep, cells)),
    ]
    kept = [
        Section(key, title + (" (screening)" if screening else ""), [part for part in parts if part is not None])
        for key, title, parts in sections
    ]
    kicker = "Sweep report" + (", screening" if screening else "")
    return Page(Path(sweep.folder).name, kicker, [section for section in kept if section.parts], SCREENING if screening else None)


def ordered(sweep: SweepRecord) -> list[SweptCell]:
    """The cells, finished ones first by size; the number in the table and in the figures is the place here."""
    return sorted(sweep.cells, key=lambda cell: (not cell.done, cell.bytes or 0, cell.name))


def _headline(sweep: SweepRecord) -> str:
    cells, row = sweep.cells, sweep.chosen
    done = sum(cell.done for cell in cells)
    model = (sweep.config.get("base") or {}).get("model") or {}
    of = f" of {model['path']}" if model.get("path") else ""
    verb = "screened" if sweep.screening else "quantized and evaluated"
    missing = len(cells) - done
    text = f"{count(done, 'configuration')}{of} {'was' if done == 1 else 'were'} {verb}" + (
        f"; {missing} of {len(cells)} did not complete, the reasons are below." if missing else "."
    )
    if row is None:
        return f"{text} None can be recommended."
    original = f" instead of {size(row.original_bytes)}" if row.original_bytes else ""
    worse = ""
    if known(row.perplexity) and known(row.original_perplexity):
        worse = f", perplexity {percent(row.perplexity / row.original_perplexity - 1, signed=True)} against the original"
    return f"{text} Recommended is {row.name}: {size(row.bytes)}{original}{worse}" + (f"; gate {row.gate}." if row.gate else ".")


def _why(sweep: SweepRecord) -> str:
    choice, front = sweep.recommended, len(sweep.front)
    text = f"The rule: {choice.rule}. What it found: {choice.reason}."
    return text + (
        f" {count(front, 'cell')} on the Pareto front: no other of the same model and text is both smaller and better." if front else ""
    )


def _tiles(sweep: SweepRecord) -> Tiles:
    row = sweep.chosen
    tiles = [("recommended", sweep.recommended.name or "none", sweep.recommended.rule)]
    if row:
        tiles += [
            ("size", size(row.bytes), f"{number(row.bits_per_weight)} bits per weight"),
            ("perplexity", number(row.perplexity), f"original {number(row.original_perplexity)}"),
        ]
        tiles += [("KL per token", number(row.kl, 3), "nats; 0: as the original")] if known(row.kl) else []
    done = sum(cell.done for cell in sweep.cells)
    tiles += [("cells", f"{done} of {len(sweep.cells)}", "complete"), ("time", duration(sweep.seconds), "of the last run")]
    return Tiles(tiles)


def _quality(sweep: SweepRecord, cells: list[SweptCell]) -> list[Part | None]:
    """The measure of the choice first; perplexity beside KL, where there is KL."""
    measures = list(dict.fromkeys([sweep.measure, "perplexity"]))
    return [figure for measure in measures for figure in [_front_figure(sweep, cells, measure)] if figure]


def _front_figure(sweep: SweepRecord, cells: list[SweptCell], measure: str) -> Figure | None:
    done = [cell for cell in cells if cell.done]
    found = [(place, cell, cell.bytes, cell.quality(measure)) for place, cell in enumerate(cells, 1) if cell.done]
    points = [
        figures.Point(cell.name, size_, quality, str(place), cell.judged_on)
        for place, cell, size_, quality in found
        if known(size_) and known(quality)
    ]
    if not points:
        return None
    title = f"{LABELS[measure].split(' (')[0][0].upper()}{LABELS[measure].split(' (')[0][1:]} against size"
    return figures.quality_against_size(
        points,
        key=f"front-{measure}",
        title=title + (" (screening)" if sweep.screening else ""),
        label=LABELS[measure] + (", screening" if sweep.screening else ""),
        front=sweep.front if measure == sweep.measure else pareto_front(done, measure),
        chosen=sweep.recommended.name,
        originals=figures.known_originals((cell.original_bytes, 0.0 if measure == "kl" else cell.original_perplexity) for cell in done),
        what="cell",
    )


COLUMNS: dict[str, Callable[[SweptCell], str]] = {
    "size": lambda cell: size(cell.bytes),
    "bits per weight": lambda cell: number(cell.bits_per_weight),
    "perplexity": lambda cell: number(cell.perplexity),
    "KL": lambda cell: number(cell.kl, 3),
    "same next token": lambda cell: percent(cell.agreement),
    "task recovery": lambda cell: percent(cell.recovery),
    "seconds": lambda cell: number(cell.seconds, 3),
    "fell back": lambda cell: number(cell.fallback_layers),
    "gate": lambda cell: cell.gate or NONE,
    "status": lambda cell: cell.status,
}


def _cells(sweep: SweepRecord, cells: list[SweptCell]) -> Table:
    chosen, table = sweep.recommended.name, []
    for place, cell in enumerate(cells, 1):
        marks = ["recommended"] * (cell.name == chosen) + ["front"] * (cell.name in sweep.front)
        table.append([cell.name, str(place), ", ".join(marks), *(show(cell) for show in COLUMNS.values())])
    caption = "Cells by size; the number is the one in the figures" + (". Screening" if sweep.screening else "")
    marked = frozenset(place for place, cell in enumerate(cells) if cell.name == chosen)
    return Table(caption, ["cell", "#", "", *COLUMNS], table, marked)


def _time(cells: list[SweptCell]) -> Part | None:
    figure = figures.stages({cell.name: cell.seconds for cell in cells if known(cell.seconds)}, None)
    if figure is None:
        return None
    table = Table("Time by cell", ["cell", *figure.table.header[1:]], figure.table.rows)
    return Figure("seconds", "Time by cell", figure.description.replace("stages", "cells"), figure.plot, table)


def _failed(cells: list[SweptCell]) -> list[Part | None]:
    wrong = [f"{cell.name}: {cell.status}: {cell.error}" for cell in cells if not cell.done]
    aside = sorted({key for cell in cells for key in cell.set_aside})
    return [
        Items(wrong) if wrong else None,
        Text(f"Screening does not see {', '.join(aside)} and took them for 0.", tone="warning") if aside else None,
    ]


def _again(sweep: SweepRecord, cells: list[SweptCell]) -> list[Part | None]:
    known_by = {"sweep": sweep.id, "finished": sweep.finished, "folder": sweep.folder, "rule of the choice": sweep.recommended.rule}
    out = [f"{cell.out}.report.html" for cell in cells if cell.out]
    return [
        Text("Save the config as sweep.yaml and run the command in the same working directory; it does what is missing."),
        Code("The command", "python -m flows sweep sweep.yaml"),
        Code("The config", as_yaml(sweep.config), "sweep.yaml"),
        Code("Reports of single cells", "\n".join(out)) if out else None,
        Table("Known by", ["what", "value"], [[what, value] for what, value in known_by.items() if value]),
    ]
