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
from tasks.outcome.machine import peak_memory
from tasks.outcome.parts import AllocatedWidths, Assembly, Block, Evaluation, HeldOut, Overlap, Texts
from tasks.outcome.record import RunRecord
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
) -> RunRecord:
    """Quantize and evaluate what was requested; the run record, which also lies on disk. The request is closed then.

    advance: is called with percent and what was done. original: file of the original's log-probabilities, as
    gptq_core.inference.evaluation.store_original writes them; None: the original is run. sampler: of the machine's load, under way; None:
    one of its own.
    """
    with nullcontext(sampler) if sampler else Sampler() as sampling:
        return _compute(request, report, sampling, steps, advance, original)


def _compute(
    request: Request, report: Reporter, sampler: Sampler, steps: Steps, advance: Callable[[float, str], None], original: str | None
) -> RunRecord:
    moment, started, config = records.now(), time.perf_counter(), request.config
    with request:
        with report.stage("prepare dataset"):
            texts = steps.prepare_dataset(Opaque(request))
        prepared = time.perf_counter() - started
        _allocate(request, report, steps)
        job = request.job
        earlier, blocks = _earlier(config, job.key), None
        if job.finished:
            report.note(f"{config.out}: unchanged, nothing to do")
        else:
            blocks = _quantize(job, report, advance, steps)
        with report.stage("assemble"):
            assembly = steps.assemble(Opaque(job))
        record = _record(request, moment, texts, assembly, earlier)
        records.add_manifest(record, config.out)
        record.unchanged = job.finished
        if blocks is not None:
            record.blocks, record.stage_seconds = blocks, {"prepare": prepared, **job.stage_seconds}
            if record.allocation:
                record.stage_seconds["allocate"] = record.allocation.seconds
        records.write(config.out, record)
        if not evaluated(record, request):
            advance(90, "evaluate")
            _evaluate(request, record, texts.overlap, report, steps, original)
            write_card(config.out, record.evaluation.model_dump() if record.evaluation else None)
    if record.seconds is None:
        highest = (earlier and earlier.peak_memory_bytes) or {}
        record.seconds = time.perf_counter() - started + ((earlier and earlier.seconds) or 0.0)
        record.finished_ms = int(time.time() * 1000)
        record.peak_memory_bytes = {kind: max(size, highest.get(kind, 0)) for kind, size in peak_memory().items()}
        record.system = sampler.record()
    # no part of the work: finished work is judged by the limits of today
    record.gate = judge(config.gate, record.evaluation, record.assembly) if config.gate else None
    record.config |= config.model_dump(mode="json", include={"gate", "notify"})
    records.write(config.out, record)
    return record


def _allocate(request: Request, report: Reporter, steps: Steps) -> None:
    """Choose the widths of the linears, if the config has a budget for them and that was not done before."""
    job = request.job  # so that no other run writes there meanwhile
    if job.config.allocate:
        with report.stage("allocate bits", job.block_count) as advance:
            steps.allocate(Opaque(request), Opaque(lambda done, total: advance(done)))
        request.close()  # what is opened next has the widths that were chosen


def _quantize(job: Quantization, report: Reporter, advance: Callable[[float, str], None], steps: Steps) -> list[Block]:
    handle, blocks = Opaque(job), []
    advance(0, "capture_calibration")
    with report.stage("capture calibration"):
        steps.capture_calibration(handle)
    with report.stage("quantize blocks", job.block_count) as tick:
        for index in range(job.block_count):
            block = steps.quantize_block(handle, index)
            blocks.append(block)
            worst = max((layer.relative_error or 0.0 for layer in block.layers), default=0.0)
            text = (
                f"block {index + 1}/{job.block_count}: {len(block.layers)} layers, worst relative error {worst:.4f}, "
                f"{block.seconds:.1f} s{', from disk' if block.resumed else ''}"
            )
            tick(index + 1, text)
            advance(90 * (index + 1) / job.block_count, text)
    return blocks


def _evaluate(request: Request, record: RunRecord, overlap: Overlap, report: Reporter, steps: Steps, original: str | None) -> None:
    """Fill in what the record lacks: first the held-out text, then the measures; what fails costs nothing that was measured before."""
    config, windows, key = request.config, request.texts.evaluation, request.measures.key
    try:
        numbers: HeldOut | None = record.evaluation
        if numbers is None:
            with report.stage("evaluate", windows.count) as tick:
                numbers = steps.evaluate(
                    str(config.out),
                    Opaque(windows),
                    Opaque(request.model),
                    config.model.device,
                    config.evaluation.kl,
                    Opaque(lambda done, total: tick(done)),
                    config.evaluation_backend,
                    original,
                )
        if numbers.seconds is not None:
            record.stage_seconds["evaluate"] = numbers.seconds
        record.evaluation = Evaluation.of(numbers, overlap)
        if key:
            started = time.perf_counter()
            with report.stage("measure", len(config.evaluation.measures)) as tick:
                results, failed = steps.measure(Opaque(request), Opaque(lambda done, total: tick(done)))
            for result in results:
                report.note(result.sentence)
            record.stage_seconds["measure"] = time.perf_counter() - started
            record.evaluation = Evaluation.of(numbers, overlap, results, None if failed else key)
            record.evaluation_error = "; ".join(failed) or None
    except FAILURES as error:  # the checkpoint stands, and the run fails at its end
        record.evaluation_error = f"{type(error).__name__}: {one_line(error)}"


def _earlier(config: RunConfig, key: str) -> RunRecord | None:
    """The record of the same work as it lies on disk, whose seconds count too."""
    stored = records.read(config.out)
    return stored if stored and stored.key == key else None


def _record(request: Request, started: str, texts: Texts, assembly: Assembly, earlier: RunRecord | None) -> RunRecord:
    """The earlier record of this work if it has all numbers that were requested, else a new one with what the earlier one knows."""
    if earlier and evaluated(earlier, request):
        earlier.assembly = assembly
        return earlier
    record = records.new(request.config, request.job.key, started, texts.calibration, texts.evaluation, assembly)
    record.allocation = AllocatedWidths.model_validate(request.allocation) if request.allocation else None
    if earlier:
        record.blocks, record.stage_seconds = earlier.blocks, earlier.stage_seconds
        if earlier.evaluation and _judged(earlier.evaluation, request):
            record.evaluation = Evaluation.of(earlier.evaluation)
    return record


def evaluated(record: RunRecord, request: Request) -> bool:
    """Whether a record has all numbers that were requested."""
    found = record.evaluation
    if found is None or record.seconds is None or record.evaluation_error:
        return False
    return _judged(found, request) and found.measured == request.measures.key


def _judged(found: HeldOut, request: Request) -> bool:
    """Whether these are the numbers on the held-out text, those of measures aside."""
    config = request.config
    same_runner = found.backend == (kernel_name(config.evaluation_backend) or "torch")
    return found.digest == request.texts.evaluation.digest and same_runner and (found.kl is not None) == config.evaluation.kl
