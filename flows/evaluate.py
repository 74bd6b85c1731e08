"""Evaluate a checkpoint that exists: perplexity alone, or against its original where that can be found."""

from pathlib import Path
from typing import Any

from prefect import flow

from flows import progress
from flows.artifacts import Board
from flows.evaluation_request import EvaluationRequest, prepare_evaluation, runner
from gptq_core.model.opened import open_model
from tasks.outcome import record as records
from tasks.request.texts import save
from tasks.steps.evaluate import evaluate as evaluate_checkpoint
from tasks.steps.opaque import Opaque


@flow(name="evaluate", flow_run_name="evaluate-{request.name}")
def evaluate(request: EvaluationRequest) -> dict[str, Any]:
    """The numbers of tasks.steps.evaluate, and the text and the original they were measured against."""
    report = progress.reporter()
    windows, original = prepare_evaluation(request)
    backend = runner(request)
    held_out = save(windows, records.beside(request.checkpoint, ".work"), "evaluation")
    with report.stage("evaluate", held_out["windows"]) as advance:
        numbers = evaluate_checkpoint(
            request.checkpoint,
            Opaque(windows),
            original and Opaque(open_model(*original)),
            request.device,
            True,
            Opaque(lambda done, total: advance(done)),
            backend,
        )
    result = {"checkpoint": request.checkpoint, "original": original and original[0], "dataset": held_out["source"], **numbers}
    Board("evaluate").table({key: value for key, value in result.items() if value is not None}, Path(request.checkpoint).name)
    return result
