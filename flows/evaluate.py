"""Evaluate a checkpoint that exists: perplexity alone, or against its original where that can be found."""

from pathlib import Path
from typing import Any

from prefect import flow

from flows import progress
from flows.artifacts import Board
from flows.evaluation_request import EvaluationRequest, prepare_evaluation, runner
from tasks.outcome import record as records
from tasks.steps.evaluate import Progress
from tasks.steps.evaluate import evaluate as evaluate_checkpoint
from tasks.steps.prepare_dataset import save


@flow(name="evaluate", flow_run_name="evaluate-{request.name}")
def evaluate(request: EvaluationRequest) -> dict[str, Any]:
    """The numbers of tasks.steps.evaluate, and the text and the original they were measured against."""
    report = progress.reporter()
    windows, original, revision = prepare_evaluation(request)
    backend = runner(request)
    held_out = save(windows, records.beside(request.checkpoint, ".work"), "evaluation")
    with report.stage("evaluate", held_out["windows"]) as advance:
        numbers = evaluate_checkpoint(
            request.checkpoint,
            held_out["file"],
            original,
            revision,
            request.device,
            True,
            Progress(lambda done, total: advance(done)),
            backend,
        )
    result = {"checkpoint": request.checkpoint, "original": original, "dataset": held_out["source"], **numbers}
    Board("evaluate").table({key: value for key, value in result.items() if value is not None}, Path(request.checkpoint).name)
    return result
