"""Text to token windows.

Calibration packs documents into one token stream without padding and cuts windows of `seqlen` at stream offsets that are
multiples of it; `samples` of them are drawn without replacement by the seed. Evaluation joins documents with two newlines and
takes every non-overlapping window, as the papers do. Beginning-of-sequence tokens are whatever the tokenizer adds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptq_core.data.text import pieces, read_documents, separator
from gptq_core.errors import InputError

OVERSAMPLING = 8
"""Calibration reads at most this many times the tokens it needs: enough to draw from, without reading a whole web crawl."""
TAIL = 0.1
"""Share of the windows kept apart for evaluation when no evaluation text is given."""


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length and where they came from."""

    tokens: Tensor
    """(count, seqlen) int64."""
    source: str
    total_windows: int
    """Windows in the text that was read; at least `count`."""

    @property
    def count(self) -> int:
        return self.tokens.shape[0]

    @property
    def seqlen(self) -> int:
        return self.tokens.shape[1]

    @property
    def digest(self) -> str:
        """sha256 of shape and token ids."""
        shape = f"{self.count}x{self.seqlen}:".encode()
        return hashlib.sha256(shape + self.tokens.contiguous().numpy().tobytes()).hexdigest()

    def thinned(self, samples: int | None) -> Windows:
        """At most `samples` windows, evenly spaced: the beginning of a text is seldom like the rest of it. None: all."""
        if samples is None or samples >= self.count:
            return self
        chosen = torch.arange(samples) * self.count // samples
        return replace(self, tokens=self.tokens[chosen])

    def save(self, path: str | Path) -> None:
        save_file({"tokens": self.tokens.contiguous()}, path, {"source": self.source, "total_windows": str(self.total_windows)})

    @classmethod
    def load(cls, path: str | Path) -> Windows:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            return cls(file.get_tensor("tokens"), metadata["source"], int(metadata["total_windows"]))


def calibration_windows(dataset: Any, tokenizer: Any, samples: int, seqlen: int, seed: int) -> Windows:
    """Draw `samples` windows of `seqlen` tokens; fewer where the text has fewer (see total_windows).

    `dataset` is what `QuantizeConfig.dataset` takes. Raises InputError when the text does not fill one window.
    """
    stream = _packed(dataset, tokenizer, limit=OVERSAMPLING * samples * seqlen)
    return _draw(_cut(stream, seqlen, dataset), samples, seed, _name(dataset))


def evaluation_windows(dataset: Any, tokenizer: Any, seqlen: int, samples: int | None = None) -> Windows:
    """Every non-overlapping window of the documents joined with two newlines, or `samples` of them, evenly spaced."""
    if _is_token_rows(dataset):
        stream = _flat(dataset)
    else:
        stream = _encode(tokenizer, _joined(read_documents(dataset, evaluation=True), separator(dataset)))
    windows = _cut(stream, seqlen, dataset)
    return Windows(windows, _name(dataset), windows.shape[0]).thinned(samples)


def split_windows(dataset: Any, tokenizer: Any, samples: int, seqlen: int, seed: int, evaluation_seqlen: int) -> tuple[Windows, Windows]:
    """Calibration and evaluation windows from one text: the last tenth is kept apart for evaluation.

    Raises InputError when the text is too short for a window of each.
    """
    stream = _packed(dataset, tokenizer, limit=OVERSAMPLING * samples * seqlen)
    tail = max(evaluation_seqlen, int(len(stream) * TAIL))
    head = stream[: len(stream) - tail]
    if len(head) < seqlen:
        _cut(stream, seqlen, dataset)  # a text that does not even fill one window gets the plainer message
        raise InputError(
            f"dataset {_name(dataset)}: {len(stream)} tokens do not fill a calibration window of {seqlen} and an evaluation window of "
            f"{evaluation_seqlen}; give more text, shorter windows (seqlen), or a text of its own for evaluation (evaluation.dataset)"
        )
    held = _cut(stream[len(stream) - tail :], evaluation_seqlen, dataset)
    name = _name(dataset)
    return _draw(_cut(head, seqlen, dataset), samples, seed, name), Windows(held, f"{name} (tail kept apart)", held.shape[0])


def _joined(documents: Iterable[str], between: str) -> Iterator[str]:
    for number, document in enumerate(documents):
        yield between + document if number else document


def _flat(rows: list[list[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.int64)


def _packed(dataset: Any, tokenizer: Any, limit: int) -> Tensor:
    """One token stream of the documents, tokenized one by one, at most `limit` tokens of several documents."""
    if dataset is None:
        raise InputError("quantization.dataset is required: a .txt, .jsonl or .parquet file, a named dataset, texts or token ids")
    if _is_token_rows(dataset):
        return _flat(dataset)
    parts: list[Tensor] = []
    for document in read_documents(dataset):
        parts.append(_encode(tokenizer, [document], limit - sum(map(len, parts))))
        if sum(map(len, parts)) >= limit:
            break
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _encode(tokenizer: Any, text: Iterable[str], limit: int | None = None) -> Tensor:
    """Token ids of the joined text, whose special tokens stand once at its beginning. Of a long one no more pieces than `limit` takes."""
    parts: list[Tensor] = []
    for piece in pieces(text):
        # verbose=False: no warning that the stream is longer than the model's maximum, because it is cut into windows
        ids = tokenizer([piece], verbose=False, **({"add_special_tokens": False} if parts else {}))["input_ids"][0]
        parts.append(torch.tensor(ids, dtype=torch.int64))
        if limit is not None and sum(map(len, parts)) >= limit:
            break
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _is_token_rows(dataset: Any) -> bool:
    return isinstance(dataset, list) and bool(dataset) and isinstance(dataset[0], list)


def _name(dataset: Any) -> str:
    if isinstance(dataset, str):
        return Path(dataset).name  # the record travels with the checkpoint: no local folder in it
    return f"{len(dataset)} rows of token ids" if _is_token_rows(dataset) else f"{len(dataset)} texts"


def _cut(stream: Tensor, seqlen: int, dataset: Any) -> Tensor:
    count = len(stream) // seqlen
    if not len(stream):
        raise InputError(f"dataset {_name(dataset)}: the text is empty; give a text of at least {seqlen} tokens")
    if count == 0:
        raise InputError(
            f"dataset {_name(dataset)}: the text has {len(stream)} tokens, shorter than one window of {seqlen}; "
            "give more text or a shorter seqlen"
        )
    return stream[: count * seqlen].view(count, seqlen)


def _draw(windows: Tensor, samples: int, seed: int, name: str) -> Windows:
    chosen = torch.randperm(windows.shape[0], generator=torch.Generator().manual_seed(seed))[:samples]
    return Windows(windows[chosen], name, windows.shape[0])
