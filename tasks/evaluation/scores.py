"""The measures of a run: each on the checkpoint as it lies on disk and on the original, whose scores are kept by content key.

Scores of the original lie in `.originals` beside the checkpoints, so runs of one folder, and the cells of a sweep, share them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from gptq_core.checkpoint.reader import Checkpoint, file_sha256, resolve
from gptq_core.checkpoint.writer import replace_file
from gptq_core.data.overlap import overlapping
from gptq_core.data.tokenizer import load_tokenizer, model_limits
from gptq_core.data.windows import Windows, evaluation_windows
from gptq_core.errors import GPTQError, InputError
from gptq_core.inference.evaluation import load_for_evaluation, window_losses
from gptq_core.model.architecture import choose_device
from tasks.config.measures import PerplexityMeasure, TasksMeasure
from tasks.config.run import RunConfig
from tasks.evaluation import lm_eval_harness
from tasks.evaluation.bootstrap import compare, sentence

Rows = list[dict[str, Any]]
TEXT = "text"
"""What the scores of a perplexity are kept under, whatever the measure is called."""


def measure_all(config: RunConfig, progress: Callable[[int, int], None] | None = None) -> tuple[Rows, list[str]]:
    """Every measure of config.evaluation.measures, as rows of evaluation["measures"] in the run record; and what failed, a line each."""
    rows, failed = [], []
    judge = _Judge(config)
    for done, wanted in enumerate(config.evaluation.measures, 1):
        try:
            rows += judge.rows(wanted)
        # as in tasks.run: what a device, a disk, a kernel or a model's own code ends with; the other measures go on
        except (GPTQError, OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, MemoryError, ImportError) as error:
            failed.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if progress:
            progress(done, len(config.evaluation.measures))
    return rows, failed


def measure_original(config: RunConfig) -> None:
    """Only the original's scores, for runs that follow."""
    judge = _Judge(config)
    for wanted in config.evaluation.measures:
        judge.original(wanted)


def check_measures(config: RunConfig, seen: Windows) -> tuple[str, ...]:
    """Raise InputError for a text or a task that is not there, before any work; notes on texts that stand in the calibration windows."""
    if config.evaluation.runner == "vllm":
        lm_eval_harness.require_vllm()
    notes = []
    for wanted in config.evaluation.measures:
        if isinstance(wanted, TasksMeasure):
            lm_eval_harness.find_tasks(wanted)
        elif told := overlapping(seen.tokens, _windows(wanted, config).tokens, f"measure {wanted.label}"):
            if config.evaluation.strict:
                raise InputError(f"{told}: give another text, or set evaluation.strict: false")
            notes.append(f"{told}: its numbers are better than they would be on unseen text")
    return tuple(notes)


def measures_key(config: RunConfig) -> str | None:
    """What a record's measures are known by: what was asked for, the texts and data, and who ran it; None where nothing was asked for."""
    if not config.evaluation.measures:
        return None
    asked = [[wanted.model_dump(mode="json"), _data(wanted, config)] for wanted in config.evaluation.measures]
    return hashlib.sha256(json.dumps([asked, config.evaluation_backend, config.evaluation.runner]).encode()).hexdigest()


def _data(wanted: PerplexityMeasure | TasksMeasure, config: RunConfig) -> Any:
    """Digests of what is measured on, as far as it lies on this disk."""
    if isinstance(wanted, PerplexityMeasure):
        return _windows(wanted, config).digest
    return [[path.name, file_sha256(path)] for path in lm_eval_harness.data_files(wanted)]


class _Judge:
    """The models of one run, each opened when a measure first needs it."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._folder = config.out.parent / ".originals"
        self._open: tuple[tuple[str, str], Any] | None = None

    def rows(self, wanted: PerplexityMeasure | TasksMeasure) -> Rows:
        started = time.perf_counter()
        with lm_eval_harness.generators_kept():
            before = self.original(wanted)
            after = self._scored(wanted, str(self.config.out), None, self.config.evaluation_backend)
        found = [
            _row(name, metric, wanted, before, after)
            for name, metrics in after["scores"].items()
            for metric in metrics
            if metric in before["scores"].get(name, {})
        ]
        for row in found:
            row |= {"sentence": sentence(row), "seconds": time.perf_counter() - started}
        return found

    def original(self, wanted: PerplexityMeasure | TasksMeasure) -> dict[str, Any]:
        """Scores of the original, from disk where they were computed before."""
        model = self.config.model
        path = self._folder / f"{self._key(wanted)[:32]}.json"
        if known := _kept(path):
            return known
        found = self._scored(wanted, model.path, model.revision, None)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(found).encode())
        return found

    def _key(self, wanted: PerplexityMeasure | TasksMeasure) -> str:
        """sha256 of what decides the original's scores: model, measure, its text or data, device and libraries."""
        model = self.config.model
        source = Checkpoint(resolve(model.path, model.revision))
        tokenizer = [[path.name, file_sha256(path)] for path in sorted(source.folder.glob("*token*")) if path.is_file()]
        data = [_data(wanted, self.config), tokenizer]
        versions = [torch.__version__, transformers.__version__, version("lm_eval"), choose_device(model.device).type]
        asked = wanted.model_dump(mode="json", exclude={"include", "name", "batch_size"})
        what = [source.digest(), asked, data, versions, self.config.evaluation.runner == "vllm"]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def _scored(self, wanted: PerplexityMeasure | TasksMeasure, path: str, revision: str | None, backend: str | None) -> dict[str, Any]:
        """{"scores": by name and metric, "version", "shots"}."""
        if isinstance(wanted, PerplexityMeasure):
            windows = _windows(wanted, self.config)
            model = self._model("perplexity", path, lambda: load_for_evaluation(path, self.config.model.device, revision, backend))
            tokens = windows.seqlen - 1
            samples = [[-loss, tokens] for loss in window_losses(model, windows)]
            found = {"value": lm_eval_harness.aggregate("perplexity", samples), "higher_is_better": False, "samples": samples}
            return {"scores": {TEXT: {"perplexity": found}}}
        model = self._model(
            f"tasks {wanted.batch_size}",
            path,
            lambda: lm_eval_harness.open_model(
                path,
                revision=revision,
                device=self.config.model.device,
                backend=backend,
                runner=self.config.evaluation.runner,
                batch_size=wanted.batch_size,
            ),
        )
        scores, told = lm_eval_harness.score(model, wanted, lm_eval_harness.find_tasks(wanted))
        return {"scores": scores, **told}

    def _model(self, kind: str, path: str, load: Callable[[], Any]) -> Any:
        """The model that was used last, or another one in its place: one is held at a time."""
        if self._open is None or self._open[0] != (kind, path):
            self._open = None
            self._open = ((kind, path), load())
        return self._open[1]


def _kept(path: Path) -> dict[str, Any] | None:
    """Scores that were stored; None where there are none, or what is there is damaged: then they are computed again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("scores"), dict) else None


def _windows(wanted: PerplexityMeasure, config: RunConfig) -> Windows:
    file = Path(wanted.dataset).expanduser()
    stamp = (file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else None
    return _cut(wanted.dataset, wanted.seqlen, wanted.samples, config.model.path, config.model.revision, stamp)


@lru_cache(maxsize=8)
def _cut(dataset: str, seqlen: int, samples: int | None, model: str, revision: str | None, _stamp: tuple[int, int] | None) -> Windows:
    return evaluation_windows(dataset, load_tokenizer(model, revision), min(seqlen, model_limits(model, revision)), samples)


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
