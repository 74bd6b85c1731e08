"""The tables of a side-by-side bench, made of its results alone; side_by_side.py says what is measured, and how results look."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

Run = dict[str, Any]
DISTURBED = 0.1
"""Cores that others used, from which wall seconds are no longer to be compared."""


def of(results: dict[str, Any], engine: str) -> dict[int, Run]:
    """The measured runs of an engine by round; the rounds that warm up are below 0."""
    return {run["round"]: run for run in results["runs"] if run["engine"] == engine and run["round"] >= 0}


def ratio(runs: dict[int, Run], ours: dict[int, Run], value: Callable[[Run], float]) -> float | None:
    """Median over the rounds of a value over ours in the same round: what slows a round down slows both."""
    found = [value(run) / value(ours[index]) for index, run in runs.items() if index in ours]
    return statistics.median(found) if found else None


def main_table(results: dict[str, Any]) -> str:
    """A row an engine; ratios to `results["ours"]`."""
    lines = [
        "| | CPU s | ratio | wall s | ratio | peak MB | ratio | MB before | load and save, CPU s | perplexity | KL |",
        "|---" * 11 + "|",
    ]
    ours = of(results, results["ours"])
    for engine in results["engines"]:
        runs = of(results, engine)
        if not runs:
            lines.append(f"| {engine} | {results['failures'].get(engine, 'not run')} |" + " |" * 9)
            continue
        cells: list[str] = []
        for value, digits in ((cpu, 1), (wall, 1), (peak, 0)):
            cells += [number(statistics.median(map(value, runs.values())), digits), number(ratio(runs, ours, value), 2)]
        cells.append(number(statistics.median(run["quantize"]["start_bytes"] / 1e6 for run in runs.values()), 0))
        around = [sum(run[step]["cpu_seconds"] for step in ("load", "save")) for run in runs.values()]
        cells.append(number(statistics.median(around), 1))
        quality = results["quality"].get(engine, {})
        cells += [number(quality.get("quantized_perplexity"), 4), number(quality.get("kl"), 5)]
        lines.append(f"| {engine} | {' | '.join(cells)} |")
    return "\n".join(lines)


def stage_table(results: dict[str, Any]) -> str:
    """Wall seconds of our stages, medians over the rounds, and the rest of the step, which no stage has."""
    ours = {engine: list(of(results, engine).values()) for engine in results["engines"]}
    ours = {engine: runs for engine, runs in ours.items() if runs and "stages" in runs[0]}
    names = list(dict.fromkeys(name for runs in ours.values() for run in runs for name in run["stages"]))
    lines = ["| wall s | " + " | ".join(ours) + " |", "|---" * (1 + len(ours)) + "|"]
    for name in names:
        lines.append(
            f"| {name} | " + " | ".join(share(runs, lambda run, name=name: run["stages"].get(name, 0.0)) for runs in ours.values()) + " |"
        )
    lines.append("| outside the stages | " + " | ".join(share(runs, rest) for runs in ours.values()) + " |")
    lines.append("| all | " + " | ".join(number(statistics.median(map(wall, runs)), 2) for runs in ours.values()) + " |")
    return "\n".join(lines)


def share(runs: Iterable[Run], value: Callable[[Run], float]) -> str:
    found = list(runs)
    return f"{statistics.median(map(value, found)):.2f} ({statistics.median(value(run) / wall(run) for run in found):.0%})"


def cpu(run: Run) -> float:
    return run["quantize"]["cpu_seconds"]


def wall(run: Run) -> float:
    return run["quantize"]["seconds"]


def peak(run: Run) -> float:
    return run["quantize"]["peak_bytes"] / 1e6


def rest(run: Run) -> float:
    return wall(run) - sum(run["stages"].values())


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def head(results: dict[str, Any]) -> str:
    """What was measured, on what, and whether others were at work there."""
    setting, machine = results["setting"], results["machine"]
    busy = statistics.median(run["others"] for run in results["runs"] if run["round"] >= 0)
    disturbed = f"Others used {busy:.1f} cores meanwhile (median of the runs)"
    disturbed += ": compare the CPU seconds; wall seconds and stages also measure them." if busy >= DISTURBED else "."
    versions = sorted({f"{name} {version}" for found in results["versions"].values() for name, version in found.items()})
    memory, rounds = machine["memory_bytes"] / 2**30, max((run["round"] for run in results["runs"]), default=-1) + 1
    instructions = " ".join(machine["instructions"]) or machine["architecture"]
    return "\n".join(
        [
            f"# {setting['model']}, {setting['bits']} bits, group {setting['group_size']}, {setting['threads']} "
            f"thread{'s' * (setting['threads'] > 1)}",
            "",
            f"{results['date']}. {setting['windows']} × {setting['seqlen']} calibration tokens ({setting['calibration']}), symmetric, "
            f"dtype {setting['own_dtype']} for ours and {setting['dtype']} for peers; medians of {rounds} rounds, "
            f"{setting['warmup']} before them discarded; ratios to "
            f"{results['ours']} of the same round.",
            "",
            f"{machine['processor']}, {machine['cores']} cores, {memory:.0f} GiB; {instructions}. {disturbed}",
            "",
            f"{', '.join(versions)}.",
        ]
    )


def document(results: dict[str, Any]) -> str:
    """The whole file."""
    note = (
        "The step of a peer is its quantize call on a model that is in memory; loading and saving stand in a column of their own. "
        "Ours opens the folders and makes an empty model before, and writes what is in no block after; the blocks are read, packed "
        "and written inside. Peak: highest resident set of the process during the step; before it, the libraries are in memory, and "
        "of a peer the model."
    )
    parts = [head(results), main_table(results), note]
    if results["heldout"]:
        parts.append(f"Perplexity and KL of the checkpoints of the first round by one evaluator, on {results['heldout']} held-out tokens.")
    if any("stages" in run for run in results["runs"]):
        parts += ["## Our stages", stage_table(results)]
    return "\n\n".join(parts) + "\n"
