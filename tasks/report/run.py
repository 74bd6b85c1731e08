"""The report of one run, from its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gptq_core.data.overlap import objection
from tasks.outcome import record as records
from tasks.outcome.gate import failed
from tasks.report import figures
from tasks.report.parts import Code, Items, Page, Part, Section, Table, Text, Tiles
from tasks.report.words import NONE, count, duration, known, number, percent, size

MOST_TEXTS = 20
"""Entries of a list in the config that are shown; calibration texts given in place may be thousands."""
MOST_NAMES = 12
"""Names of layers or tensors in one line."""


def page(record: dict[str, Any]) -> Page:
    """Everything that the record of a run tells; parts that it knows nothing of are left out."""
    sections = [
        ("summary", "Summary", [*_headline(record), _tiles(record)]),
        ("quality", "Quality and size", _quality(record)),
        ("measures", "Measures", _measures(record)),
        ("layers", "Error by layer", _layers(record)),
        ("codes", "Scales and codes", [figures.scales(_blocks(record)), figures.codes(_blocks(record))]),
        ("experts", "Experts", _experts(record)),
        ("time", "Time and memory", _time(record)),
        ("left", "Left as it was, or fell back", _left(record)),
        ("loads", "Who loads it", _loads(record)),
        ("config", "Config, and how to make it again", _again(record)),
    ]
    found = [Section(key, title, [part for part in parts if part is not None]) for key, title, parts in sections]
    return Page(name(record), "Quantization report", [section for section in found if section.parts])


def name(record: dict[str, Any]) -> str:
    return Path(record.get("out") or "run").name


def _blocks(record: dict[str, Any]) -> list[dict[str, Any]]:
    return record.get("blocks") or []


# -- what is read first ---------------------------------------------------------------------------------------------------


def _headline(record: dict[str, Any]) -> list[Part]:
    """What was made of what, how much smaller, how much worse, and whether that is allowed: in whole sentences."""
    told = [_made(record), _worse(record), _noise(record), _gate(record)]
    parts: list[Part] = [Text(" ".join(sentence for sentence in told if sentence), tone="lead")]
    if record.get("evaluation_error"):
        parts.append(
            Text(
                f"The evaluation failed: {record['evaluation_error']}. The checkpoint is complete; the same command evaluates it.",
                tone="warning",
            )
        )
    assembly = record.get("assembly") or {}
    fell = len(assembly.get("fallback_layers") or [])
    if fell:
        parts.append(
            Text(
                f"{count(fell, 'layer')} could not be solved and {'was' if fell == 1 else 'were'} rounded to nearest: see below.",
                tone="warning",
            )
        )
    overlap = (record.get("evaluation") or {}).get("overlap")
    if overlap and objection(overlap["share"], overlap.get("calibration_share", 0.0), "evaluation"):
        parts.append(
            Text(
                f"{percent(overlap['share'])} of the held-out text was also seen in calibration ({overlap['ngram']} tokens in a "
                "row): its numbers may flatter.",
                tone="warning",
            )
        )
    return parts


def _made(record: dict[str, Any]) -> str:
    config, assembly = record.get("config") or {}, record.get("assembly") or {}
    told, model = config.get("quantization") or {}, (config.get("model") or {}).get("path") or "the model"
    group = told.get("group_size")
    width = records.allocated(record) or f"{told.get('bits', '?')} bits"
    how = [f"recipe {told['recipe']}"] if told.get("recipe") else []
    how += [] if group is None else ["one scale a row" if group == -1 else f"groups of {group}"]
    text = f"{model} was quantized to {width}" + (f" ({', '.join(how)})" if how else "")
    if not assembly:
        return text + "; the checkpoint was not finished."
    before, after = assembly["original_bytes"], assembly["bytes"]
    change = f"{percent(1 - after / before, 0)} smaller" if after <= before else f"{percent(after / before - 1, 0)} larger"
    return f"{text}: {size(after)} instead of {size(before)}, {change}."


def _worse(record: dict[str, Any]) -> str:
    found = record.get("evaluation") or {}
    before, after = found.get("original_perplexity"), found.get("quantized_perplexity")
    if not known(after):
        return "Its quality was not measured."
    where = f"On {count(found['windows'], 'window')} of held-out text" if found.get("windows") else "On held-out text"
    if not known(before):
        text = f"{where} its perplexity is {number(after)}; the original was not measured."
    else:
        moves = "rises" if after > before else "falls" if after < before else "stays"
        text = f"{where} perplexity {moves} from {number(before)} to {number(after)} ({percent(after / before - 1, signed=True)})"
    if known(found.get("kl")):
        text += f", the KL from the original is {number(found['kl'], 3)} nats per token"
    if known(found.get("top1_agreement")):
        text += f", and in {percent(found['top1_agreement'])} of all places both name the same next token"
    return text.rstrip(".") + "."


def _noise(record: dict[str, Any]) -> str:
    rows = [row for row in _rows(record) if row.get("inside_noise") is not None]
    if not rows:
        return ""
    outside = [row for row in rows if not row["inside_noise"]]
    if not outside:
        return f"No difference can be told from noise in any of {count(len(rows), 'measure')}." if len(rows) > 1 else rows[0]["sentence"]
    names = ", ".join(f"{figures.measure_name(row)} is at {percent(row.get('recovery'))} of the original" for row in outside[:4])
    names += ", …" if len(outside) > 4 else ""
    return f"{len(outside)} of {count(len(rows), 'measure')} {'differs' if len(outside) == 1 else 'differ'} by more than noise: {names}."


def _gate(record: dict[str, Any]) -> str:
    gate = record.get("gate")
    if not gate:
        return "No gate was set."
    return "It passed its gate." if gate["passed"] else f"It did not pass its gate ({failed(gate)})."


def _tiles(record: dict[str, Any]) -> Tiles:
    found, assembly, gate = record.get("evaluation") or {}, record.get("assembly") or {}, record.get("gate")
    tiles = []
    if assembly:
        tiles = [
            ("size", size(assembly["bytes"]), f"original {size(assembly['original_bytes'])}"),
            ("bits per weight", number(assembly["bits_per_weight"]), count(assembly["quantized_layers"], "layer")),
        ]
    if known(found.get("quantized_perplexity")):
        tiles.append(("perplexity", number(found["quantized_perplexity"]), f"original {number(found.get('original_perplexity'))}"))
    if known(found.get("kl")):
        tiles.append(("KL per token", number(found["kl"], 3), "nats; 0: as the original"))
    if known(found.get("top1_agreement")):
        tiles.append(("same next token", percent(found["top1_agreement"]), "of all places"))
    if known(found.get("flips")):
        tiles.append(("flips", percent(found["flips"]), "right to wrong or back"))
    tiles.append(("gate", NONE if not gate else "passed" if gate["passed"] else "failed", "not set" if not gate else ""))
    if known(record.get("seconds")):
        tiles.append(("time", duration(record["seconds"]), (record.get("machine") or {}).get("gpu") or "on the CPU"))
    return Tiles(tiles)


# -- quality --------------------------------------------------------------------------------------------------------------


def _quality(record: dict[str, Any]) -> list[Part | None]:
    found, assembly = record.get("evaluation") or {}, record.get("assembly") or {}
    before, after = found.get("original_perplexity"), found.get("quantized_perplexity")
    if not assembly or not known(after):
        return []
    point = {"name": name(record), "bytes": assembly["bytes"], "value": after, "mark": "this run"}
    originals = [(assembly["original_bytes"], before)] if known(before) else []
    figure = figures.quality_against_size(
        [point],
        key="quality",
        title="Perplexity against size",
        label="perplexity",
        front=[],
        chosen=point["name"],
        originals=originals,
        what="run",
    )
    gate = record.get("gate")
    rows = [
        [check["limit"], number(check["limit_value"]), number(check["value"]), "kept" if check["passed"] else "not kept"]
        for check in (gate["checks"] if gate else [])
    ]
    return [figure, Table("Limits of the gate", ["limit", "set to", "measured", ""], rows) if rows else None]


def _rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    return (record.get("evaluation") or {}).get("measures") or []


def _measures(record: dict[str, Any]) -> list[Part | None]:
    found, data = record.get("evaluation") or {}, record.get("evaluation_data") or {}
    if not found:
        return []
    held_out = [
        ["perplexity", number(found.get("original_perplexity")), number(found.get("quantized_perplexity"))],
        ["KL per token (nats)", "0", number(found.get("kl"))],
        ["same next token", "100 %", percent(found.get("top1_agreement"))],
        ["answer flips", "0 %", percent(found.get("flips"))],
    ]
    shown = [row for row in held_out if row[2] != NONE]
    source = f"{data['source']}: " if data.get("source") else ""
    told = (
        f"{source}{number(found.get('windows'))} windows of {number(found.get('seqlen'))} tokens, "
        f"{number(found.get('tokens'))} in all, run by {found.get('backend', 'torch')}. Digest {str(found.get('digest'))[:16]}."
    )
    if found.get("overlap"):
        told += f" {percent(found['overlap']['share'], 2)} of its {found['overlap']['ngram']}-grams were seen in calibration."
    rows = [
        [
            figures.measure_name(row),
            str(row.get("protocol") or ""),
            number(row.get("original")),
            number(row.get("quantized")),
            percent(row.get("recovery")),
            figures.interval(row),
            {True: "inside", False: "outside", None: NONE}[row.get("inside_noise")],
            number(row.get("lost")),
            number(row.get("gained")),
            number(row.get("count")),
        ]
        for row in _rows(record)
    ]
    header = ["measure", "protocol", "original", "quantized", "recovery", "95 % interval", "noise", "lost", "gained", "count"]
    return [
        Table("Held-out text", ["measure", "original", "quantized"], shown),
        Text(told),
        figures.recovery(_rows(record)),
        Table("All measures", header, rows) if rows else None,
        Items([row["sentence"] for row in _rows(record) if row.get("sentence")]) if rows else None,
    ]


# -- layers ---------------------------------------------------------------------------------------------------------------


def _layers(record: dict[str, Any]) -> list[Part | None]:
    head = (record.get("assembly") or {}).get("lm_head")
    told = f"The output head, {head['name']}: relative error {number(head.get('relative_error'), 3)}." if head else None
    return [figures.errors(_blocks(record)), Text(told) if told else None]


def _experts(record: dict[str, Any]) -> list[Part | None]:
    tokens = figures.expert_tokens(_blocks(record))
    none = [f"{expert} of block {block}" for (expert, block), found in tokens.items() if found == 0]
    told = Text(f"No calibration token reached {_some(none)}: more calibration.samples would.", tone="warning") if none else None
    return [told, figures.experts(_blocks(record))]


def _time(record: dict[str, Any]) -> list[Part | None]:
    peak, machine = record.get("peak_memory_bytes") or {}, record.get("machine") or {}
    where = {"gpu": "on the GPU", "host": "main memory of the process"}
    tiles = [("peak memory", size(found), where.get(kind, kind)) for kind, found in peak.items()]
    told = ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None and not isinstance(value, dict))
    return [
        figures.stages(record.get("stage_seconds") or {}, record.get("seconds")),
        Tiles(tiles) if tiles else None,
        Text(f"Measured on: {told}.") if told else None,
    ]


# -- what a person must know before using it ------------------------------------------------------------------------------


def _left(record: dict[str, Any]) -> list[Part | None]:
    assembly, told = record.get("assembly") or {}, []
    reasons: dict[str, list[str]] = {}
    for row in assembly.get("skipped") or []:
        reasons.setdefault(row["reason"], []).append(row["name"])
    told += [f"Left as they were, {reason}: {_some(names)}." for reason, names in reasons.items()]
    fallbacks = {layer["name"]: layer.get("fallback") for block in _blocks(record) for layer in block["layers"]}
    told += [
        f"Rounded to nearest: {layer}" + (f" ({fallbacks[layer]})" if fallbacks.get(layer) else "") + "."
        for layer in assembly.get("fallback_layers") or []
    ]
    untuned = assembly.get("untuned_blocks") or []
    told += [f"Block tuning made these blocks no better and was not kept: {_some([str(block) for block in untuned])}."] if untuned else []
    unused = assembly.get("unused_source_tensors") or []
    told += [f"In the source and not in the model, so not written: {_some(unused)}."] if unused else []
    told += [f"Note: {note}" for note in record.get("notes") or []]
    return [Items(told) if told else Text("Every linear layer of the blocks was quantized, and none fell back.") if assembly else None]


def _some(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def _loads(record: dict[str, Any]) -> list[Part | None]:
    rows = [
        [f"{row['consumer']} {row['version']}", "yes" if row["loads"] else "no", "; ".join(row["reasons"])]
        for row in (record.get("assembly") or {}).get("loads") or []
    ]
    return [Table("By the rules of each", ["software", "loads", "why not"], rows) if rows else None]


# -- again ----------------------------------------------------------------------------------------------------------------


def shown_config(config: Any) -> Any:
    """The config with long lists counted."""
    if isinstance(config, dict):
        return {key: shown_config(value) for key, value in config.items()}
    if isinstance(config, list) and len(config) > MOST_TEXTS:
        return f"{len(config)} given in the config"
    return config


def as_yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(shown_config(config), sort_keys=False, allow_unicode=True)


def _again(record: dict[str, Any]) -> list[Part | None]:
    if not record.get("config"):
        return []
    data = [
        [role, str(found.get("source")), number(found.get("windows")), number(found.get("seqlen")), str(found.get("digest"))]
        for role in ("calibration", "evaluation")
        if (found := record.get(f"{role}_data"))
    ]
    known_by = {
        "run": record.get("id"),
        "work (model, text, config, code)": record.get("key"),
        "started": record.get("started"),
        "checkpoint": record.get("out"),
        "Prefect flow run": record.get("prefect_flow_run_id"),
    }
    return [
        Text(
            "Save the config as run.yaml and run the command in the same working directory: the checkpoint is the same to the byte on "
            "the same machine and versions."
        ),
        Code("The command", "python -m flows quantize run.yaml"),
        Code("The config", as_yaml(record["config"]), "run.yaml"),
        Table("Texts", ["text", "source", "windows", "tokens each", "digest"], data) if data else None,
        Table("Known by", ["what", "value"], [[what, str(value)] for what, value in known_by.items() if value]),
    ]
