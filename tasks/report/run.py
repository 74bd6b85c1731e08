"""The report of one run, from its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gptq_core.data.overlap import objection
from tasks.outcome.parts import Json
from tasks.outcome.record import RunRecord
from tasks.report import figures, layer_figures
from tasks.report.parts import Code, Items, Page, Part, Section, Table, Text, Tiles
from tasks.report.words import NONE, count, duration, known, number, percent, size

MOST_TEXTS = 20
"""Entries of a list in the config that are shown; calibration texts given in place may be thousands."""
MOST_NAMES = 12
"""Names of layers or tensors in one line."""


def page(record: RunRecord) -> Page:
    """All that the record holds; a section without content is left out."""
    sections: list[tuple[str, str, list[Part | None]]] = [
        ("summary", "Summary", [*_headline(record), _tiles(record)]),
        ("quality", "Quality and size", _quality(record)),
        ("measures", "Measures", _measures(record)),
        ("layers", "Error by layer", _layers(record)),
        ("codes", "Scales and codes", [layer_figures.scales(record.blocks), layer_figures.codes(record.blocks)]),
        ("experts", "Experts", _experts(record)),
        ("time", "Time and memory", _time(record)),
        ("left", "Left as it was, or fell back", _left(record)),
        ("loads", "Who loads it", _loads(record)),
        ("config", "Config, and how to make it again", _again(record)),
    ]
    found = [Section(key, title, [part for part in parts if part is not None]) for key, title, parts in sections]
    return Page(name(record), "Quantization report", [section for section in found if section.parts])


def name(record: RunRecord) -> str:
    return Path(record.out).name


# -- what is read first ---------------------------------------------------------------------------------------------------


def _headline(record: RunRecord) -> list[Part]:
    """What was made of what, how much smaller, how much worse, and whether that is allowed: in whole sentences."""
    sentences = [_made(record), _worse(record), _noise(record), _gate(record)]
    parts: list[Part] = [Text(" ".join(sentence for sentence in sentences if sentence), tone="lead")]
    if record.evaluation_error:
        parts.append(
            Text(
                f"The evaluation failed: {record.evaluation_error}. The checkpoint is complete; the same command evaluates it.",
                tone="warning",
            )
        )
    fell = len(record.assembly.fallback_layers)
    if fell:
        parts.append(
            Text(
                f"{count(fell, 'layer')} could not be solved and {'was' if fell == 1 else 'were'} rounded to nearest: see below.",
                tone="warning",
            )
        )
    overlap = record.evaluation.overlap if record.evaluation else None
    if overlap and objection(overlap.share, overlap.calibration_share, "evaluation"):
        parts.append(
            Text(
                f"{percent(overlap.share)} of the held-out text was also seen in calibration ({overlap.ngram} tokens in a "
                "row): its numbers may flatter.",
                tone="warning",
            )
        )
    return parts


def _made(record: RunRecord) -> str:
    wanted, model = record.config.get("quantization") or {}, (record.config.get("model") or {}).get("path") or "the model"
    group = wanted.get("group_size")
    width = record.allocation or f"{wanted.get('bits', '?')} bits"
    how = [f"recipe {wanted['recipe']}"] if wanted.get("recipe") else []
    how += [] if group is None else ["one scale a row" if group == -1 else f"groups of {group}"]
    text = f"{model} was quantized to {width}" + (f" ({', '.join(how)})" if how else "")
    before, after = record.assembly.original_bytes, record.assembly.bytes
    change = f"{percent(1 - after / before, 0)} smaller" if after <= before else f"{percent(after / before - 1, 0)} larger"
    return f"{text}: {size(after)} instead of {size(before)}, {change}."


def _worse(record: RunRecord) -> str:
    found = record.evaluation
    if found is None or not known(found.quantized_perplexity):
        return "Its quality was not measured."
    before, after = found.original_perplexity, found.quantized_perplexity
    where = f"On {count(found.windows, 'window')} of held-out text" if found.windows else "On held-out text"
    if not known(before):
        text = f"{where} its perplexity is {number(after)}; the original was not measured."
    else:
        moves = "rises" if after > before else "falls" if after < before else "stays"
        text = f"{where} perplexity {moves} from {number(before)} to {number(after)} ({percent(after / before - 1, signed=True)})"
    if known(found.kl):
        text += f", the KL from the original is {number(found.kl, 3)} nats per token"
    if known(found.top1_agreement):
        text += f", and in {percent(found.top1_agreement)} of all places both name the same next token"
    return text.rstrip(".") + "."


def _noise(record: RunRecord) -> str:
    results = [result for result in record.evaluation.measures if result.inside_noise is not None] if record.evaluation else []
    if not results:
        return ""
    outside = [result for result in results if not result.inside_noise]
    if not outside:
        many = f"No difference can be told from noise in any of {count(len(results), 'measure')}."
        return many if len(results) > 1 else results[0].sentence
    names = ", ".join(f"{figures.measure_name(result)} is at {percent(result.recovery)} of the original" for result in outside[:4])
    names += ", …" if len(outside) > 4 else ""
    return f"{len(outside)} of {count(len(results), 'measure')} {'differs' if len(outside) == 1 else 'differ'} by more than noise: {names}."


def _gate(record: RunRecord) -> str:
    if not record.gate:
        return "No gate was set."
    return "It passed its gate." if record.gate.passed else f"It did not pass its gate ({record.gate.failures})."


def _tiles(record: RunRecord) -> Tiles:
    found, assembly, gate = record.evaluation, record.assembly, record.gate
    tiles = [
        ("size", size(assembly.bytes), f"original {size(assembly.original_bytes)}"),
        ("bits per weight", number(assembly.bits_per_weight), count(assembly.quantized_layers, "layer")),
    ]
    if found:
        rows = [
            ("perplexity", number(found.quantized_perplexity), f"original {number(found.original_perplexity)}", found.quantized_perplexity),
            ("KL per token", number(found.kl, 3), "nats; 0: as the original", found.kl),
            ("same next token", percent(found.top1_agreement), "of all places", found.top1_agreement),
            ("flips", percent(found.flips), "right to wrong or back", found.flips),
        ]
        tiles += [(label, text, below) for label, text, below, value in rows if known(value)]
    tiles.append(("gate", gate.word if gate else NONE, "" if gate else "not set"))
    if known(record.seconds):
        tiles.append(("time", duration(record.seconds), record.machine.gpu or "on the CPU"))
    return Tiles(tiles)


# -- quality --------------------------------------------------------------------------------------------------------------


def _quality(record: RunRecord) -> list[Part | None]:
    found, assembly = record.evaluation, record.assembly
    if found is None or not known(found.quantized_perplexity):
        return []
    point = figures.Point(name(record), assembly.bytes, found.quantized_perplexity, "this run")
    figure = figures.quality_against_size(
        [point],
        key="quality",
        title="Perplexity against size",
        label="perplexity",
        front=[],
        chosen=point.name,
        originals=figures.known_originals([(assembly.original_bytes, found.original_perplexity)]),
        what="run",
    )
    rows = [
        [check.limit, number(check.limit_value), number(check.value), "kept" if check.passed else "not kept"]
        for check in (record.gate.checks if record.gate else [])
    ]
    return [figure, Table("Limits of the gate", ["limit", "set to", "measured", ""], rows) if rows else None]


def _measures(record: RunRecord) -> list[Part | None]:
    found, data = record.evaluation, record.evaluation_data
    if found is None:
        return []
    held_out = [
        ["perplexity", number(found.original_perplexity), number(found.quantized_perplexity)],
        ["KL per token (nats)", "0", number(found.kl)],
        ["same next token", "100 %", percent(found.top1_agreement)],
        ["answer flips", "0 %", percent(found.flips)],
    ]
    shown = [row for row in held_out if row[2] != NONE]
    text = (
        f"{data.source}: {number(found.windows)} windows of {number(found.seqlen)} tokens, "
        f"{number(found.tokens)} in all, run by {found.backend}. Digest {found.digest[:16]}."
    )
    if found.overlap:
        text += f" {percent(found.overlap.share, 2)} of its {found.overlap.ngram}-grams were seen in calibration."
    rows = [
        [
            figures.measure_name(result),
            result.protocol or "",
            number(result.original),
            number(result.quantized),
            percent(result.recovery),
            figures.interval(result),
            {True: "inside", False: "outside", None: NONE}[result.inside_noise],
            number(result.lost),
            number(result.gained),
            number(result.count),
        ]
        for result in found.measures
    ]
    header = ["measure", "protocol", "original", "quantized", "recovery", "95 % interval", "noise", "lost", "gained", "count"]
    return [
        Table("Held-out text", ["measure", "original", "quantized"], shown),
        Text(text),
        figures.recovery(found.measures),
        Table("All measures", header, rows) if rows else None,
        Items([result.sentence for result in found.measures]) if rows else None,
    ]


# -- layers ---------------------------------------------------------------------------------------------------------------


def _layers(record: RunRecord) -> list[Part | None]:
    head = record.assembly.lm_head
    text = f"The output head, {head.name}: relative error {number(head.relative_error, 3)}." if head else None
    return [layer_figures.errors(record.blocks), Text(text) if text else None]


def _experts(record: RunRecord) -> list[Part | None]:
    tokens = layer_figures.expert_tokens(record.blocks)
    none = [f"{expert} of block {block}" for (expert, block), found in tokens.items() if found == 0]
    text = Text(f"No calibration token reached {_some(none)}: more calibration.samples would.", tone="warning") if none else None
    return [text, layer_figures.experts(record.blocks)]


def _time(record: RunRecord) -> list[Part | None]:
    where = {"gpu": "on the GPU", "host": "main memory of the process"}
    tiles = [("peak memory", size(found), where.get(kind, kind)) for kind, found in (record.peak_memory_bytes or {}).items()]
    machine = ", ".join(f"{key} {value}" for key, value in record.machine.model_dump().items() if value is not None)
    return [
        figures.stages(record.stage_seconds, record.seconds),
        Tiles(tiles) if tiles else None,
        Text(f"Measured on: {machine}.") if machine else None,
    ]


# -- what a person must know before using it ------------------------------------------------------------------------------


def _left(record: RunRecord) -> list[Part | None]:
    assembly, items = record.assembly, []
    reasons: dict[str, list[str]] = {}
    for left in assembly.skipped:
        reasons.setdefault(left.reason, []).append(left.name)
    items += [f"Left as they were, {reason}: {_some(names)}." for reason, names in reasons.items()]
    fallbacks = {layer.name: layer.fallback for block in record.blocks for layer in block.layers}
    items += [
        f"Rounded to nearest: {layer}" + (f" ({fallbacks[layer]})" if fallbacks.get(layer) else "") + "."
        for layer in assembly.fallback_layers
    ]
    untuned, unused = assembly.untuned_blocks, assembly.unused_source_tensors
    items += [f"Block tuning made these blocks no better and was not kept: {_some([str(block) for block in untuned])}."] if untuned else []
    items += [f"In the source and not in the model, so not written: {_some(unused)}."] if unused else []
    items += [f"Note: {note}" for note in record.notes]
    return [Items(items) if items else Text("Every linear layer of the blocks was quantized, and none fell back.")]


def _some(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def _loads(record: RunRecord) -> list[Part | None]:
    rows = [[f"{row.consumer} {row.version}", "yes" if row.loads else "no", "; ".join(row.reasons)] for row in record.assembly.loads]
    return [Table("By the rules of each", ["software", "loads", "why not"], rows) if rows else None]


# -- again ----------------------------------------------------------------------------------------------------------------


def shown_config(config: Any) -> Any:
    """The config with long lists counted."""
    if isinstance(config, dict):
        return {key: shown_config(value) for key, value in config.items()}
    if isinstance(config, list) and len(config) > MOST_TEXTS:
        return f"{len(config)} given in the config"
    return config


def as_yaml(config: Json) -> str:
    return yaml.safe_dump(shown_config(config), sort_keys=False, allow_unicode=True)


def _again(record: RunRecord) -> list[Part | None]:
    data = [
        [role, text.source, number(text.windows), number(text.seqlen), text.digest]
        for role, text in (("calibration", record.calibration_data), ("evaluation", record.evaluation_data))
    ]
    known_by = {
        "run": record.id,
        "work (model, text, config, code)": record.key,
        "started": record.started,
        "checkpoint": record.out,
        "Prefect flow run": record.prefect_flow_run_id,
    }
    return [
        Text(
            "Save the config as run.yaml and run the command in the same working directory: the checkpoint is the same to the byte on "
            "the same machine and versions."
        ),
        Code("The command", "python -m flows quantize run.yaml"),
        Code("The config", as_yaml(record.config), "run.yaml"),
        Table("Texts", ["text", "source", "windows", "tokens each", "digest"], data),
        Table("Known by", ["what", "value"], [[what, value] for what, value in known_by.items() if value]),
    ]
