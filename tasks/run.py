"""One run, from the texts to the evaluated checkpoint: the same steps in a Prefect flow and in the worker of a sweep.

The checkpoint is published before it is evaluated: an evaluation that fails costs its numbers and never the checkpoint. Finished work
is not done twice: its record is returned, with those parts computed that it lacks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, Protocol

from gptq_core.checkpoint.card import rewrite as write_card
from gptq_core.config import kernel_name
from gptq_core.errors import one_line
from gptq_core.run.engine import Quantization
from tasks.config.run import RunConfig
from tasks.evaluation.scores import FAILURES
from tasks.outcome import record as records
from tasks.outcome.gate import judge
from tasks.outcome.load import Sampler
from tasks.progress import Advance
from tasks.request.request import Request
from tasks.steps.allocate import allocate
from tasks.steps.evaluate import evaluate, measure
from tasks.steps.opaque import Opaque
from tasks.steps.prepare_dataset import prepare_dataset
from tasks.steps.quantize import assemble, capture_calibration, quantize_block


class Reporter(Protocol):
    """Receives the progress of a run."""

    def note(self, text: str) -> None: ...

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]: ...


@dataclass(frozen=True)
class Steps:
    """The Prefect tasks of a run; `plain()` are their functions, which need no server."""

    prepare_dataset: Callable[..., Any] = prepare_dataset
    allocate: Callable[..., Any] = allocate
    capture_calibration: Callable[..., Any] = capture_calibration
    quantize_block: Callable[..., Any] = quantize_block
    assemble: Callable[..., Any] = assemble
    evaluate: Callable[..., Any] = evaluate
    measure: Callable[..., Any] = measure

    @classmethod
    def plain(cls) -> Steps:
        tasks = cls()
        return cls(**{field.name: getattr(tasks, field.name).fn for field in fields(cls)})


def compute(
    request: Request,
    report: Reporter,
    *,
    steps: Steps = Steps(),  # noqa: B008 - frozen
    advance: Callable[[float, str], None] = lambda percent, text: None,
    original: str | None = None,
    sampler: Sampler | None = None,
) -> dict[str, Any]:
    """Quantize and evaluate what was requested; the run record, which also lies on disk. The request is closed then.

    advance: is called with percent and what was done. original: file of the original's log-probabilities, as
    gptq_core.inference.evaluation.store_original writes them; None: the original is run. sampler: of the machine's load, under way; None:
    one of its own.
    """
    with nullcontext(sampler) if sampler else Sampler() as sampling:
        return _compute(request, report, sampling, steps, advance, original)


def _compute(
    request: Request, report: Reporter, sampler: Sampler, steps: Steps, advance: Callable[[float, str], None], original: str | None
) -> dict[str, Any]:
    started, config = time.perf_counter(), request.config
    with request:
        with report.stage("prepare dataset"):
            data = steps.prepare_dataset(Opaque(request))
        allocation = _allocate(request, report, steps)
        job = request.job
        earlier = _earlier(config, job.key)
        record = _record(request, data, allocation)
        record["unchanged"] = job.finished
        if job.finished:
            report.note(f"{config.out}: unchanged, nothing to do")
        else:
            record["blocks"] = _quantize(job, report, advance, steps)
        with report.stage("assemble"):
            record["assembly"] = steps.assemble(Opaque(job))
        record |= records.of_manifest(config.out)
        if not job.finished:
            record["stage_seconds"] = {"prepare": data["seconds"], **job.stage_seconds}
            if allocation:
                record["stage_seconds"]["allocate"] = allocation["seconds"]
        records.write(config.out, record)
        if not evaluated(record, request):
            advance(90, "evaluate")
            _evaluate(request, record, report, steps, original)
            record["evaluation"] = record["evaluation"] and record["evaluation"] | {"overlap": data["overlap"]}
            write_card(config.out, record["evaluation"])
    if record["seconds"] is None:
        peak, highest = records.peak_memory(), earlier.get("peak_memory_bytes") or {}
        record |= {
            "seconds": time.perf_counter() - started + (earlier.get("seconds") or 0.0),
            "finished_ms": int(time.time() * 1000),
            "peak_memory_bytes": {kind: max(size, highest.get(kind, 0)) for kind, size in peak.items()},
            "system": sampler.record(),
        }
    # no part of the work: finished work is judged by the limits of today
    record["gate"] = judge(config.gate, record) if config.gate else None
    record["config"] |= config.model_dump(mode="json", include={"gate", "notify"})
    records.write(config.out, record)
    return record


def _allocate(request: Request, report: Reporter, steps: Steps) -> dict[str, Any] | None:
    """Choose the widths of the linears where that was not done before; their record, or None without quantization.allocate."""
    job = request.job  # so that no other run writes there meanwhile
    if job.config.allocate:
        with report.stage("allocate bits", job.block_count) as advance:
            steps.allocate(Opaque(request), Opaque(lambda done, total: advance(done)))
        request.close()  # what is opened next has the widths that were chosen
        job = request.job
    return request.allocation


def _quantize(job: Quantization, report: Reporter, advance: Callable[[float, str], None], steps: Steps) -> list[dict[str, Any]]:
    handle, blocks = Opaque(job), []
    advance(0, "capture_calibration")
    with report.stage("capture calibration"):
        steps.capture_calibration(handle)
    with report.stage("quantize blocks", job.block_count) as tick:
        for index in range(job.block_count):
            block = steps.quantize_block(handle, index)
            blocks.append(block)
            worst = max((layer["relative_error"] or 0.0 for layer in block["layers"]), default=0.0)
            text = (
                f"block {index + 1}/{job.block_count}: {len(block['layers'])} layers, worst relative error {worst:.4f}, "
                f"{block['seconds']:.1f} s{', from disk' if block['resumed'] else ''}"
            )
            tick(index + 1, text)
            advance(90 * (index + 1) / job.block_count, text)
    return blocks


def _evaluate(request: Request, record: dict[str, Any], report: Reporter, steps: Steps, original: str | None) -> None:
    """Fill in what the record lacks: first the held-out text, then the measures; what fails costs nothing that was measured before."""
    config, windows, key = request.config, request.texts.evaluation, request.measures.key
    try:
        if record["evaluation"] is None:
            with report.stage("evaluate", windows.count) as tick:
                record["evaluation"] = steps.evaluate(
                    str(config.out),
                    Opaque(windows),
                    Opaque(request.model),
                    config.model.device,
                    config.evaluation.kl,
                    Opaque(lambda done, total: tick(done)),
                    config.evaluation_backend,
                    original,
                )
            record["stage_seconds"]["evaluate"] = record["evaluation"]["seconds"]
        record["evaluation"] |= {"measures": [], "measured": None, "recovery": None}
        if key:
            started = time.perf_counter()
            with report.stage("measure", len(config.evaluation.measures)) as tick:
                rows, failed = steps.measure(Opaque(request), Opaque(lambda done, total: tick(done)))
            for row in rows:
                report.note(row["sentence"])
            record["stage_seconds"]["measure"] = time.perf_counter() - started
            record["evaluation"] |= {"measures": rows, "measured": None if failed else key, "recovery": None if failed else _lowest(rows)}
            record["evaluation_error"] = "; ".join(failed) or None
    except FAILURES as error:  # the checkpoint stands, and the run fails at its end
        record["evaluation_error"] = f"{type(error).__name__}: {one_line(error)}"


def _lowest(rows: list[dict[str, Any]]) -> float | None:
    """The recovery of the task that loses most; None where one has none, so that no gate is passed on the others alone."""
    found = [row["recovery"] for row in rows if row["kind"] == "tasks"]
    return None if None in found else min(found, default=None)


def _earlier(config: RunConfig, key: str) -> dict[str, Any]:
    """The record of the same work as it stands, whose seconds count too; {} where there is none."""
    stored = records.read(config.out) or {}
    return stored if stored.get("key") == key else {}


def _record(request: Request, data: dict[str, Any], allocation: dict[str, Any] | None) -> dict[str, Any]:
    """The stored record if it is of this very work and text, else a new one with what the stored one knows of this work."""
    config, key = request.config, request.job.key
    stored = _earlier(config, key)
    if stored and evaluated(stored, request):
        return stored
    record = records.new(config, key)
    if stored:
        record |= {"blocks": stored["blocks"], "stage_seconds": stored["stage_seconds"]}
        if _judged(stored, request):
            dropped = ("measures", "measured", "recovery")
            record["evaluation"] = {key: value for key, value in stored["evaluation"].items() if key not in dropped}
    return record | {"calibration_data": data["calibration"], "evaluation_data": data["evaluation"], "allocation": allocation}


def evaluated(record: dict[str, Any], request: Request) -> bool:
    """Whether a record has all numbers that were requested."""
    complete = _judged(record, request) and record["seconds"] is not None and not record["evaluation_error"]
    return complete and record["evaluation"].get("measured") == request.measures.key


def _judged(record: dict[str, Any], request: Request) -> bool:
    """Whether a record has the numbers on the held-out text, those of measures aside."""
    found, config, digest = record.get("evaluation"), request.config, request.texts.evaluation.digest
    if not found:
        return False
    same_runner = found.get("backend", "torch") == (kernel_name(config.evaluation_backend) or "torch")
    return found["digest"] == digest and same_runner and (found["kl"] is not None) == config.evaluation.kl
