"""Perplexity and KL per token, on a checkpoint as it is read back from disk.

Perplexity as the papers do: non-overlapping windows, mean negative log-likelihood over the targets inside each. KL is
KL(original ‖ quantized) of the next-token distributions, mean over the same positions. Logits of a few windows at a time are
turned to log-probabilities in float32; the size text × vocabulary is never held.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from gptq_core import backends
from gptq_core.architecture import choose_device, choose_dtype, load_config
from gptq_core.calibration import Windows
from gptq_core.checkpoint.reader import Checkpoint, resolve
from gptq_core.errors import CorruptCheckpointError, InputError
from gptq_core.linear import load_quantized, to_dense

LOGITS_AT_ONCE = 2**22
"""Logits of one forward, tokens × vocabulary: 16 MiB in float32 stay in a processor's cache. A single window may exceed it."""

Progress = Callable[[int, int], None]


class Comparison:
    """Sums over the positions of a text, for the figures of an original model and one quantized from it."""

    def __init__(self, kl: bool = True) -> None:
        self._kl = kl
        self._nll, self._divergence, self._agreed, self._count = [0.0, 0.0], 0.0, 0, 0

    def add(self, original: Tensor, quantized: Tensor, batch: Tensor) -> None:
        """Add some windows: (positions, vocabulary) log-probabilities of both models, and the windows' token ids."""
        targets = batch[:, 1:].flatten()
        for index, log_probabilities in enumerate((original, quantized)):
            self._nll[index] -= log_probabilities.gather(-1, targets[:, None]).double().sum().item()
        if self._kl:
            self._divergence += (original.exp() * (original - quantized)).sum(-1).double().sum().item()
            self._agreed += int((original.argmax(-1) == quantized.argmax(-1)).sum())
        self._count += targets.numel()

    def figures(self) -> dict[str, Any]:
        """Perplexities; KL(original ‖ quantized) per token and top-1 agreement, both None without `kl`; and the tokens judged."""
        return {
            "original_perplexity": math.exp(self._nll[0] / self._count),
            "quantized_perplexity": math.exp(self._nll[1] / self._count),
            "kl": self._divergence / self._count if self._kl else None,
            "top1_agreement": self._agreed / self._count if self._kl else None,
            "tokens": self._count,
        }


def load_for_evaluation(path: str, device: str = "auto", revision: str | None = None, backend: str | None = None) -> PreTrainedModel:
    """A dense model or a quantized checkpoint, ready to run: float32 on the CPU, the model's own dtype on a GPU.

    backend: as in `load_quantized`; a kernel of GPTQModel runs in the dtype that it takes, and only a quantized checkpoint.
    """
    folder, target = resolve(path, revision), choose_device(device)
    if backends.named(backend):
        return load_quantized(folder, device=target, backend=backend)
    config = load_config(folder)
    dtype = choose_dtype("auto", config, target)
    if getattr(config, "quantization_config", None):
        return to_dense(load_quantized(folder, dtype=dtype, device=target))  # unpacked once, not in every forward
    Checkpoint(folder)  # refuses pickle weights with a reason before transformers would load them
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True
    )
    if report["missing_keys"]:
        # transformers would go on with random numbers in their place
        raise CorruptCheckpointError(f"{folder}: tensors are missing, the first is {sorted(report['missing_keys'])[0]!r}")
    return model.to(target).eval()


def evaluate_one(
    model_path: str, windows: Windows, *, device: str = "auto", backend: str | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """{"perplexity", "tokens"} of one model, dense or quantized. backend: who runs the quantized linears, as in `load_quantized`."""
    model = load_for_evaluation(model_path, device, backend=backend)
    nll, count = 0.0, 0
    for batch in _batches(windows, model, progress):
        targets = batch[:, 1:].flatten()
        nll -= _log_probabilities(model, batch).gather(-1, targets[:, None]).double().sum().item()
        count += targets.numel()
    return {"perplexity": math.exp(nll / count), "tokens": count}


def evaluate_pair(
    original_path: str,
    checkpoint: str,
    windows: Windows,
    *,
    kl: bool = True,
    revision: str | None = None,
    device: str = "auto",
    backend: str | None = None,
    stored: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Original and quantized on the same windows: perplexities, KL(original ‖ quantized) per token and top-1 agreement.

    kl and top1_agreement are None with `kl=False`. backend: who runs the linears of `checkpoint`, as in `load_quantized`.
    stored: a file that `store_original` wrote for this original and these windows; the original is not run then.
    """
    model = load_for_evaluation(checkpoint, device, backend=backend)
    originals = _originals(original_path, windows, device, revision) if stored is None else _stored(Path(stored), windows)
    comparison = Comparison(kl)
    for batch, answer in zip(_batches(windows, model, progress), originals, strict=True):
        comparison.add(answer.to(batch.device), _log_probabilities(model, batch), batch)
    return comparison.figures() | {"windows": windows.count}


def original_bytes(model_path: str, windows: Windows, revision: str | None = None) -> int:
    """Size of the file that `store_original` would write."""
    vocabulary = load_config(resolve(model_path, revision)).get_text_config(decoder=True).vocab_size
    return 4 * windows.count * (windows.seqlen - 1) * vocabulary


def store_original(
    model_path: str, windows: Windows, path: Path, *, revision: str | None = None, device: str = "auto", progress: Progress | None = None
) -> None:
    """Run the original once for many checkpoints: its log-probabilities, float32 (windows, seqlen − 1, vocabulary), as .npy.

    The file appears whole or not at all. What is read from it is bit for bit what the model says on the same device.
    """
    model = load_for_evaluation(model_path, device, revision)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    draft, first = path.with_name(f".{os.getpid()}-{path.name}"), 0
    kept = np.lib.format.open_memmap(draft, "w+", np.float32, (windows.count, windows.seqlen - 1, vocabulary))
    for batch in _batches(windows, model, progress):
        kept[first : first + len(batch)] = _log_probabilities(model, batch).cpu().view(len(batch), -1, vocabulary)
        first += len(batch)
    kept.flush()
    draft.replace(path)


def _originals(model_path: str, windows: Windows, device: str, revision: str | None) -> Iterator[Tensor]:
    model = load_for_evaluation(model_path, device, revision)
    for batch in _batches(windows, model, None):
        yield _log_probabilities(model, batch)


def _stored(path: Path, windows: Windows) -> Iterator[Tensor]:
    kept = np.load(path, mmap_mode="r", allow_pickle=False)
    if kept.shape[:2] != (windows.count, windows.seqlen - 1):
        raise InputError(f"{path} holds {kept.shape[0]} × {kept.shape[1]} positions (must be {windows.count} × {windows.seqlen - 1}, "
                         "those of the windows): remove it")  # fmt: skip
    size = windows_at_once(kept.shape[2], windows)
    for first in range(0, windows.count, size):
        yield torch.from_numpy(np.array(kept[first : first + size])).flatten(0, 1)


def windows_at_once(vocabulary: int, windows: Windows) -> int:
    """Windows whose logits are computed in one forward."""
    return max(1, LOGITS_AT_ONCE // (vocabulary * windows.seqlen))


def _batches(windows: Windows, model: PreTrainedModel, progress: Progress | None) -> Iterator[Tensor]:
    device, done = next(model.parameters()).device, 0
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    for batch in windows.tokens.split(windows_at_once(vocabulary, windows)):
        yield batch.to(device)
        done += batch.shape[0]
        if progress:
            progress(done, windows.count)


@torch.no_grad()
def _log_probabilities(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """The model's own logits, so that scaling and capping of any kind are in them."""
    return log_probabilities(model(input_ids=batch, use_cache=False).logits)


def log_probabilities(logits: Tensor) -> Tensor:
    """(positions, vocabulary) in float32, of logits (windows, tokens, vocabulary) but each window's last, which has no target."""
    return torch.log_softmax(logits[:, :-1].flatten(0, 1).float(), -1)
