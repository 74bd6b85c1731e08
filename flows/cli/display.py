"""Tables at the end of a command, on stdout."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from gptq_core.checkpoint.inspection import Inspection
from tasks.config.run import RunConfig
from tasks.outcome.parts import Json, Loadability, Registration
from tasks.outcome.record import RunRecord, SweepRecord, record_path
from tasks.report.find import run_report, sweep_report
from tasks.report.words import size
from tasks.request.capacity import Foreseen, Shortage


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}" if isinstance(value, float) else str(value)


def show_table(rows: Json) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2))
    for key, value in rows.items():
        table.add_row(key, number(value))
    _console().print(table)


def show_run(config: RunConfig, record: RunRecord) -> None:
    """The short table of a run, and where to look."""
    evaluation, assembly, allocation = record.evaluation, record.assembly, record.allocation
    width = f"{allocation.bits_per_weight:.2f}" if allocation else config.quantization.bits
    table = Table(title=f"{config.out.name}: {width} bits, group {config.quantization.group_size}", title_justify="left")
    for column in ("", "original", "quantized"):
        table.add_column(column, justify="left" if not column else "right")
    perplexities = (evaluation.original_perplexity, evaluation.quantized_perplexity) if evaluation else (None, None)
    table.add_row("perplexity", *(f"{value:.3f}" if value is not None else "-" for value in perplexities))
    if evaluation and evaluation.kl is not None:
        table.add_row("KL per token", "", f"{evaluation.kl:.5f} nats")
    if evaluation and evaluation.top1_agreement is not None:
        table.add_row("same top token", "", f"{evaluation.top1_agreement:.2%}")
    table.add_row("size", size(assembly.original_bytes), size(assembly.bytes))
    table.add_row("bits per weight", "", f"{assembly.bits_per_weight:.3f}")
    if record.seconds is not None:
        table.add_row("seconds", "", f"{record.seconds:.1f}")
    console = _console()
    console.print(table)
    console.print(_places(config, record))


def _places(config: RunConfig, record: RunRecord) -> Table:
    """Where the checkpoint lies, who loads it, and what came of its gate and its tracking."""
    uri = config.tracking.uri
    places = Table(show_header=False, box=None, padding=(0, 2))
    places.add_row("checkpoint", str(config.out))
    places.add_row("record", str(record_path(config.out)))
    if run_report(config.out).is_file():
        places.add_row("report", str(run_report(config.out)))
    if record.allocation:
        places.add_row("allocation", str(record.allocation))
    if record.assembly.loads:
        places.add_row("loads in", loads_in(record.assembly.loads))
    if record.gate:
        places.add_row("gate", str(record.gate))
    if record.registry:
        places.add_row("registry", registered(record.registry))
    if record.mlflow and record.mlflow.error:
        places.add_row("MLflow", "not recorded; python -m flows track-pending logs it later")
    else:
        places.add_row("MLflow", uri if uri.startswith(("http", "env:", "block:")) else f"python -m flows ui --store {uri}")
    places.add_row("Prefect", f"python -m flows ui   (flow run {record.prefect_flow_run_id})")
    return places


def show_inspection(found: Inspection) -> None:
    """Print what a checkpoint holds."""
    head = {
        "checkpoint": found["path"],
        "format": found["format"],
        "bits": found["bits"],
        "group size": found["group_size"],
        "symmetric": found["sym"],
        "desc_act": found["desc_act"],
        "bits per weight": found["bits_per_weight"],
        "size": size(found["bytes"]),
        "quantized layers": len(found["layers"]),
        "dense tensors": len(found["dense"]),
    }
    if found["loads"]:
        head["loads in"] = loads_in([Loadability.model_validate(row) for row in found["loads"]])
    show_table(head)
    layers = Table(box=None, padding=(0, 2))
    for column in ("layer", "in", "out", "groups", "bits", "size"):
        layers.add_column(column, justify="left" if column == "layer" else "right")
    for layer in found["layers"]:
        layers.add_row(layer["name"], *(str(layer[key]) for key in ("in_features", "out_features", "groups", "bits")), size(layer["bytes"]))
    dense = Table(box=None, padding=(0, 2))
    for column in ("dense tensor", "shape", "type", "size"):
        dense.add_column(column, justify="left" if column == "dense tensor" else "right")
    for tensor in found["dense"]:
        dense.add_row(tensor["name"], " x ".join(map(str, tensor["shape"])), tensor["dtype"], size(tensor["bytes"]))
    _console().print(layers)
    _console().print(dense)


def show_plan(found: Foreseen, short: list[Shortage]) -> None:
    """What a run would make, who will load it, what it takes, and what of that is not there."""
    costs = found.estimate
    rows = {
        "blocks": costs.blocks,
        "quantized layers": len(found.selection.layers),
        "left as they are": len(found.selection.left),
        "bits per weight": found.bits_per_weight,
        "size": f"{size(found.bytes)} of {size(found.original_bytes)}",
        "device": f"{costs.device}, {costs.dtype}",
        "peak memory": f"{size(costs.host_bytes)}, of it {size(costs.mapped_bytes)} files that the system can take back",
    }
    if costs.device_bytes:
        rows["peak on the device"] = size(costs.device_bytes)
    rows["highest stage"] = max(costs.stage_bytes, key=costs.stage_bytes.__getitem__)
    rows |= {"reads": size(costs.read_bytes), "writes": size(costs.write_bytes), "about": _times(costs.seconds)}
    show_table(rows)
    console = _console()
    for reason, names in _by_reason(found.selection.left).items():
        console.print(f"  left: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}", markup=False)
    table = Table(box=None, padding=(0, 2))
    for column in ("consumer", "loads", "why not"):
        table.add_column(column)
    for verdict in found.verdicts:
        table.add_row(f"{verdict.consumer} {verdict.version}", "yes" if verdict.loads else "no", "\n".join(verdict.reasons))
    console.print(table)
    for note in (*found.notes, *costs.notes):
        console.print(f"  note: {note}", markup=False)
    for shortage in short:
        console.print(f"  {'does not fit' if shortage.certain else 'may not fit'}: {shortage}", markup=False)


def _times(seconds: dict[str, float]) -> str:
    if not seconds:
        return "not known: this machine does not have the device"
    whole = sum(seconds.values())
    total = f"{whole:.0f} s" if whole < 600 else f"{whole / 60:.0f} min" if whole < 36_000 else f"{whole / 3600:.0f} h"
    missing = "" if "evaluation" in seconds else "; without the evaluation, whose text is not looked at"
    return f"{total} ({', '.join(f'{stage} {share / whole:.0%}' for stage, share in seconds.items())}{missing})"


def _by_reason(left: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in left.items():
        found.setdefault(reason, []).append(name)
    return found


def registered(found: Registration) -> str:
    """A version in the model registry, and whether it holds the alias."""
    if found.error:
        return "not registered; the same command tries again, and so does python -m flows track-pending"
    beaten = f", before: version {found.beaten}" if found.beaten else ""
    return f"{found.name} version {found.version}, {'is' if found.champion else 'not'} {found.alias}{beaten}"


def loads_in(verdicts: list[Loadability]) -> str:
    """The consumers that load a checkpoint, by their rules."""
    loading = ", ".join(f"{row.consumer} {row.version}" for row in verdicts if row.loads)
    return loading or "none of " + ", ".join(row.consumer for row in verdicts)


def _console() -> Console:
    # off a terminal rich would fold long names at 80 columns
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def show_sweep(sweep: SweepRecord) -> None:
    """The cells by size, unfinished ones last, and the recommended one."""
    label = " (screening: Hessians of the original, no checkpoints)" if sweep.screening else ""
    table = Table(title=f"{sweep.folder}{label}", title_justify="left")
    columns = ("cell", "size", "bits per weight", "perplexity", "KL per token", "seconds", "gate", "")
    for column in columns:
        table.add_column(column, justify="left" if column in ("cell", "gate", "") else "right", overflow="fold")
    choice = sweep.recommended
    for cell in sorted(sweep.cells, key=lambda cell: (not cell.done, cell.bytes or 0)):
        if not cell.done:
            table.add_row(cell.name, "", "", "", "", "", "", cell.status)
            continue
        marks = ["recommended"] * (cell.name == choice.name) + ["front"] * (cell.name in sweep.front)
        table.add_row(
            cell.name,
            size(cell.bytes),
            f"{cell.bits_per_weight:.3f}",
            f"{cell.perplexity:.3f}",
            "-" if cell.kl is None else f"{cell.kl:.5f}",
            f"{cell.seconds:.1f}",
            cell.gate or "",
            ", ".join(marks),
        )
    console = _console()
    console.print(table)
    for cell in sweep.cells:
        if not cell.done:
            console.print(f"{cell.name}: {cell.status}: {cell.error}", highlight=False, markup=False)
    text = f"recommended: {choice.name or 'none'} ({choice.rule}): {choice.reason}"
    if sweep.screening and choice.name:
        text += "; run it with mode: exact before you use it"
    console.print(text, highlight=False, markup=False)
    if sweep_report(sweep.folder).is_file():
        console.print(f"report: {sweep_report(sweep.folder)}", highlight=False, markup=False)
