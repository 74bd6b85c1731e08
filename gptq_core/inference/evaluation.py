"""Perplexity and KL per token, on a checkpoint as it is read back from disk.

Perplexity as the papers do: non-overlapping windows, mean negative log-likelihood over the targets inside each. KL is
KL(original ‖ quantized) of the next-token distributions, mean over the same positions. Logits of a few windows, or of some positions
of one window where the vocabulary is large, are turned to log-probabilities in float32; neither text × vocabulary nor a whole window ×
a large vocabulary is ever held.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from gptq_core.data.windows import Windows
from gptq_core.errors import CorruptCheckpointError, EvaluationError, InputError
from gptq_core.inference import backends
from gptq_core.inference.linear import load_quantized, to_dense
from gptq_core.model.architecture import choose_device, judging_dtype
from gptq_core.model.opened import Model, OpenedModel, open_model

LOGITS_AT_ONCE = 2**22
"""Logits that are held at a time, tokens × vocabulary: 16 MiB in float32 stay in a processor's cache."""
FEWEST_POSITIONS = 128
"""Fewest positions in a piece of a window that exceeds it: the head's weights are read once for each piece."""

LARGEST_LOSS = 700.0
"""Nats a token; exp of a little more is beyond a float."""

Progress = Callable[[int, int], None]


class Figures(TypedDict):
    """An original model and one quantized from it, on the same positions of a text."""

    original_perplexity: float
    quantized_perplexity: float
    kl: float | None
    """KL(original ‖ quantized) per token. It and the next two are None where only perplexities were computed."""
    top1_agreement: float | None
    flips: float | None
    """Share of positions where one model's top token is right and the other's is not."""
    tokens: int


class PairFigures(Figures):
    """The figures of a whole text."""

    windows: int


class Perplexity(TypedDict):
    perplexity: float
    tokens: int


class Comparison:
    """Sums over the positions of a text, for the figures of an original model and one quantized from it."""

    def __init__(self, kl: bool = True) -> None:
        self._kl = kl
        self._nll, self._divergence, self._agreed, self._flipped, self._count = [0.0, 0.0], 0.0, 0, 0, 0

    def add(self, original: Tensor, quantized: Tensor, targets: Tensor) -> None:
        """Add some positions: (positions, vocabulary) log-probabilities of both models, and the tokens (positions,) that came."""
        for index, log_probabilities in enumerate((original, quantized)):
            self._nll[index] -= log_probabilities.gather(-1, targets[:, None]).double().sum().item()
        if self._kl:
            self._divergence += (original.exp() * (original - quantized)).sum(-1).double().sum().item()
            before, after = original.argmax(-1), quantized.argmax(-1)
            self._agreed += int((before == after).sum())
            self._flipped += int(((before == targets) != (after == targets)).sum())
        self._count += targets.numel()

    def figures(self) -> Figures:
        """What has been summed up. Raises EvaluationError where it comes to no number."""
        divergence = self._divergence / self._count
        if self._kl and not math.isfinite(divergence):
            raise EvaluationError("the KL per token is not finite: the logits of one of the two models are not")
        return {
            "original_perplexity": perplexity_of(self._nll[0] / self._count, "the original"),
            "quantized_perplexity": perplexity_of(self._nll[1] / self._count, "the checkpoint"),
            "kl": divergence if self._kl else None,
            "top1_agreement": self._agreed / self._count if self._kl else None,
            "flips": self._flipped / self._count if self._kl else None,
            "tokens": self._count,
        }


def load_for_evaluation(model: Model, device: str = "auto", backend: str | None = None) -> PreTrainedModel:
    """A dense model or a quantized checkpoint, ready to run: float32 on the CPU, the model's own dtype on a GPU.

    backend: as in `load_quantized`; a kernel of GPTQModel runs in the dtype that it takes, and only a quantized checkpoint.
    """
    opened, target = open_model(model), choose_device(device)
    if backends.named(backend):
        return load_quantized(opened, device=target, backend=backend)
    dtype = judging_dtype(opened.config, target)
    if getattr(opened.config, "quantization_config", None):
        return to_dense(load_quantized(opened, dtype=dtype, device=target))  # unpacked once, not in every forward
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        opened.source.folder,  # which refuses pickle weights with a reason
        config=opened.config,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    dense: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    if report["missing_keys"]:
        # transformers would go on with random numbers in their place
        raise CorruptCheckpointError(f"{opened.folder}: tensors are missing, the first is {sorted(report['missing_keys'])[0]!r}")
    dense.to(target).eval()  # type: ignore[arg-type]  # transformers decorates `to`, so that its self counts as an argument
    return dense


def evaluate_one(
    model: Model, windows: Windows, *, device: str = "auto", backend: str | None = None, progress: Progress | None = None
) -> Perplexity:
    """Perplexity of one model, dense or quantized. backend: as in `load_quantized`."""
    losses = window_losses(load_for_evaluation(model, device, backend=backend), windows, progress)
    return {"perplexity": perplexity(losses, windows), "tokens": windows.count * (windows.seqlen - 1)}


def window_losses(model: PreTrainedModel, windows: Windows, progress: Progress | None = None) -> list[float]:
    """The negative log-likelihood of each window's targets, in nats, summed."""
    found = [-pairs[0].gather(-1, pairs[1][:, None]).double().flatten().cpu() for pairs in _judged(model, windows, progress)]
    return torch.cat(found).view(windows.count, -1).sum(1).tolist()


def perplexity(losses: list[float], windows: Windows) -> float:
    """Perplexity of a text whose windows have these losses. Raises EvaluationError as `perplexity_of` does."""
    return perplexity_of(sum(losses) / (windows.count * (windows.seqlen - 1)), "the model")


def perplexity_of(loss: float, whose: str) -> float:
    """exp of a mean loss in nats a token. Raises EvaluationError for one that is not finite, or beyond what a float can hold."""
    if not math.isfinite(loss):
        raise EvaluationError(f"the mean loss of {whose} is {loss}: its logits are not finite")
    if loss > LARGEST_LOSS:
        raise EvaluationError(f"the mean loss of {whose} is {loss:.6g} nats a token, beyond any perplexity (limit {LARGEST_LOSS:g})")
    return math.exp(loss)


def evaluate_pair(
    original: Model,
    checkpoint: Model,
    windows: Windows,
    *,
    kl: bool = True,
    revision: str | None = None,
    device: str = "auto",
    backend: str | None = None,
    stored: str | Path | None = None,
    progress: Progress | None = None,
) -> PairFigures:
    """Original and quantized on the same windows: perplexities, KL(original ‖ quantized) per token, top-1 agreement and flips.

    kl, top1_agreement and flips are None with `kl=False`. backend: for `checkpoint`, as in `load_quantized`.
    stored: a file that `store_original` wrote for this original and these windows; the original is not run then.
    """
    model = load_for_evaluation(checkpoint, device, backend=backend)
    originals = _originals(open_model(original, revision), windows, device) if stored is None else _stored(Path(stored), windows)
    comparison = Comparison(kl)
    for answer, (found, targets) in zip(originals, _judged(model, windows, progress), strict=True):
        comparison.add(answer.to(found.device), found, targets)
    return {**comparison.figures(), "windows": windows.count}


def original_bytes(model: OpenedModel, windows: Windows) -> int:
    """Size of the file that `store_original` would write."""
    vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
    return 4 * windows.count * (windows.seqlen - 1) * vocabulary


def store_original(model: Model, windows: Windows, path: Path, *, device: str = "auto", progress: Progress | None = None) -> None:
    """Run the original once for many checkpoints: its log-probabilities, float32 (windows, seqlen − 1, vocabulary), as .npy.

    The file appears whole or not at all. What is read from it is bit for bit what the model computes on the same device.
    """
    loaded = load_for_evaluation(model, device)
    vocabulary = vocabulary_of(loaded)
    draft, first = path.with_name(f".{os.getpid()}-{path.name}"), 0
    kept = np.lib.format.open_memmap(draft, "w+", np.float32, (windows.count, windows.seqlen - 1, vocabulary))
    rows = kept.reshape(-1, vocabulary)  # a view
    for found, _ in _judged(loaded, windows, progress):
        rows[first : first + len(found)] = found.cpu()
        first += len(found)
    kept.flush()
    draft.replace(path)


def _originals(model: OpenedModel, windows: Windows, device: str) -> Iterator[Tensor]:
    for found, _ in _judged(load_for_evaluation(model, device), windows):
        yield found


def _stored(path: Path, windows: Windows) -> Iterator[Tensor]:
    kept = np.load(path, mmap_mode="r", allow_pickle=False)
    if kept.shape[:2] != (windows.count, windows.seqlen - 1):
        raise InputError(
            f"{path} holds {kept.shape[0]} × {kept.shape[1]} positions (must be {windows.count} × {windows.seqlen - 1}, "
            "those of the windows): remove it"
        )
    at_once, positions = pieces(kept.shape[2], windows.seqlen)
    for first in range(0, windows.count, at_once):
        for start in range(0, windows.seqlen - 1, positions):
            yield torch.from_numpy(np.array(kept[first : first + at_once, start : start + positions])).flatten(0, 1)


def pieces(vocabulary: int, seqlen: int) -> tuple[int, int]:
    """Windows in one forward, and positions of each whose logits are held at once."""
    windows = LOGITS_AT_ONCE // (vocabulary * seqlen)
    return (windows, seqlen - 1) if windows else (1, min(seqlen - 1, max(FEWEST_POSITIONS, LOGITS_AT_ONCE // vocabulary)))


def vocabulary_of(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config(decoder=True).vocab_size
    return size


def _judged(model: PreTrainedModel, windows: Windows, progress: Progress | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """(positions, vocabulary) log-probabilities in float32 and the tokens (positions,) that came, piece by piece through the text."""
    device = next(model.parameters()).device
    at_once, positions = pieces(vocabulary_of(model), windows.seqlen)
    done = 0
    for batch in windows.tokens.split(at_once):
        batch = batch.to(device)
        targets = batch[:, 1:]
        with _logits(model, batch, positions) as logits:
            for start in range(0, windows.seqlen - 1, positions):
                here = slice(start, min(start + positions, windows.seqlen - 1))
                yield torch.log_softmax(logits(here).flatten(0, 1).float(), -1), targets[:, here].flatten()
        done += batch.shape[0]
        if progress:
            progress(done, windows.count)


@contextmanager
def _logits(model: PreTrainedModel, batch: Tensor, positions: int) -> Iterator[Callable[[slice], Tensor]]:
    """A function from positions to their logits: the model's own, so that scaling and capping of any kind are in them.

    If not all positions fit at once, the body is run once, and then the model's forward on the body's outputs, a piece at a time.
    """
    body = model.base_model
    sliceable = body is not model and "logits_to_keep" in inspect.signature(model.forward).parameters
    if positions >= batch.shape[1] - 1 or not sliceable:
        with torch.no_grad():
            found = model(input_ids=batch, use_cache=False).logits
        yield lambda here: found[:, here]
        return
    with torch.no_grad():
        outputs = body(input_ids=batch, use_cache=False)
    body.forward = lambda *_args, **_kwargs: outputs  # hides the method of the class
    try:

        @torch.no_grad()
        def piece(here: slice) -> Tensor:
            wanted = torch.arange(here.start, here.stop, device=batch.device)
            answer: Tensor = model(input_ids=batch, use_cache=False, logits_to_keep=wanted).logits
            return answer

        yield piece
    finally:
        del body.forward


def log_probabilities(logits: Tensor) -> Tensor:
    """(positions, vocabulary) in float32, of logits (windows, tokens, vocabulary) but each window's last, which has no target."""
    return torch.log_softmax(logits[:, :-1].flatten(0, 1).float(), -1)
