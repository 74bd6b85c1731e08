"""lm-eval on a model as it lies on disk: the score of each question, so that two models can be compared question by question."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptq_core.errors import InputError
from gptq_core.evaluation import load_for_evaluation
from gptq_core.source import load_tokenizer
from tasks.measures import TasksMeasure

Scores = dict[str, dict[str, dict[str, Any]]]
"""Task or group, metric, {"value", "higher_is_better", "samples": scores by question (pairs where they are weighted) or None}."""


def perplexity(mean: float) -> float:
    """Of a mean log-likelihood in nats; inf where float cannot hold it."""
    try:
        return math.exp(-mean)
    except OverflowError:
        return math.inf


WEIGHTED: dict[str, Callable[[float], float]] = {
    "perplexity": perplexity, "word_perplexity": perplexity, "byte_perplexity": perplexity,
    "bits_per_byte": lambda mean: -mean / math.log(2)}  # fmt: skip
"""Metrics whose samples are (log-likelihood, weight), and what their weighted mean becomes."""


def find_tasks(measure: TasksMeasure) -> Any:
    """lm-eval's TaskManager that knows the measure's tasks. InputError: a folder or a task is not there, or named twice."""
    folder = measure.include and str(Path(measure.include).expanduser())
    if folder and not Path(folder).is_dir():
        raise InputError(f"evaluation.measures: include = {measure.include!r} is not a folder; give the one that holds the tasks' YAMLs")
    for index, task in enumerate(measure.tasks):
        if task in measure.tasks[:index]:
            raise InputError(f"evaluation.measures: task {task!r} is named twice; name it once")
    manager = _manager(folder, False) if folder else None
    if manager is None or any(task not in manager.task_index for task in measure.tasks):
        manager = _manager(folder, True)
    missing = [task for task in measure.tasks if task not in manager.task_index]
    if missing:
        where = f" and {measure.include} has none" if folder else ""
        raise InputError(f"evaluation.measures: task {missing[0]!r} is not known: lm-eval has no such task or group{where}; "
                         "`lm-eval ls tasks` lists its own")  # fmt: skip
    return manager


@lru_cache(maxsize=4)
def _manager(folder: str | None, defaults: bool) -> Any:
    """A TaskManager of the tasks in a folder, with lm-eval's own or without: to index those takes many seconds."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=defaults)
    if folder:
        _with_data_beside(manager, Path(folder))
    return manager


def _with_data_beside(manager: Any, folder: Path) -> None:
    """Let tasks in `folder` name their data files relative to themselves; lm-eval takes them relative to the working directory."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for entry in manager.task_index.values():
        if entry.yaml_path is None or not Path(entry.yaml_path).resolve().is_relative_to(folder.resolve()):
            continue
        config = load_yaml(entry.yaml_path)
        files = (config.get("dataset_kwargs") or {}).get("data_files")
        if files:
            config["dataset_kwargs"]["data_files"] = _beside(files, Path(entry.yaml_path).resolve().parent)
            entry.cfg, entry.yaml_path = config, None


def _beside(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {key: _beside(value, folder) for key, value in files.items()}
    if isinstance(files, list):
        return [_beside(value, folder) for value in files]
    return str((folder / files).resolve()) if (folder / files).exists() else files


def open_model(path: str, *, revision: str | None, device: str, backend: str | None, runner: str | None, batch_size: int) -> Any:
    """An lm-eval model: by transformers, with GPTQModel's kernels under `backend`, or by vLLM."""
    if runner == "vllm":
        require_vllm()
        from lm_eval.models.vllm_causallms import VLLM

        return VLLM(pretrained=path, revision=revision or "main", batch_size="auto")
    from lm_eval.models.huggingface import HFLM

    class Quiet(HFLM):
        """Without lm-eval's bars: whoever calls shows progress."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    model = load_for_evaluation(path, device, revision, backend)
    with _quiet():
        return Quiet(pretrained=model, tokenizer=load_tokenizer(path, revision), batch_size=batch_size)


def require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise InputError("evaluation.runner = 'vllm': the package vllm is not installed; install it, or leave runner out")


def score(model: Any, measure: TasksMeasure, manager: Any) -> tuple[Scores, dict[str, Any]]:
    """The scores of the measure's tasks, and what lm-eval did: {"version", "shots": by task}. The model is what open_model returns."""
    import datasets
    import lm_eval

    tasks = list(measure.tasks)
    try:
        with _quiet():
            found = lm_eval.simple_evaluate(
                model, tasks=tasks, num_fewshot=measure.num_fewshot, limit=measure.limit, task_manager=manager, bootstrap_iters=0,
                random_seed=measure.seed, numpy_random_seed=measure.seed, torch_random_seed=measure.seed,
                fewshot_random_seed=measure.seed)  # fmt: skip
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise InputError(f"evaluation.measures: the data of {', '.join(tasks)} cannot be read from the hub or its cache "
                         f"({str(error).splitlines()[0]}); give a local task (include)") from error  # fmt: skip
    leaves = {task: _leaves(task, found["group_subtasks"]) for task in tasks}
    scores = {task: _scores(task, leaves[task], found) for task in tasks}
    shots = {task: found["n-shot"].get(leaves[task][0]) for task in tasks}
    return scores, {"version": found["lm_eval_version"], "shots": shots}


def _leaves(task: str, groups: dict[str, list[str]]) -> list[str]:
    children = groups.get(task) or []
    return [leaf for child in children for leaf in _leaves(child, groups)] if children else [task]


def _scores(task: str, leaves: list[str], found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By metric: of a task as lm-eval says it; of a group the questions of its tasks together."""
    higher, scores = found["higher_is_better"][leaves[0]], {}
    for name, best_high in higher.items():
        for part in dict.fromkeys(sample["filter"] for sample in found["samples"][leaves[0]]):
            samples = [_number(sample[name]) for leaf in leaves for sample in sorted(found["samples"][leaf], key=lambda row: row["doc_id"])
                       if sample["filter"] == part and name in sample]  # fmt: skip
            paired = bool(samples) and None not in samples
            own = found["results"].get(task, {}).get(f"{name},{part}") if len(leaves) == 1 else None
            value = own if isinstance(own, int | float) else aggregate(name, samples) if paired else None
            if value is not None:
                scores[name if part == "none" else f"{name} ({part})"] = {
                    "value": float(value), "higher_is_better": bool(best_high), "samples": samples if paired else None}
    return scores


def _number(value: Any) -> Any:
    """A score, or a (log-likelihood, weight) pair; None for what is neither."""
    if isinstance(value, bool | int | float | np.number):
        return float(value)
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, int | float) for part in value):
        return [float(part) for part in value]
    return None


def aggregate(metric: str, samples: list[Any]) -> float:
    """Mean of the scores, or what the metric makes of the weighted mean of pairs."""
    found = np.asarray(samples, dtype=float)
    return float(curve_of(metric, samples)(found.mean() if found.ndim == 1 else found[:, 0].sum() / found[:, 1].sum()))


def curve_of(metric: str, samples: list[Any] | None) -> Callable[[float], float]:
    """What makes the metric of the (weighted) mean of these samples."""
    paired = bool(samples) and isinstance(samples[0], list)
    return WEIGHTED.get(metric.partition(" ")[0], float) if paired else float


@contextmanager
def generators_kept() -> Iterator[None]:
    """lm-eval seeds the global generators; what runs after it must not notice."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's advice and the bars of tables that are read: whoever calls shows progress."""
    import datasets
    import lm_eval.api.task as contexts

    log, bar = logging.getLogger("lm_eval"), contexts.tqdm
    level, shown = log.level, datasets.is_progress_bar_enabled()
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    contexts.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        contexts.tqdm = bar
        log.setLevel(level)
        if shown:
            datasets.enable_progress_bars()
