"""Many runs that differ in a few keys: what they share is done once, cells run beside each other, one of them is recommended.

    examine -> original x M -> cell x N (workers, or a Ray cluster) -> log each -> choose -> report -> log

A cell is computed by a worker process that uses neither Prefect nor MLflow, and lies on disk when it is done: whatever is killed,
the same command goes on with what is missing. A cell that fails is reported and stops no other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, as_completed
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows import progress
from flows.artifacts import LATER, Board, add_prefect_run
from flows.cluster import ray_options, ray_runner
from flows.finish import call_hooks, register
from flows.serving.dead_runs import mark_dead_runs
from gptq_core.errors import GPTQError
from tasks.config.run import RunConfig
from tasks.config.sweep import LimitsConfig, SweepConfig
from tasks.outcome import record as records
from tasks.outcome.job import Job, Outcome
from tasks.outcome.parts import CellName, Json, MlflowLink, Registration, SweepName
from tasks.outcome.record import RunRecord, SweepRecord
from tasks.report.writing import written
from tasks.sweep import cells, jobs, results
from tasks.sweep.cells import State
from tasks.sweep.jobs import Places
from tasks.sweep.workers import INHERITED, Leases, Worker, supervise
from tasks.tracking import outbox
from tasks.tracking.figures import front_figure
from tasks.tracking.mlflow_runs import log, log_sweep, open_sweep


class SweepFailedError(GPTQError):
    """Cells of the sweep failed, or none can be recommended; what is done stays."""


@dataclass
class Parent:
    """The sweep's own run in MLflow."""

    sweep: SweepName
    link: MlflowLink
    """Its error is that of the first try that failed, after which no other is made."""

    @property
    def lost(self) -> MlflowLink:
        """The link of a cell that is not tried."""
        return self.link.model_copy(update={"run_id": None, "url": None})


@flow(name="sweep", flow_run_name="sweep-{config.folder.name}", on_running=[mark_dead_runs])
def sweep(config: SweepConfig) -> Any:
    """Run the cells that are missing, log them, choose; sweep.json's content. Nothing to compute: state "Unchanged"."""
    with cells.alone(config):
        return _sweep(config)


def _sweep(config: SweepConfig) -> Any:
    report, board, started = progress.reporter(), Board("sweep"), time.perf_counter()
    states, before = cells.examine(config), records.read_sweep(config.folder)
    missing = [state for state in states if state.status == "missing"]
    tracked = next(state.config for state in states if state.cell.config)
    name = results.opening(config)
    parent = Parent(name, open_sweep(tracked.tracking, name))
    if parent.link.error:
        report.note(f"not recorded in MLflow for now: {parent.link.error}; {LATER}")
    for state in states:
        if state.status == "done":
            _log_cell(config, state, parent, report)
    if missing:
        done = _exact if config.mode == "exact" else _screening
        with report.stage("cells", len(missing)) as tick:
            finished = dict(done(config, missing, parent, report, board, tick))
        states = [finished.get(state.cell.name, state) for state in states]
    found = results.result(config, states, [state.cell.name for state in missing], started)
    add_prefect_run(found)
    if before:
        found.notified = before.notified
        if not missing and results.same(before, found):  # shown again, not done again
            found.finished, found.seconds = before.finished, before.seconds
            found.prefect_flow_run_id, found.prefect_flow_run_url = before.prefect_flow_run_id, before.prefect_flow_run_url
    found.registry = _register(states, found, parent, report)
    _publish(config, tracked, found, parent, report, board)
    if reason := results.failure(found):
        raise SweepFailedError(reason)
    if not missing:
        return Completed(name="Unchanged", data=found, message=f"unchanged: all of {config.folder} is done; nothing was computed")
    return found


def _publish(config: SweepConfig, tracked: RunConfig, found: SweepRecord, parent: Parent, report: progress.Reporter, board: Board) -> None:
    """Write the record and the report, log both, call the hooks, and show the result in Prefect. tracked: of a cell."""
    path = records.write_sweep(config.folder, found)
    with report.stage("report"):
        file = written(found, report)  # before the log, which takes it along
    found.mlflow = parent.link if parent.link.error else log_sweep(tracked.tracking, found)
    found.mlflow = outbox.update(tracked.tracking, "sweep", path, found.mlflow)
    found.notified = call_hooks(tracked.notify, results.happened(found), results.notification(found), found.notified, report)
    records.write_sweep(config.folder, found)
    board.tracked(found.mlflow)
    board.lines(table(found), f"{config.folder}: {found.recommended.rule}: {found.recommended.name}")
    board.figure(lambda: front_figure(found), "quality against size" + (", screening" if found.screening else ""), file)
    board.progress(100, "done")


# -- exact ----------------------------------------------------------------------------------------------------------------

Found = Iterator[tuple[str, State]]
Tick = Callable[[int, str], None]


@task(name="cell", cache_policy=NO_CACHE)
def run_cell(name: str, job: Job, limits: LimitsConfig, logs: str, folder: str, leases: Leases | None) -> Any:
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
        worker = Worker(INHERITED, Path(logs) / f"worker-{name}.log", job.threads, folder)
        try:
            outcome = supervise(worker, job, limits, note)
        finally:
            worker.retire()
    return outcome if outcome.done else Failed(message=f"{outcome.status}: {outcome.error}", data=outcome)


def _exact(config: SweepConfig, missing: list[State], parent: Parent, report: progress.Reporter, board: Board, tick: Tick) -> Found:
    """Run the cells; each is logged and yielded as it finishes."""
    places, by_name = jobs.places(config, missing), {state.cell.name: state for state in missing}
    report.note(f"{len(missing)} cells, {places.at_once} at a time with {places.threads} threads each")
    with _cells(config, places) as run:
        wanted, originals = jobs.original_jobs(config, missing, places.threads)
        for key, outcome in run(wanted):
            if outcome.done:
                originals[key] = wanted[key].file
            else:
                report.note(f"every cell runs the original itself: {outcome.error}")
        for count, (name, outcome) in enumerate(run(jobs.jobs(config, missing, places.threads, originals)), 1):
            state = cells.after(by_name[name], outcome)
            if state.record:
                written(state.record, report)
                _log_cell(config, state, parent, report)
            text = f"{name}: {_result_text(state)}"
            tick(count, text)
            board.progress(95 * count / len(missing), text)
            yield name, state


@contextmanager
def _cells(config: SweepConfig, places: Places) -> Iterator[Callable[[Mapping[str, Job]], Iterator[tuple[str, Outcome]]]]:
    """A function that runs jobs and yields their outcomes as they come: by workers of this machine, or on a Ray cluster."""
    limits, logs = config.limits, (config.folder / "shared").absolute()
    leases = Leases(places.devices, places.slots, places.threads, logs) if config.runner == "local" else None
    with ThreadPoolTaskRunner(max_workers=places.at_once) if leases else ray_runner(config) as runner:

        def run(wanted: Mapping[str, Job]) -> Iterator[tuple[str, Outcome]]:
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


def _outcome(future: PrefectFuture[Any]) -> Outcome:
    found = future.result(raise_on_failure=False)
    if isinstance(found, Outcome):
        return found
    # not the cell but Prefect: its server went away, or the node of the cluster
    return Outcome(status="failed", error=f"{type(found).__name__}: {found}", attempts=0)


# -- screening ------------------------------------------------------------------------------------------------------------


def _screening(config: SweepConfig, missing: list[State], parent: Parent, report: progress.Reporter, board: Board, tick: Tick) -> Found:
    """All cells that share model and texts in one job; jobs one after another, with all cores."""
    places = jobs.places(config.model_copy(update={"max_parallel": 1}), missing)
    by_key: dict[str | None, list[State]] = {}
    count = 0
    for state in missing:
        by_key.setdefault(state.key, []).append(state)  # cells may differ in what screening does not look at, and share a result
    with _cells(config, places) as run:
        wanted = {f"screening-{index}": job for index, job in enumerate(jobs.screening_jobs(config, missing, places.threads))}
        for name, outcome in run(wanted):
            cells.keep_screened(config, {key: found for key, found in outcome.screened.items() if found.error is None})
            for waiting in [state for key in wanted[name].cells for state in by_key.pop(key, [])]:
                count += 1
                found = outcome.screened.get(waiting.key or "")
                error = found.error if found else outcome.error
                state = replace(waiting, status="failed" if error else "done", error=error, screened=None if error else found)
                tick(count, f"{state.cell.name}: {_result_text(state)}")
                yield state.cell.name, state


# -- what is logged and shown ---------------------------------------------------------------------------------------------


def _log_cell(config: SweepConfig, state: State, parent: Parent, report: progress.Reporter) -> None:
    """Log the cell as a child run, once. After the first that MLflow did not take no other is tried: they go to the outbox."""
    record = state.record
    if record is None or _logged(record, parent):
        return
    record.sweep = CellName(**parent.sweep.model_dump(), cell=state.cell.name)
    if not record.prefect_flow_run_id:
        add_prefect_run(record)
    if parent.link.error:
        record.mlflow = parent.lost
        path = records.write(state.config.out, record)
        outbox.update(state.config.tracking, "run", path, record.mlflow)
        return
    record.mlflow = log(state.config, record)
    if record.mlflow.error:
        parent.link = parent.link.model_copy(update={"error": record.mlflow.error})
        report.note(f"{state.cell.name}: computed, not recorded in MLflow: {record.mlflow.error}; {LATER}")


def _logged(record: RunRecord, parent: Parent) -> bool:
    """Whether MLflow has the cell as a child of this very parent."""
    link = record.mlflow
    return link is not None and bool(link.run_id) and link.error is None and link.parent_run_id == parent.link.run_id


def _register(states: list[State], found: SweepRecord, parent: Parent, report: progress.Reporter) -> Registration | None:
    """Register the recommended cell, if it has passed its gate and the gate names a model. Screening registers nothing."""
    chosen = next((state for state in states if state.cell.name == found.recommended.name), None)
    if chosen is None or chosen.record is None:
        return None
    record = chosen.record
    if parent.link.error:  # the store would fail again, after as long
        record.mlflow = parent.lost
    record.registry = register(chosen.config, record, report)
    records.write(chosen.config.out, record)
    return record.registry


def _result_text(state: State) -> str:
    if state.status != "done":
        return f"{state.status}: {state.error}"
    cell = results.swept(state)
    return f"perplexity {cell.perplexity:.3f}" + (f", KL {cell.kl:.5f}" if cell.kl is not None else "")


def table(sweep: SweepRecord) -> list[Json]:
    """A line a cell, for Prefect's artifact."""
    return [
        {
            "cell": cell.name,
            "status": cell.status,
            "GB": cell.bytes and cell.bytes / 1e9,
            "bits per weight": cell.bits_per_weight,
            "perplexity": cell.perplexity,
            "KL": cell.kl,
            "same top token": cell.agreement,
            "task recovery": cell.recovery,
            "seconds": cell.seconds,
            "gate": cell.gate,
            "front": cell.name in sweep.front,
            "recommended": cell.name == sweep.recommended.name,
            "error": cell.error,
        }
        for cell in sweep.cells
    ]
