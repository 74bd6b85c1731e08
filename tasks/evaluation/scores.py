"""The measures of a run: each on the checkpoint as it lies on disk and on the original, whose scores are kept by content key.

Scores of the original lie in `.originals` beside the checkpoints, so runs of one folder, and the cells of a sweep, share them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from gptq_core.checkpoint.reader import file_sha256
from gptq_core.checkpoint.writer import replace_file
from gptq_core.data.overlap import overlapping
from gptq_core.data.tokenizer import load_tokenizer, model_limits
from gptq_core.data.windows import Windows, evaluation_windows
from gptq_core.errors import GPTQError, InputError, one_line
from gptq_core.inference.evaluation import load_for_evaluation, window_losses
from gptq_core.model.architecture import choose_device
from gptq_core.model.opened import OpenedModel
from tasks.config.measures import PerplexityMeasure, TasksMeasure
from tasks.config.run import RunConfig
from tasks.evaluation import lm_eval_harness
from tasks.evaluation.bootstrap import compare, sentence
from tasks.outcome.parts import MeasureResult

FAILURES = (GPTQError, OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, MemoryError, ImportError)
"""What an evaluation may end with through a device, a disk, a kernel or a model's own code. It costs numbers and never the checkpoint."""
TEXT = "text"
"""What the scores of a perplexity are kept under, whatever the measure is called."""


class Measures:
    """The measures of a run on its original model. Each of their texts is read once.

    texts: those that measures of other runs have read already, and to which these are added.
    """

    def __init__(self, config: RunConfig, model: OpenedModel, texts: dict[tuple[Any, ...], Windows] | None = None) -> None:
        self.config, self.model = config, model
        self._texts = {} if texts is None else texts

    @cached_property
    def key(self) -> str | None:
        """What a record's measures are known by: what was requested, the texts and data, and what ran it; None without measures."""
        if not self.config.evaluation.measures:
            return None
        wanted = [[measure.model_dump(mode="json"), self.data_of(measure)] for measure in self.config.evaluation.measures]
        return hashlib.sha256(json.dumps([wanted, self.config.evaluation_backend, self.config.evaluation.runner]).encode()).hexdigest()

    def check(self, seen: Windows) -> tuple[str, ...]:
        """Raise InputError for a text or a task that is not there, before any work; notes on texts that overlap the calibration."""
        if self.config.evaluation.runner == "vllm":
            lm_eval_harness.require_vllm()
        notes = []
        for measure in self.config.evaluation.measures:
            if isinstance(measure, TasksMeasure):
                lm_eval_harness.find_tasks(measure)
            elif shared := overlapping(seen.tokens, self.windows_of(measure).tokens, f"measure {measure.label}"):
                if self.config.evaluation.strict:
                    raise InputError(f"{shared}: give another text, or set evaluation.strict: false")
                notes.append(f"{shared}: its numbers are better than they would be on unseen text")
        return tuple(notes)

    def run(self, progress: Callable[[int, int], None] | None = None) -> tuple[list[MeasureResult], list[str]]:
        """Run all measures; the results, and a line for each that failed."""
        results: list[MeasureResult] = []
        failed, judge = [], _Judge(self)
        for done, measure in enumerate(self.config.evaluation.measures, 1):
            try:
                results += judge.results(measure)
            except FAILURES as error:
                failed.append(f"{type(error).__name__}: {one_line(error)}")
            if progress:
                progress(done, len(self.config.evaluation.measures))
        return results, failed

    def score_original(self) -> None:
        """Only the original's scores, for runs that follow."""
        judge = _Judge(self)
        for measure in self.config.evaluation.measures:
            judge.original(measure)

    def data_of(self, measure: PerplexityMeasure | TasksMeasure) -> Any:
        """Digests of what is measured on, as far as it lies on this disk."""
        if isinstance(measure, PerplexityMeasure):
            return self.windows_of(measure).digest
        return [[path.name, file_sha256(path)] for path in lm_eval_harness.data_files(measure)]

    def windows_of(self, measure: PerplexityMeasure) -> Windows:
        """The text of a measure, cut for this model."""
        what = self.model.folder, measure.dataset, measure.seqlen, measure.samples
        if what not in self._texts:
            seqlen = min(measure.seqlen, model_limits(self.model))
            self._texts[what] = evaluation_windows(measure.dataset, load_tokenizer(self.model), seqlen, measure.samples)
        return self._texts[what]


class _Judge:
    """The models of one run, each loaded when a measure first needs it."""

    def __init__(self, measures: Measures) -> None:
        self.measures, self.config = measures, measures.config
        self._checkpoint = OpenedModel(self.config.out)
        self._scores = self.config.out.parent / ".originals"
        self._loaded: tuple[tuple[str, OpenedModel], Any] | None = None

    def results(self, wanted: PerplexityMeasure | TasksMeasure) -> list[MeasureResult]:
        started = time.perf_counter()
        with lm_eval_harness.generators_kept():
            before = self.original(wanted)
            after = self._scored(wanted, self._checkpoint, self.config.evaluation_backend)
        found = [
            _row(name, metric, wanted, before, after)
            for name, metrics in after["scores"].items()
            for metric in metrics
            if metric in before["scores"].get(name, {})
        ]
        seconds = time.perf_counter() - started
        return [MeasureResult(**row, sentence=sentence(row), seconds=seconds) for row in found]

    def original(self, wanted: PerplexityMeasure | TasksMeasure) -> dict[str, Any]:
        """Scores of the original, from disk where they were computed before."""
        path = self._scores / f"{self._key(wanted)[:32]}.json"
        if known := _kept(path):
            return known
        found = self._scored(wanted, self.measures.model, None)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(found).encode())
        return found

    def _key(self, wanted: PerplexityMeasure | TasksMeasure) -> str:
        """sha256 of what decides the original's scores: model, measure, its text or data, device and libraries."""
        source = self.measures.model.source
        tokenizer = [[path.name, file_sha256(path)] for path in sorted(source.folder.glob("*token*")) if path.is_file()]
        data = [self.measures.data_of(wanted), tokenizer]
        versions = [torch.__version__, transformers.__version__, version("lm_eval"), choose_device(self.config.model.device).type]
        asked = wanted.model_dump(mode="json", exclude={"include", "name", "batch_size"})
        what = [source.digest(), asked, data, versions, self.config.evaluation.runner == "vllm"]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def _scored(self, wanted: PerplexityMeasure | TasksMeasure, model: OpenedModel, backend: str | None) -> dict[str, Any]:
        """{"scores": by name and metric, "version", "shots"}."""
        device = self.config.model.device
        if isinstance(wanted, PerplexityMeasure):
            windows = self.measures.windows_of(wanted)
            loaded = self._model("perplexity", model, lambda: load_for_evaluation(model, device, backend=backend))
            tokens = windows.seqlen - 1
            samples = [[-loss, tokens] for loss in window_losses(loaded, windows)]
            found = {"value": lm_eval_harness.aggregate("perplexity", samples), "higher_is_better": False, "samples": samples}
            return {"scores": {TEXT: {"perplexity": found}}}
        runner, batch_size = self.config.evaluation.runner, wanted.batch_size
        loaded = self._model(
            f"tasks {batch_size}",
            model,
            lambda: lm_eval_harness.load_model(model, device=device, backend=backend, runner=runner, batch_size=batch_size),
        )
        scores, how = lm_eval_harness.score(loaded, wanted, lm_eval_harness.find_tasks(wanted))
        return {"scores": scores, **how}

    def _model(self, kind: str, model: OpenedModel, load: Callable[[], Any]) -> Any:
        """The model that was used last, or another one in its place: one is held at a time."""
        if self._loaded is None or self._loaded[0] != (kind, model):
            self._loaded = None
            self._loaded = ((kind, model), load())
        return self._loaded[1]


def _kept(path: Path) -> dict[str, Any] | None:
    """Scores that were stored; None where there are none, or what is there is damaged: then they are computed again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("scores"), dict) else None


def _row(name: str, metric: str, wanted: PerplexityMeasure | TasksMeasure, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    old, new = before["scores"][name][metric], after["scores"][name][metric]
    both = (old["samples"], new["samples"]) if old["samples"] and new["samples"] else None
    higher = new["higher_is_better"]
    if isinstance(wanted, PerplexityMeasure):
        name, unit = wanted.label, "windows"
        protocol = f"as the papers count it: documents joined, {len(new['samples'])} windows of {new['samples'][0][1] + 1} tokens"
    else:
        unit = "questions"
        limit = f", the first {wanted.limit} of each task" if wanted.limit else ""
        pooled = ", the questions of its tasks together" if new["pooled"] else ""
        protocol = f"lm-eval {after['version']}, {after['shots'][name]}-shot{limit}{pooled}"
    return {
        "name": name,
        "kind": wanted.kind,
        "protocol": protocol,
        "metric": metric,
        "unit": unit,
        "higher_is_better": higher,
        "original": old["value"],
        "quantized": new["value"],
        **compare(old["value"], new["value"], both, higher, lm_eval_harness.curve_of(metric)),
    }
