"""The calibration and the evaluation text of a run, as token windows."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from gptq_core.data.overlap import NGRAM, objection, overlap
from gptq_core.data.tokenizer import load_tokenizer, model_limits
from gptq_core.data.windows import Windows, calibration_windows, evaluation_windows, split_windows
from gptq_core.errors import InputError
from gptq_core.model.opened import OpenedModel
from tasks.config.run import RunConfig
from tasks.outcome.parts import Overlap, Text, Texts


@dataclasses.dataclass(frozen=True)
class RunTexts:
    """The two texts of a run as packed token windows, and what was adjusted on the way."""

    calibration: Windows
    evaluation: Windows
    notes: tuple[str, ...] = ()
    overlap: tuple[float, float] = (0.0, 0.0)
    """Share of the held-out text's n-grams that calibration sees too, and share of the calibration's that stand in the held-out text."""

    def save(self, folder: Path) -> Texts:
        """Write the windows into `folder`."""
        share, of_calibration = self.overlap
        positions = self.evaluation.total_windows * max(0, self.evaluation.seqlen - NGRAM + 1)
        return Texts(
            calibration=save(self.calibration, folder, "calibration"),
            evaluation=save(self.evaluation, folder, "evaluation"),
            overlap=Overlap(share=share, calibration_share=of_calibration, ngram=NGRAM, positions=positions),
        )

    @classmethod
    def load(cls, saved: Texts) -> RunTexts:
        """Read back what `save` has written."""
        calibration, evaluation = (Windows.load(text.file) for text in (saved.calibration, saved.evaluation))
        return cls(calibration, evaluation, overlap=(saved.overlap.share, saved.overlap.calibration_share))


def read_texts(config: RunConfig, model: OpenedModel) -> RunTexts:
    """Read and pack the calibration and the evaluation text. Raises InputError if the model or a text cannot be used."""
    calibration, evaluation = config.calibration, config.evaluation
    limit, tokenizer = model_limits(model), load_tokenizer(model)
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
    return RunTexts(seen, held_out, notes, shares)


def save(windows: Windows, folder: Path, role: str) -> Text:
    """Write `windows` into a file that is named by their digest, unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{role}-{windows.digest[:20]}.safetensors"
    if not path.exists():
        draft = path.with_name(f".{os.getpid()}-{path.name}")
        windows.save(draft)
        draft.replace(path)
    return Text(
        file=str(path),
        digest=windows.digest,
        source=windows.source,
        windows=windows.count,
        seqlen=windows.seqlen,
        total_windows=windows.total_windows,
    )
