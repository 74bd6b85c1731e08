"""The calibration and the evaluation text of a run, as token windows."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from pathlib import Path

from gptq_core.checkpoint.reader import Checkpoint, resolve
from gptq_core.data.overlap import objection, overlap
from gptq_core.data.tokenizer import load_tokenizer, model_limits
from gptq_core.data.windows import Windows, calibration_windows, evaluation_windows, split_windows
from gptq_core.errors import InputError
from tasks.config.run import RunConfig


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The two texts of a run as packed token windows, and what was adjusted on the way."""

    calibration: Windows
    evaluation: Windows
    notes: tuple[str, ...]
    overlap: tuple[float, float] = (0.0, 0.0)
    """Share of the held-out text's n-grams that calibration sees too, and share of the calibration's that stand in the held-out text."""


def prepare(config: RunConfig) -> Prepared:
    """Read and pack the calibration and the evaluation text. InputError: the model or a text does not do."""
    # the check, the flow and the cells of a sweep ask for the same text: one process reads it once while its files stay as they are
    text = {
        "model": config.model.model_dump(include={"path", "revision"}),
        "calibration": config.calibration.model_dump(),
        "evaluation": config.evaluation.model_dump(),
        "quantization": {"bits": 4, "dataset": config.quantization.dataset},
    }
    return _prepare(json.dumps(text), tuple(_stamp(text) for text in (config.quantization.dataset, config.evaluation.dataset)))


@lru_cache(maxsize=8)
def _prepare(text: str, stamps: tuple) -> Prepared:
    config = RunConfig.model_validate_json(text)
    calibration, evaluation = config.calibration, config.evaluation
    Checkpoint(resolve(config.model.path, config.model.revision))  # the weights first: without them no tokenizer helps
    limit = model_limits(config.model.path, config.model.revision)
    tokenizer = load_tokenizer(config.model.path, config.model.revision)
    notes = tuple(
        f"{room}.seqlen cut from {seqlen} to {limit}, the longest window the model allows"
        for room, seqlen in (("calibration", calibration.seqlen), ("evaluation", evaluation.seqlen))
        if seqlen > limit
    )
    seqlen, evaluation_seqlen = min(calibration.seqlen, limit), min(evaluation.seqlen, limit)
    dataset = config.quantization.dataset
    if evaluation.dataset is None:
        seen, held_out = split_windows(dataset, tokenizer, calibration.samples, seqlen, calibration.seed, evaluation_seqlen)
    else:
        seen = calibration_windows(dataset, tokenizer, calibration.samples, seqlen, calibration.seed)
        held_out = evaluation_windows(evaluation.dataset, tokenizer, evaluation_seqlen)
    shares = overlap(held_out.tokens, seen.tokens), overlap(seen.tokens, held_out.tokens)
    held_out = held_out.thinned(evaluation.samples)
    if text := objection(*shares, "evaluation"):
        if evaluation.strict:
            raise InputError(f"{text}: give another evaluation.dataset, or set evaluation.strict: false")
        notes += (f"{text}: the numbers are better than they would be on unseen text",)
    return Prepared(seen, held_out, notes, shares)


def _stamp(dataset: object) -> tuple[int, int] | None:
    if not isinstance(dataset, str) or not Path(dataset).is_file():
        return None
    status = Path(dataset).stat()
    return status.st_mtime_ns, status.st_size
