"""The report of a sweep, from sweep.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.report import figures
from tasks.report.parts import Code, Figure, Items, Page, Part, Section, Table, Text, Tiles
from tasks.report.run import as_yaml
from tasks.report.words import NONE, count, duration, known, number, percent, size
from tasks.sweep.pareto import front

LABELS = {"kl": "KL per token (nats)", "perplexity": "perplexity"}
SCREENING = (
    "Screening: all numbers come from one pass through the original model, no checkpoint was written. Good for a first choice; "
    "run the chosen cell with mode: exact before you use it."
)


def page(found: dict[str, Any]) -> Page:
    """Table, front and choice. found: sweep.json's content."""
    screening = found.get("mode") == "screening"
    rows = ordered(found)
    sections = [
        ("summary", "Summary", [Text(_headline(found), tone="lead"), Text(_why(found)), _tiles(found)]),
        ("quality", "Quality against size", _quality(found, rows)),
        ("cells", "Cells", [_cells(found, rows), _time(rows)]),
        ("failed", "What went wrong", _failed(rows)),
        ("config", "Config, and how to make it again", _again(found)),
    ]
    kept = [
        Section(key, title + (" (screening)" if screening else ""), [part for part in parts if part is not None])
        for key, title, parts in sections
    ]
    kicker = "Sweep report" + (", screening" if screening else "")
    return Page(Path(found["folder"]).name, kicker, [section for section in kept if section.parts], SCREENING if screening else None)


def ordered(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells, finished ones first by size; the number in the table and in the figures is the place here."""
    return sorted(found["cells"], key=lambda row: (row["status"] != "done", row["bytes"] or 0, row["name"]))


def _headline(found: dict[str, Any]) -> str:
    cells, choice = found["cells"], found["recommended"]
    done = [row for row in cells if row["status"] == "done"]
    model = ((found.get("config") or {}).get("base") or {}).get("model") or {}
    of = f" of {model['path']}" if model.get("path") else ""
    verb = "screened" if found.get("mode") == "screening" else "quantized and evaluated"
    missing = len(cells) - len(done)
    text = f"{count(len(done), 'configuration')}{of} {'was' if len(done) == 1 else 'were'} {verb}" + (
        f"; {missing} of {len(cells)} did not complete, the reasons are below." if missing else "."
    )
    if not choice["name"]:
        return f"{text} None can be recommended."
    row = next(row for row in cells if row["name"] == choice["name"])
    original = f" instead of {size(row['original_bytes'])}" if row.get("original_bytes") else ""
    worse = ""
    if known(row["perplexity"]) and known(row["original_perplexity"]):
        worse = f", perplexity {percent(row['perplexity'] / row['original_perplexity'] - 1, signed=True)} against the original"
    return f"{text} Recommended is {choice['name']}: {size(row['bytes'])}{original}{worse}" + (
        f"; gate {row['gate']}." if row.get("gate") else "."
    )


def _why(found: dict[str, Any]) -> str:
    choice, front_ = found["recommended"], len(found["front"])
    told = f"The rule: {choice['rule']}. What it found: {choice['reason']}."
    return told + (
        f" {count(front_, 'cell')} on the Pareto front: no other of the same model and text is both smaller and better." if front_ else ""
    )


def _tiles(found: dict[str, Any]) -> Tiles:
    row = next((row for row in found["cells"] if row["name"] == found["recommended"]["name"]), None)
    tiles = [("recommended", found["recommended"]["name"] or "none", found["recommended"]["rule"])]
    if row:
        tiles += [
            ("size", size(row["bytes"]), f"{number(row['bits_per_weight'])} bits per weight"),
            ("perplexity", number(row["perplexity"]), f"original {number(row['original_perplexity'])}"),
        ]
        tiles += [("KL per token", number(row["kl"], 3), "nats; 0: as the original")] if known(row["kl"]) else []
    done = sum(cell["status"] == "done" for cell in found["cells"])
    tiles += [("cells", f"{done} of {len(found['cells'])}", "complete"), ("time", duration(found["seconds"]), "of the last run")]
    return Tiles(tiles)


def _quality(found: dict[str, Any], rows: list[dict[str, Any]]) -> list[Part | None]:
    """The measure of the choice first; perplexity beside KL, where there is KL."""
    measures = list(dict.fromkeys([found["measure"], "perplexity"]))
    return [figure for measure in measures for figure in [_front(found, rows, measure)] if figure]


def _front(found: dict[str, Any], rows: list[dict[str, Any]], measure: str) -> Figure | None:
    done = [row for row in rows if row["status"] == "done" and known(row.get(measure))]
    if not done:
        return None
    label = LABELS[measure] + (", screening" if found.get("mode") == "screening" else "")
    points = [
        {"name": row["name"], "bytes": row["bytes"], "value": row[measure], "mark": str(rows.index(row) + 1), "group": row.get("judged_on")}
        for row in done
    ]
    best = {"kl": 0.0}
    originals = {(row.get("original_bytes"), best.get(measure, row["original_perplexity"])) for row in done}
    title = f"{LABELS[measure].split(' (')[0][0].upper()}{LABELS[measure].split(' (')[0][1:]} against size"
    return figures.quality_against_size(
        points,
        key=f"front-{measure}",
        title=title + (" (screening)" if found.get("mode") == "screening" else ""),
        label=label,
        front=found["front"] if measure == found["measure"] else front(done, measure),
        chosen=found["recommended"]["name"],
        originals=sorted((bytes_, value) for bytes_, value in originals if known(bytes_) and known(value)),
        what="cell",
    )


def _cells(found: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    header = [
        "cell",
        "#",
        "",
        "size",
        "bits per weight",
        "perplexity",
        "KL",
        "same next token",
        "task recovery",
        "seconds",
        "fell back",
        "gate",
        "status",
    ]
    chosen, table = found["recommended"]["name"], []
    for place, row in enumerate(rows, 1):
        marks = ["recommended"] * (row["name"] == chosen) + ["front"] * (row["name"] in found["front"])
        table.append(
            [
                row["name"],
                str(place),
                ", ".join(marks),
                NONE if row["bytes"] is None else size(row["bytes"]),
                number(row["bits_per_weight"]),
                number(row["perplexity"]),
                number(row["kl"], 3),
                percent(row["agreement"]),
                percent(row.get("recovery")),
                number(row["seconds"], 3),
                number(row.get("fallback_layers")),
                row["gate"] or NONE,
                row["status"],
            ]
        )
    caption = "Cells by size; the number is the one in the figures" + (". Screening" if found.get("mode") == "screening" else "")
    return Table(caption, header, table, frozenset(place for place, row in enumerate(rows) if row["name"] == chosen))


def _time(rows: list[dict[str, Any]]) -> Part | None:
    figure = figures.stages({row["name"]: row["seconds"] for row in rows if known(row["seconds"])}, None)
    if figure is None:
        return None
    table = Table("Time by cell", ["cell", *figure.table.header[1:]], figure.table.rows)
    return Figure("seconds", "Time by cell", figure.told.replace("stages", "cells"), figure.plot, table)


def _failed(rows: list[dict[str, Any]]) -> list[Part | None]:
    wrong = [f"{row['name']}: {row['status']}: {row['error']}" for row in rows if row["status"] != "done"]
    aside = sorted({key for row in rows for key in row.get("set_aside") or []})
    return [
        Items(wrong) if wrong else None,
        Text(f"Screening does not see {', '.join(aside)} and took them for 0.", tone="warning") if aside else None,
    ]


def _again(found: dict[str, Any]) -> list[Part | None]:
    told = [Text("Save the config as sweep.yaml and run the command in the same working directory; it does what is missing.")]
    known_by = {
        "sweep": found.get("id"),
        "finished": found.get("finished"),
        "folder": found.get("folder"),
        "rule of the choice": found["recommended"]["rule"],
    }
    out = [f"{row['out']}.report.html" for row in ordered(found) if row.get("out")]
    return [
        *told,
        Code("The command", "python -m flows sweep sweep.yaml"),
        Code("The config", as_yaml(found["config"]), "sweep.yaml") if found.get("config") else None,
        Code("Reports of single cells", "\n".join(out)) if out else None,
        Table("Known by", ["what", "value"], [[what, str(value)] for what, value in known_by.items() if value]),
    ]
