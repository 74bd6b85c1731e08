"""What `evaluate` is asked for, and finding its text and its original. No Prefect here: a wrong request waits for no server."""

from __future__ import annotations

from pathlib import Path

from gptq_core.calibration import Windows, evaluation_windows
from gptq_core.config import Schema
from gptq_core.engine import load_tokenizer, model_limits
from gptq_core.errors import InputError
from tasks import record as records
from tasks.config import Positive, from_dict
from tasks.prepare import prepare

DEFAULT_SEQLEN = 2048


class EvaluationRequest(Schema):
    checkpoint: str
    """Folder of a quantized checkpoint."""
    dataset: str | None = None
    """Text file or named dataset; null: the evaluation text of the run that made the checkpoint."""
    model: str | None = None
    """The original, to compare with; null: the one of the run record, where there is one."""
    seqlen: Positive | None = None
    """Tokens in a window; null: as in the run, or 2048; cut to what the model allows."""
    samples: Positive | None = None
    """At most this many windows; null: as in the run, or all."""
    device: str = "auto"

    @property
    def name(self) -> str:
        return Path(self.checkpoint).resolve().name


def prepare_evaluation(request: EvaluationRequest) -> tuple[Windows, str | None, str | None]:
    """The held-out windows, the path of the original and its revision; both None where no original is known."""
    if not Path(request.checkpoint).is_dir():
        raise InputError(f"checkpoint {request.checkpoint} is not a folder: give the folder that a quantize run wrote")
    record = records.read(request.checkpoint)
    settings = record["config"] if record else None
    original, revision = request.model, None
    if original is None and settings:
        original, revision = settings["model"]["path"], settings["model"]["revision"]
    evaluation = settings["evaluation"] if settings else {}
    seqlen = request.seqlen or evaluation.get("seqlen") or DEFAULT_SEQLEN
    samples = request.samples or evaluation.get("samples")
    dataset = request.dataset or evaluation.get("dataset")
    if dataset is None and settings is None:
        raise InputError(f"{request.checkpoint} has no run record ({records.record_path(request.checkpoint).name}) that names a text: "
                         "give one with --dataset FILE")
    if dataset is None:
        # the run kept the end of its calibration text apart: cut the same end again
        overrides = {"evaluation.seqlen": seqlen, "evaluation.samples": samples}
        return prepare(from_dict(settings, overrides)).evaluation, original, revision
    tokenizer, limit = load_tokenizer(request.checkpoint), model_limits(request.checkpoint)
    if original is not None:
        model_limits(original, revision)  # an original that went away is named now, not after the quantized half
    return evaluation_windows(dataset, tokenizer, min(seqlen, limit), samples), original, revision
