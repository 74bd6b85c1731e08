"""Many runs that differ in a few keys: what they share is done once, cells run beside each other, one of them is recommended.

    examine -> original x M -> cell x N (workers, or a Ray cluster) -> log each -> choose -> report -> log

A cell is computed by a worker process that asks neither Prefect nor MLflow, and lies on disk when it is done: whatever is killed,
the same command goes on with what is missing. A cell that fails is reported and stops no other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, as_completed
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows import progress
from flows.artifacts import LATER, Board, prefect_run
from flows.cluster import ray_options, ray_runner
from flows.finish import register, tell
from flows.serving.dead_runs import mark_dead_runs
from gptq_core.errors import GPTQError
from tasks.config.sweep import SweepConfig
from tasks.outcome import record as records
from tasks.report.writing import written
from tasks.sweep import cells, jobs, results
from tasks.sweep.cells import State
from tasks.sweep.jobs import Places
from tasks.sweep.worker import Job
from tasks.sweep.workers import INHERITED, Leases, Outcome, Worker, supervise
from tasks.tracking import outbox
from tasks.tracking.figures import front
from tasks.tracking.mlflow_runs import log, log_sweep, open_sweep


class SweepFailedError(GPTQError):
    """Cells of the sweep failed, or none can be recommended; what is done stays."""


@dataclass
class Parent:
    """The sweep's own run in MLflow."""

    sweep: dict[str, Any]
    """What names it: tasks.sweep.results.opening."""
    logged: dict[str, Any] = field(default_factory=dict)
    """open_sweep's outcome; its error is that of the first try that failed, after which no other is made."""


@flow(name="sweep", flow_run_name="sweep-{config.folder.name}", on_running=[mark_dead_runs])
def sweep(config: SweepConfig) -> Any:
    """Run the cells that are missing, log them, choose; sweep.json's content. Nothing to compute: state "Unchanged"."""
    with cells.alone(config):
        return _sweep(config)


def _sweep(config: SweepConfig) -> Any:
    report, board, started = progress.reporter(), Board("sweep"), time.perf_counter()
    states, before = cells.examine(config), results.read(config)
    missing = [state for state in states if state.status == "missing"]
    tracked = next(state.config for state in states if state.cell.config)
    parent = Parent(results.opening(config))
    parent.logged = open_sweep(tracked.tracking, parent.sweep)
    if parent.logged["error"]:
        report.note(f"not recorded in MLflow for now: {parent.logged['error']}; {LATER}")
    for state in states:
        if state.status == "done":
            _log_cell(config, state, parent, report)
    if missing:
        done = _exact if config.mode == "exact" else _screening
        with report.stage("cells", len(missing)) as tick:
            finished = dict(done(config, missing, parent, report, board, tick))
        states = [finished.get(state.cell.name, state) for state in states]
    found = results.result(config, states, [state.cell.name for state in missing], started) | prefect_run()
    if not missing and results.same(before, found):  # told again, not done again
        found |= {key: before[key] for key in ("finished", "seconds", *prefect_run()) if key in before}
    found |= {"registry": _register(states, found, parent, report), "notified": before.get("notified")}
    path = results.write(config, found)
    with report.stage("report"):
        file = written("sweep", found, report)  # before the log, which takes it along
    found["mlflow"] = parent.logged if parent.logged["error"] else log_sweep(tracked.tracking, found)
    outbox.settle(tracked.tracking, "sweep", path, found["mlflow"])
    found["notified"] = tell(tracked.notify, results.happened(found), results.summary(found), found["notified"], report)
    results.write(config, found)
    board.tracked(found["mlflow"])
    board.lines(table(found), f"{config.folder}: {found['recommended']['rule']}: {found['recommended']['name']}")
    board.figure(lambda: front(found), "quality against size" + (", screening" if found["mode"] == "screening" else ""), file)
    board.progress(100, "done")
    if reason := results.objection(found):
        raise SweepFailedError(reason)
    if not missing:
        return Completed(name="Unchanged", data=found, message=f"unchanged: all of {config.folder} is done; nothing was computed")
    return found


# -- exact ----------------------------------------------------------------------------------------------------------------

Found = Iterator[tuple[str, State]]
Tick = Callable[[int, str], None]


@task(name="cell", cache_policy=NO_CACHE)
def run_cell(name: str, job: Job, limits: dict[str, Any], logs: str, folder: str, leases: Leases | None) -> Any:
    """One job in a worker: a leased one of this machine, or one of its own where Ray has put the task. An Outcome.

    folder: the working directory of the sweep, to which paths are relative on every node.
    """
    report = progress.reporter()

    def note(text: str) -> None:
        report.note(f"{name}: {text}")

    if leases is not None:
        with leases.lease() as worker:
            outcome = supervise(worker, job, limits, note)
    else:
        worker = Worker(INHERITED, Path(logs) / f"worker-{name}.log", job["threads"], folder)
        try:
            outcome = supervise(worker, job, limits, note)
        finally:
            worker.retire()
    return outcome if outcome["status"] == "done" else Failed(message=f"{outcome['status']}: {outcome['error']}", data=outcome)


def _exact(config: SweepConfig, missing: list[State], parent: Parent, report: progress.Reporter, board: Board, tick: Tick) -> Found:
    """Cells as they finish: logged, and told."""
    places, by_name = jobs.places(config, missing), {state.cell.name: state for state in missing}
    report.note(f"{len(missing)} cells, {places.at_once} at a time with {places.threads} threads each")
    with _cells(config, places) as run:
        wanted, originals = jobs.original_jobs(config, missing, places.threads)
        for key, outcome in run(wanted):
            if outcome["status"] == "done":
                originals[key] = outcome["result"]["file"]
            else:
                report.note(f"every cell runs the original itself: {outcome['error']}")
        for count, (name, outcome) in enumerate(run(jobs.jobs(config, missing, places.threads, originals)), 1):
            state = cells.after(by_name[name], outcome)
            if state.status == "done":
                written("run", state.record, report)
                _log_cell(config, state, parent, report)
            text = f"{name}: {_told(state)}"
            tick(count, text)
            board.progress(95 * count / len(missing), text)
            yield name, state


@contextmanager
def _cells(config: SweepConfig, places: Places) -> Iterator[Callable[[dict[str, Job]], Iterator[tuple[str, Outcome]]]]:
    """A function that runs jobs and yields their outcomes as they come: by workers of this machine, or on a Ray cluster."""
    limits, logs = config.limits.model_dump(), (config.folder / "shared").absolute()
    leases = Leases(places.devices, places.slots, places.threads, logs) if config.runner == "local" else None
    with ThreadPoolTaskRunner(max_workers=places.at_once) if leases else ray_runner(config) as runner:

        def run(wanted: dict[str, Job]) -> Iterator[tuple[str, Outcome]]:
            names = {}
            with nullcontext() if leases else ray_options(config, places):
                for name, job in wanted.items():
                    given = {"name": name, "job": job, "limits": limits, "logs": str(logs), "folder": os.getcwd(), "leases": leases}
                    names[runner.submit(run_cell.with_options(task_run_name=name[:200]), given)] = name
            for future in as_completed(list(names)):
                yield names[future], _outcome(future)

        try:
            yield run
        finally:
            if leases:
                leases.retire()  # first: the runner waits for its threads, and they for the workers


def _outcome(future: PrefectFuture) -> Outcome:
    found = future.result(raise_on_failure=False)
    if isinstance(found, dict):
        return found
    # not the cell but Prefect: its server went away, or the node of the cluster
    return {"status": "failed", "error": f"{type(found).__name__}: {found}", "attempts": 0, "result": None, "seconds": 0.0}


# -- screening ------------------------------------------------------------------------------------------------------------


def _screening(config: SweepConfig, missing: list[State], parent: Parent, report: progress.Reporter, board: Board, tick: Tick) -> Found:
    """All cells that share model and texts in one job; jobs one after another, with all cores."""
    places = jobs.places(config.model_copy(update={"max_parallel": 1}), missing)
    by_key, count = {}, 0
    for state in missing:
        by_key.setdefault(state.key, []).append(state)  # cells may differ in what screening does not look at, and share a result
    with _cells(config, places) as run:
        wanted = {f"screening-{index}": job for index, job in enumerate(jobs.screening_jobs(config, missing, places.threads))}
        for name, outcome in run(wanted):
            screened = outcome["result"]["cells"] if outcome["result"] else {}
            cells.keep_screened(config, {key: found for key, found in screened.items() if found["error"] is None})
            for waiting in [state for key in wanted[name]["cells"] for state in by_key.pop(key, [])]:
                count += 1
                found = screened.get(waiting.key)
                error = found["error"] if found else outcome["error"]
                state = replace(waiting, status="failed" if error else "done", error=error, record=None if error else found)
                tick(count, f"{state.cell.name}: {_told(state)}")
                yield state.cell.name, state


# -- what is told ---------------------------------------------------------------------------------------------------------


def _log_cell(config: SweepConfig, state: State, parent: Parent, report: progress.Reporter) -> None:
    """The cell as a child run in MLflow, once. After the first that MLflow did not take no other is tried: they go to the outbox."""
    record = state.record
    if config.mode == "screening" or _logged(state, parent):
        return
    record["sweep"] = parent.sweep | {"cell": state.cell.name}
    if not record["prefect_flow_run_id"]:
        record |= prefect_run()
    if parent.logged["error"]:
        record["mlflow"] = parent.logged | {"run_id": None, "url": None}
        path = records.write(state.config.out, record)
        outbox.settle(state.config.tracking, "run", path, record["mlflow"])
        return
    record["mlflow"] = log(state.config, record)
    if record["mlflow"]["error"]:
        parent.logged["error"] = record["mlflow"]["error"]
        report.note(f"{state.cell.name}: computed, not recorded in MLflow: {parent.logged['error']}; {LATER}")


def _logged(state: State, parent: Parent) -> bool:
    """Whether MLflow has the cell as a child of this very parent."""
    known = state.record.get("mlflow") or {}
    return bool(known.get("run_id")) and known["error"] is None and known.get("parent_run_id") == parent.logged["run_id"]


def _register(states: list[State], found: dict[str, Any], parent: Parent, report: progress.Reporter) -> dict[str, Any] | None:
    """The recommended cell in the model registry, where it has passed its gate and the gate names one. Screening registers nothing."""
    [chosen] = [state for state in states if state.cell.name == found["recommended"]["name"]] or [None]
    if chosen is None or found["mode"] == "screening":
        return None
    if parent.logged["error"]:  # what the store would end with again, after as long
        chosen.record["mlflow"] = parent.logged | {"run_id": None, "url": None}
    record = register(chosen.config, chosen.record, report)
    records.write(chosen.config.out, record)
    return record["registry"]


def _told(state: State) -> str:
    if state.status != "done":
        return f"{state.status}: {state.error}"
    found = results.row(state)
    return f"perplexity {found['perplexity']:.3f}" + (f", KL {found['kl']:.5f}" if found["kl"] is not None else "")


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A line a cell, for Prefect's artifact and the terminal."""
    return [
        {
            "cell": row["name"],
            "status": row["status"],
            "GB": row["bytes"] and row["bytes"] / 1e9,
            "bits per weight": row["bits_per_weight"],
            "perplexity": row["perplexity"],
            "KL": row["kl"],
            "same top token": row["agreement"],
            "task recovery": row.get("recovery"),
            "seconds": row["seconds"],
            "gate": row["gate"],
            "front": row["name"] in found["front"],
            "recommended": row["name"] == found["recommended"]["name"],
            "error": row["error"],
        }
        for row in found["cells"]
    ]
