"""The evaluation of a checkpoint on disk as Prefect tasks: perplexity and KL on the held-out text, and further measures."""

from __future__ import annotations

import time

from prefect import task
from prefect.cache_policies import NO_CACHE

from gptq_core.data.windows import Windows
from gptq_core.inference import backends
from gptq_core.inference.evaluation import Progress, evaluate_one, evaluate_pair
from gptq_core.model.opened import OpenedModel
from tasks.outcome.parts import HeldOut, Json, MeasureResult
from tasks.request.request import Request
from tasks.steps.opaque import Opaque


@task(name="measure", cache_policy=NO_CACHE)
def measure(request: Opaque[Request], progress: Opaque[Progress | None]) -> tuple[list[MeasureResult], list[str]]:
    """Run the measures on the checkpoint and on the original; the results, and a line for each measure that failed."""
    return request.value.measures.run(progress.value)


@task(name="evaluate", cache_policy=NO_CACHE)
def evaluate(
    checkpoint: str,
    windows: Opaque[Windows],
    original: Opaque[OpenedModel] | None,
    device: str,
    kl: bool,
    progress: Opaque[Progress | None],
    backend: str | None = None,
    stored: str | None = None,
) -> HeldOut:
    """Measure perplexity and KL on the held-out windows. Without an `original` only what needs none; the other numbers are None.

    backend: what runs the checkpoint's linears, as in load_quantized. stored: the original's log-probabilities, as in evaluate_pair.
    """
    started, text = time.perf_counter(), windows.value
    if original is None:
        alone = evaluate_one(checkpoint, text, device=device, backend=backend, progress=progress.value)
        numbers: Json = {
            "original_perplexity": None,
            "quantized_perplexity": alone["perplexity"],
            "kl": None,
            "top1_agreement": None,
            "flips": None,
            "tokens": alone["tokens"],
            "windows": text.count,
        }
    else:
        numbers = dict(
            evaluate_pair(original.value, checkpoint, text, kl=kl, device=device, backend=backend, stored=stored, progress=progress.value)
        )
    return HeldOut(
        **numbers, backend=backends.named(backend) or "torch", digest=text.digest, seqlen=text.seqlen, seconds=time.perf_counter() - started
    )
