"""Finds the held-out text, the original model and the backend of an EvaluationRequest, without Prefect: a wrong request needs no server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_core.data.tokenizer import load_tokenizer, model_limits
from gptq_core.data.windows import Windows, evaluation_windows
from gptq_core.errors import InputError
from gptq_core.inference.backends import for_checkpoint
from gptq_core.model.architecture import choose_device
from gptq_core.model.opened import OpenedModel, open_model
from tasks.config.evaluation import EvaluationRequest
from tasks.config.run import from_dict
from tasks.outcome import record as records
from tasks.outcome.record import RunRecord
from tasks.request.handing import handed
from tasks.request.request import Requests

DEFAULT_SEQLEN = 2048


@dataclass(frozen=True)
class OpenedEvaluation:
    """What was found for a request."""

    request: EvaluationRequest
    windows: Windows
    original: str | None
    """Path or hub id; None: no original is known."""
    model: OpenedModel | None
    """The original."""
    backend: str | None
    """The backend that is requested, or the run's."""


def open_evaluation(request: EvaluationRequest) -> OpenedEvaluation:
    """Find text, original and backend; what the command line has found is handed on to the flow.

    Raises InputError where one of them is missing or cannot be used.
    """
    found = handed(OpenedEvaluation)
    if found and found.request == request:
        return found
    if not Path(request.checkpoint).is_dir():
        raise InputError(f"checkpoint {request.checkpoint} is not a folder: give the folder that a quantize run wrote")
    record, original, revision, backend = records.read(request.checkpoint), request.model, None, request.backend
    if record:
        model, backend = record.config["model"], backend or record.config["quantization"].get("backend")
        if original is None:
            original, revision = _from_there(record, request.checkpoint, model["path"]), model["revision"]
    opened = None if original is None else open_model(original, revision)
    if opened:
        model_limits(opened)  # an original that went away is named now, not after the quantized half
    windows = _windows(request, record)
    for_checkpoint(backend, request.checkpoint, choose_device(request.device))
    return OpenedEvaluation(request, windows, original, opened, backend)


def _windows(request: EvaluationRequest, record: RunRecord | None) -> Windows:
    if record and request.dataset is None:
        return _windows_of_the_run(request, record)
    if request.dataset is None:
        raise InputError(
            f"{request.checkpoint} has no run record ({records.record_path(request.checkpoint).name}) that names a text: "
            "give one with --dataset FILE"
        )
    evaluation = record.config["evaluation"] if record else {}
    seqlen = request.seqlen or evaluation.get("seqlen") or DEFAULT_SEQLEN
    return _cut(request, request.dataset, seqlen, request.samples or evaluation.get("samples"))


def _windows_of_the_run(request: EvaluationRequest, record: RunRecord) -> Windows:
    """The windows that the run kept; its text cut again where they are gone or do not do."""
    settings, data = record.config, record.evaluation_data
    evaluation, tail = settings["evaluation"], settings["evaluation"]["dataset"] is None
    if request.seqlen not in (None, data.seqlen, evaluation["seqlen"]):
        if tail:
            # the tail may be one window: a longer one would reach into the text that calibrated
            raise InputError(
                f"--seqlen {request.seqlen}: the run kept the end of its calibration text apart in windows of "
                f"{data.seqlen}; for other windows give a text with --dataset FILE"
            )
        return _text_of_the_run(request, record, request.seqlen, request.samples or evaluation["samples"])
    # it moves with the checkpoint, whatever the working directory of the run was
    file = records.beside(request.checkpoint, ".work") / Path(data.file).name
    more = evaluation["samples"] is not None and request.samples is not None and request.samples > data.windows
    if file.is_file() and not more:
        return Windows.load(file).thinned(request.samples)
    windows = _text_of_the_run(request, record, evaluation["seqlen"], evaluation["samples"])
    if tail and windows.digest != data.digest:
        raise InputError(
            f"{data.source}: the text is no longer the one that the run read, so its end may hold what was calibrated on; "
            "give a text with --dataset FILE"
        )
    return _text_of_the_run(request, record, evaluation["seqlen"], request.samples) if more else windows.thinned(request.samples)


def _text_of_the_run(request: EvaluationRequest, record: RunRecord, seqlen: int, samples: int | None) -> Windows:
    settings = record.config

    def found(text: Any) -> Any:
        return _from_there(record, request.checkpoint, text) if isinstance(text, str) else text

    if settings["evaluation"]["dataset"] is not None:
        return _cut(request, found(settings["evaluation"]["dataset"]), seqlen, samples)
    overrides = {
        "evaluation.seqlen": seqlen,
        "evaluation.samples": samples,
        "model.path": found(settings["model"]["path"]),
        "quantization.dataset": found(settings["quantization"]["dataset"]),
    }
    return Requests().texts(from_dict(settings, overrides)).evaluation


def _cut(request: EvaluationRequest, dataset: Any, seqlen: int, samples: int | None) -> Windows:
    checkpoint = open_model(request.checkpoint)
    return evaluation_windows(dataset, load_tokenizer(checkpoint), min(seqlen, model_limits(checkpoint)), samples)


def _from_there(record: RunRecord, checkpoint: str, path: str) -> str:
    """A relative path of the run's config, found from the run's working directory where it is not found from this one."""
    out, here = Path(record.out), Path(checkpoint).resolve()
    if Path(path).expanduser().exists() or here.parts[-len(out.parts) :] != out.parts:
        return path
    there = Path(*here.parts[: -len(out.parts)], path)
    return str(there) if there.exists() else path
