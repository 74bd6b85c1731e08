"""The model around its decoder blocks: what it hands to each of them, and what it makes of the last one's outputs.

The model's own code runs, with a stand-in for every block: so masks, positions, embeddings, final norms and heads are the model's
own, whatever the architecture, and no block is computed, except the first one on a few tokens, to see what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_core.errors import UnsupportedModelError


@dataclass(frozen=True)
class Call:
    """Everything a block is called with besides its hidden states: masks, positions, rotary tables."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int
    """Windows in the batch."""

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        result = block(hidden, *self.args, **self.kwargs)
        outputs: Tensor = result[0] if isinstance(result, tuple) else result
        return outputs

    def cut(self, count: int) -> Call:
        """The call for the first `count` windows of the batch."""

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.size:
                return value[:count]
            if isinstance(value, Tensor) and value.ndim == 3 and value.shape[0] % self.size == 0:
                return value[: value.shape[0] // self.size * count]  # heads of every batch row stacked, as alibi is
            return tuple(cut(v) for v in value) if isinstance(value, tuple) else value

        return Call(tuple(cut(v) for v in self.args), {k: cut(v) for k, v in self.kwargs.items()}, count)


Report = Callable[[int, Tensor, Call], Tensor]
"""Index of a block, the hidden states that enter it and the rest of its call, to the hidden states that leave it."""


class StandIn(nn.Module):
    """Replaces a decoder block while the model around it runs: reports the call, and returns the hidden states that `report` returns."""

    def __init__(self, block: nn.Module, index: int, report: Report, as_tuple: bool) -> None:
        super().__init__()
        self.block, self.index, self.report, self.as_tuple = block, index, report, as_tuple

    def __getattr__(self, name: str) -> Any:
        # models read attributes such as `attention_type` off their blocks
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        hidden = self.report(self.index, hidden, Call(args[1:], kwargs, hidden.shape[0]))
        return (hidden,) if self.as_tuple else hidden


@torch.no_grad()
def capture(model: nn.Module, blocks: nn.ModuleList, batches: list[Tensor], as_tuple: bool) -> tuple[list[Tensor], list[dict[int, Call]]]:
    """Hidden states that enter the first block, one tensor a batch, and for each block its call by batch size.

    Only the parts of the model before and between the blocks run. Raises UnsupportedModelError when a block's other arguments
    depend on the token ids, because they are kept once for all batches of a size.
    """
    hidden_states: list[Tensor] = []
    calls: list[dict[int, Call]] = [{} for _ in blocks]

    def report(index: int, hidden: Tensor, call: Call) -> Tensor:
        if index == 0:
            hidden_states.append(hidden)
        known = calls[index].setdefault(hidden.shape[0], call)
        if not _same(known.args, call.args) or not _same(known.kwargs, call.kwargs):
            raise UnsupportedModelError(
                f"{type(blocks[index].block).__name__}: its arguments depend on the token ids, which is not supported yet"
            )

        return hidden

    with _standing_in(blocks, report, as_tuple):
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    return hidden_states, calls


@contextmanager
def _standing_in(blocks: nn.ModuleList, report: Report, as_tuple: bool) -> Iterator[None]:
    originals = list(blocks)
    for index, block in enumerate(originals):
        blocks[index] = StandIn(block, index, report, as_tuple)
    try:
        yield
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block


class _Reached(Exception):
    """Ends a forward at the module that it was for; the rest would be wasted."""


@torch.no_grad()
def returns_tuple(model: nn.Module, block: nn.Module, batch: Tensor) -> bool:
    """Whether the model's first block returns a tuple, seen by running it for real."""
    seen: list[bool] = []

    def stop(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        seen.append(isinstance(output, tuple))
        raise _Reached

    handle = block.register_forward_hook(stop)
    try:
        with suppress(_Reached):
            model(input_ids=batch, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def finish(
    model: nn.Module,
    blocks: nn.ModuleList,
    head: nn.Module,
    batches: list[Tensor],
    hidden_states: list[Tensor],
    as_tuple: bool,
    take: Callable[[Tensor], None],
) -> None:
    """Call `take` with the inputs of the head for every batch, given the outputs of the last block."""

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        take(args[0])
        raise _Reached

    def report(index: int, hidden: Tensor, _call: Call) -> Tensor:
        return final if index == len(blocks) - 1 else hidden

    handle = head.register_forward_pre_hook(stop)
    try:
        with _standing_in(blocks, report, as_tuple):
            for batch, final in zip(batches, hidden_states, strict=True):  # noqa: B007 - report passes it on
                with suppress(_Reached):
                    model(input_ids=batch, use_cache=False)
    finally:
        handle.remove()


@torch.no_grad()
def logits(model: nn.Module, blocks: nn.ModuleList, batch: Tensor, hidden: Tensor, as_tuple: bool) -> Tensor:
    """The model's own logits for a batch of token ids, given the outputs of its last block."""
    last = len(blocks) - 1
    with _standing_in(blocks, lambda index, entering, _call: hidden if index == last else entering, as_tuple):
        found: Tensor = model(input_ids=batch, use_cache=False).logits
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a is b or torch.equal(a, b))
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or a == b
