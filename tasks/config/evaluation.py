"""EvaluationRequest, the parameter of `evaluate`: a checkpoint, and what differs from the run that made it."""

from __future__ import annotations

from pathlib import Path

from gptq_core.config import Backend
from gptq_core.schema import Schema
from tasks.config.run import Device, Judged, Positive


class EvaluationRequest(Schema):
    """Evaluation of a checkpoint that exists."""

    checkpoint: str
    """Folder of a quantized checkpoint."""
    dataset: str | None = None
    """Held-out text: a .txt, .jsonl or .parquet file, wikitext2 or c4; null: that of the run that made the checkpoint."""
    model: str | None = None
    """Original model to compare with, a folder or an id on the hub; null: that of the run, where its record is there."""
    seqlen: Judged | None = None
    """Tokens per window, cut to the limit of the model; null: as in the run, or 2048. A held-out text that is the end of the
    calibration text allows only the length of the run."""
    samples: Positive | None = None
    """Maximum number of windows, spread evenly over the text; null: as in the run, or all."""
    device: Device = "auto"
    """Device to compute on: cpu, cuda, cuda:N or auto, which is the first GPU, or the CPU where there is none."""
    backend: Backend = None
    """Backend for the quantized layers: torch, or a GPTQModel kernel such as gptq_marlin; null: as in the run."""

    @property
    def name(self) -> str:
        return Path(self.checkpoint).resolve().name
