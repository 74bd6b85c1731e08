"""The main job: a causal language model in, a GPTQ checkpoint out, evaluated, judged and tracked.

prepare_dataset -> (allocate ->) capture_calibration -> quantize_block x N -> assemble -> evaluate -> report -> log -> promote
"""

import time
from typing import Any

from prefect import flow
from prefect.states import Completed

from flows import progress
from flows.artifacts import LATER, Board, add_prefect_run
from flows.finish import register_and_notify
from flows.serving.dead_runs import mark_dead_runs
from gptq_core.errors import GPTQError
from tasks.config.run import RunConfig
from tasks.outcome.gate import demand
from tasks.outcome.parts import Json
from tasks.outcome.record import RunRecord
from tasks.report.writing import written
from tasks.request.request import Requests
from tasks.run import compute
from tasks.tracking.figures import relative_errors
from tasks.tracking.mlflow_runs import log


class EvaluationFailedError(GPTQError):
    """The checkpoint is complete and its evaluation failed."""


@flow(name="quantize", flow_run_name="quantize-{config.out.name}", on_running=[mark_dead_runs])
def quantize(config: RunConfig) -> Any:
    """Quantize, evaluate and track as `config` says; the run record, which is what a caller gets. Nothing done: state "Unchanged"."""
    report, board, started = progress.reporter(), Board("quantize"), time.time() * 1000
    requests = Requests.current()
    config = requests.placed(config)
    with requests.of(config) as request:
        notes = list(request.check())  # the same as before, where the command line has checked
        for note in notes:
            report.note(f"note: {note}")
        record = compute(request, report, advance=board.progress)
    if not record.prefect_flow_run_id:
        add_prefect_run(record)
    record.notes = notes
    with report.stage("report"):
        file = written(record, report)  # before the log, which takes it along
    with report.stage("log"):
        record.mlflow = log(config, record)
    if record.mlflow.error:
        report.note(f"computed, not recorded in MLflow: {record.mlflow.error}; {LATER}")
    board.tracked(record.mlflow)
    register_and_notify(config, record, report)
    board.table(results(record), f"{config.model.path} at {config.quantization.bits} bits")
    board.figure(lambda: relative_errors(record.blocks) if record.blocks else None, "relative error of each layer", file)
    board.progress(100, "done")
    if record.evaluation_error:
        raise EvaluationFailedError(
            f"the checkpoint {config.out} is complete, but its evaluation failed ({record.evaluation_error}): "
            "run the same command again to evaluate it"
        )
    demand(config, record)
    if record.unchanged and record.finished_ms is not None and record.finished_ms < started:
        message = f"unchanged: {config.out} is of this model, text and config; nothing was done"
        return Completed(name="Unchanged", message=message, data=record)
    return record


def results(record: RunRecord) -> Json:
    """The numbers of a run that a person looks for first."""
    evaluation, assembly = record.evaluation, record.assembly
    rows = {
        "original perplexity": evaluation and evaluation.original_perplexity,
        "quantized perplexity": evaluation and evaluation.quantized_perplexity,
        "KL per token (nats)": evaluation and evaluation.kl,
        "same top token": evaluation and evaluation.top1_agreement,
        "original bytes": assembly.original_bytes,
        "quantized bytes": assembly.bytes,
        "bits per weight": assembly.bits_per_weight,
        "allocation": record.allocation and str(record.allocation),
        "seconds": record.seconds,
        "gate": record.gate and str(record.gate),
    }
    return {key: value for key, value in rows.items() if value is not None}
