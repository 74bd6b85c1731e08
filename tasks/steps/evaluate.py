"""Perplexity and KL of a checkpoint as it lies on disk, and whatever else it is measured by."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from gptq_core.data.windows import Windows
from gptq_core.inference import backends
from gptq_core.inference.evaluation import evaluate_one, evaluate_pair
from tasks.config.run import RunConfig
from tasks.evaluation.scores import measure_all


class Progress:
    """A callback `(done, total)` that Prefect does not look into."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[int, int], None] | None) -> None:
        self.call = call


@task(name="measure", cache_policy=NO_CACHE)
def measure(config: RunConfig, progress: Progress) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of config.evaluation.measures, on the checkpoint and on the original, and what failed."""
    return measure_all(config, progress.call)


@task(name="evaluate", cache_policy=NO_CACHE)
def evaluate(
    checkpoint: str,
    windows_file: str,
    original: str | None,
    revision: str | None,
    device: str,
    kl: bool,
    progress: Progress,
    backend: str | None = None,
    stored: str | None = None,
) -> dict[str, Any]:
    """The numbers of evaluate_pair, and seconds. Without an `original` only those that need none; the others are None.

    backend: who runs the checkpoint's linears, as in load_quantized. stored: the original's log-probabilities, as in evaluate_pair.
    """
    started = time.perf_counter()
    windows = Windows.load(windows_file)
    if original is None:
        alone = evaluate_one(checkpoint, windows, device=device, backend=backend, progress=progress.call)
        numbers: dict[str, Any] = {
            "original_perplexity": None,
            "quantized_perplexity": alone["perplexity"],
            "kl": None,
            "top1_agreement": None,
            "flips": None,
            "tokens": alone["tokens"],
            "windows": windows.count,
        }
    else:
        numbers = dict(
            evaluate_pair(
                original,
                checkpoint,
                windows,
                kl=kl,
                revision=revision,
                device=device,
                backend=backend,
                stored=stored,
                progress=progress.call,
            )
        )
    return {
        **numbers,
        "backend": backends.named(backend) or "torch",
        "digest": windows.digest,
        "seqlen": windows.seqlen,
        "seconds": time.perf_counter() - started,
    }
