"""lm-eval on a model as it lies on disk: the score of each question, so that two models can be compared question by question."""

from __future__ import annotations

import functools
import glob
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
import yaml

from gptq_core.data.tokenizer import load_tokenizer
from gptq_core.errors import GPTQError, InputError, one_line
from gptq_core.inference.evaluation import load_for_evaluation
from gptq_core.model.opened import OpenedModel
from tasks.config.measures import TasksMeasure


class TaskFailedError(GPTQError):
    """A task of lm-eval ended with an error of its own."""


Scores = dict[str, dict[str, dict[str, Any]]]
"""Task or group, metric, {"value", "higher_is_better", "samples": scores by question (pairs where they are weighted) or None}."""


def perplexity(mean: float) -> float:
    """Of a mean log-likelihood in nats; inf where float cannot hold it."""
    try:
        return math.exp(-mean)
    except OverflowError:
        return math.inf


WEIGHTED: dict[str, Callable[[float], float]] = {
    "perplexity": perplexity,
    "word_perplexity": perplexity,
    "byte_perplexity": perplexity,
    "bits_per_byte": lambda mean: -mean / math.log(2),
}
"""Metrics whose samples are log-likelihoods, or pairs of one and its weight, and what their (weighted) mean becomes."""


def find_tasks(measure: TasksMeasure) -> Any:
    """lm-eval's TaskManager that knows the measure's tasks. InputError: a folder or a task is not there, or named twice."""
    folder = measure.include and str(Path(measure.include).expanduser())
    if folder and not Path(folder).is_dir():
        raise InputError(f"evaluation.measures: include = {measure.include!r} is not a folder; give the one that holds the tasks' YAMLs")
    for index, task in enumerate(measure.tasks):
        if task in measure.tasks[:index]:
            raise InputError(f"evaluation.measures: task {task!r} is named twice; name it once")
    stamps = _stamps(folder) if folder else ()
    manager = _manager(folder, False, stamps) if folder else None
    if manager is None or any(task not in manager.task_index for task in measure.tasks):
        manager = _manager(folder, True, stamps)
    for task in measure.tasks:
        entry = manager.task_index.get(task)
        if entry is None:
            where = f" and {measure.include} has none{_broken(folder)}" if folder else ""
            raise InputError(
                f"evaluation.measures: task {task!r} is not known: lm-eval has no such task or group{where}; "
                "`lm-eval ls tasks` lists its own"
            )
        if entry.kind.name == "TAG":
            raise InputError(f"evaluation.measures: {task!r} is a tag of several tasks; name them: {', '.join(sorted(entry.tags))}")
    _require_data(manager, measure.tasks)
    return manager


def _broken(folder: str) -> str:
    """The first YAML of a folder that cannot be read, which lm-eval passes over."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(Path(folder).rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except (OSError, ValueError, yaml.YAMLError) as error:
            return f" ({path} cannot be read: {one_line(error, 200)})"
    return ""


def data_files(measure: TasksMeasure) -> list[Path]:
    """What the measure's own tasks are made of on this disk: files of `include`, and data files that they name elsewhere."""
    if not measure.include:
        return []
    folder = Path(measure.include).expanduser()
    inside = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    named = [Path(file) for entry in find_tasks(measure).task_index.values() for file in _named(entry)]
    return sorted({path.resolve() for path in (*inside, *named) if path.is_file()})


def _require_data(manager: Any, names: list[Any]) -> None:
    """InputError where a task, or one of a group, names a data file that is not there."""
    for name in names:
        entry = manager.task_index.get(name if isinstance(name, str) else name.get("task"))
        for file in _named(entry) if entry else []:
            if "://" not in file and not glob.has_magic(file) and not Path(file).exists():
                raise InputError(
                    f"evaluation.measures: task {entry.name!r} names the data file {file!r}, which is not there: "
                    "put it beside the task's YAML, or give its whole path"
                )
        if entry and isinstance((entry.cfg or {}).get("task"), list):
            _require_data(manager, entry.cfg["task"])


def _named(entry: Any) -> list[str]:
    """All data files of an indexed task."""

    def flat(files: Any) -> list[str]:
        parts = files.values() if isinstance(files, dict) else files if isinstance(files, list) else None
        return [str(files)] if parts is None else [file for part in parts for file in flat(part)]

    files = ((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files")
    return flat(files) if files else []


def _stamps(folder: str) -> tuple[Any, ...]:
    """What changes when a task of the folder does."""
    found = [(str(path), path.stat()) for path in sorted(Path(folder).rglob("*")) if path.suffix in (".yaml", ".yml", ".py")]
    return tuple((path, status.st_mtime_ns, status.st_size) for path, status in found)


@lru_cache(maxsize=4)
def _manager(folder: str | None, defaults: bool, _stamp: tuple[Any, ...]) -> Any:
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
        elif isinstance(config.get("task"), list):
            entry.cfg = config  # a group: its members can be looked at


def _beside(files: Any, folder: Path) -> Any:
    """Data files with their whole paths: in `folder`, or where they stand."""
    if isinstance(files, dict):
        return {key: _beside(value, folder) for key, value in files.items()}
    if isinstance(files, list):
        return [_beside(value, folder) for value in files]
    if "://" in files or (Path(files).exists() and not (folder / files).exists()):
        return files
    return str(folder / files if glob.has_magic(files) else (folder / files).resolve())


def load_model(model: OpenedModel, *, device: str, backend: str | None, runner: str | None, batch_size: int) -> Any:
    """An lm-eval model: by transformers, with GPTQModel's kernels under `backend`, or by vLLM."""
    if runner == "vllm":
        require_vllm()
        from lm_eval.models.vllm_causallms import VLLM

        return VLLM(pretrained=str(model.folder), batch_size="auto")
    from lm_eval.models.huggingface import HFLM

    class Quiet(HFLM):  # type: ignore[misc]  # lm-eval publishes no types
        """Without lm-eval's bars: whoever calls shows progress."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    loaded = load_for_evaluation(model, device, backend=backend)
    with _quiet():
        return Quiet(pretrained=loaded, tokenizer=load_tokenizer(model), batch_size=batch_size)


def require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise InputError("evaluation.runner = 'vllm': the package vllm is not installed; install it, or leave runner out")


def score(model: Any, measure: TasksMeasure, manager: Any) -> tuple[Scores, dict[str, Any]]:
    """The scores of the measure's tasks, and what lm-eval did: {"version", "shots": by task}. The model is what load_model returns."""
    import lm_eval

    try:
        with _quiet():
            found = lm_eval.simple_evaluate(
                model,
                tasks=list(measure.tasks),
                num_fewshot=measure.num_fewshot,
                limit=measure.limit,
                task_manager=manager,
                bootstrap_iters=0,
                random_seed=measure.seed,
                numpy_random_seed=measure.seed,
                torch_random_seed=measure.seed,
                fewshot_random_seed=measure.seed,
            )
    except (GPTQError, MemoryError, torch.OutOfMemoryError):
        raise
    # a task is somebody else's code: its template, its functions and the reader of its data end with whatever they like
    except Exception as error:
        reason = one_line(error)
        message = f"evaluation.measures: {', '.join(measure.tasks)} failed in lm-eval ({type(error).__name__}: {reason})"
        raise TaskFailedError(message) from error
    leaves = {task: _leaves(task, found["group_subtasks"]) for task in measure.tasks}
    scores = {task: _scores(task, leaves[task], found) for task in measure.tasks}
    shots = {task: "/".join(dict.fromkeys(str(found["n-shot"].get(leaf)) for leaf in leaves[task])) for task in measure.tasks}
    return scores, {"version": found["lm_eval_version"], "shots": shots}


def _leaves(task: str, groups: dict[str, list[str]]) -> list[str]:
    children = groups.get(task) or []
    return [leaf for child in children for leaf in _leaves(child, groups)] if children else [task]


def _scores(task: str, leaves: list[str], found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By metric, as lm-eval says it; of a group that lm-eval does not sum up, the questions of its tasks together."""
    scores: dict[str, dict[str, Any]] = {}
    for leaf in leaves:
        for name, best_high in found["higher_is_better"][leaf].items():
            for part in dict.fromkeys(sample["filter"] for sample in found["samples"][leaf]):
                label = name if part == "none" else f"{name} ({part})"
                if label in scores:
                    continue
                rows = [row for each in leaves for row in sorted(found["samples"][each], key=lambda row: row["doc_id"])]
                samples = [_number(name, row[name]) for row in rows if row["filter"] == part and name in row]
                known = aggregate(name, samples) if samples and None not in samples else None
                own = found["results"].get(task, {}).get(f"{name},{part}")
                if isinstance(own, int | float):
                    value = float(own)
                elif known is not None:
                    value = known
                else:
                    continue
                # a median, an F1 or a mean of means is not made up of its questions: then they say nothing about its noise
                fits = known is not None and math.isclose(known, value, rel_tol=1e-6, abs_tol=1e-12)
                scores[label] = {
                    "value": value,
                    "higher_is_better": bool(best_high),
                    "samples": samples if fits else None,
                    "pooled": not isinstance(own, int | float),
                }
    return scores


def _number(metric: str, value: Any) -> Any:
    """A score, or for WEIGHTED metrics a (log-likelihood, weight) pair; None for what is neither."""
    if isinstance(value, bool | int | float | np.number):
        return float(value)
    if metric in WEIGHTED and isinstance(value, tuple | list) and len(value) == 2:
        return [float(part) for part in value]
    return None


def aggregate(metric: str, samples: list[Any]) -> float:
    """Mean of the scores, or what the metric makes of the weighted mean of pairs."""
    found = np.asarray(samples, dtype=float)
    return float(curve_of(metric)(found.mean() if found.ndim == 1 else found[:, 0].sum() / found[:, 1].sum()))


def curve_of(metric: str) -> Callable[[float], float]:
    """What makes the metric of the (weighted) mean of its samples."""
    return WEIGHTED.get(metric.partition(" ")[0], float)


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
