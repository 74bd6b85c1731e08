"""Evaluate a checkpoint that exists: perplexity alone, or against its original where that can be found."""

from pathlib import Path

from prefect import flow

from flows import progress
from flows.artifacts import Board
from flows.evaluation_request import open_evaluation
from tasks.config.evaluation import EvaluationRequest
from tasks.outcome.parts import Json
from tasks.steps.evaluate import evaluate as evaluate_checkpoint
from tasks.steps.opaque import Opaque


@flow(name="evaluate", flow_run_name="evaluate-{request.name}")
def evaluate(request: EvaluationRequest) -> Json:
    """The numbers of tasks.steps.evaluate, and the text and the original they were measured against."""
    opened = open_evaluation(request)
    with progress.reporter().stage("evaluate", opened.windows.count) as advance:
        numbers = evaluate_checkpoint(
            request.checkpoint,
            Opaque(opened.windows),
            Opaque(opened.model) if opened.model else None,
            request.device,
            True,
            Opaque(lambda done, total: advance(done)),
            opened.backend,
        )
    found = {"checkpoint": request.checkpoint, "original": opened.original, "dataset": opened.windows.source}
    result = found | numbers.model_dump(exclude={"recovery"})
    Board("evaluate").table({key: value for key, value in result.items() if value is not None}, Path(request.checkpoint).name)
    return result
