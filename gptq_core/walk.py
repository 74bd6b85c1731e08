"""The staged forward: one pass through a decoder block that captures, quantizes and produces the next block's inputs.

Every calibration batch runs through the block as a coroutine (greenlet). A pre-hook on the linears adds the batch's inputs to
the Hessian of their *input group* and switches back to the hub. When the hub sees every batch waiting, it solves the earliest
group, writes the quantized weights into the modules, and resumes the batches that wait there: the rest of their forward already
sees quantized weights. So the pass that captures is also the pass that computes the outputs, and no layer is run twice.

Input groups are discovered by a probe: linears that receive the very same tensor object form one group (q, k and v; gate and
up), in call order. No table of architectures is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from gptq_core.errors import UnsupportedModelError
from gptq_core.hessian import Hessian


@dataclass(frozen=True)
class Call:
    """Everything a block is called with besides its hidden states: masks, positions, rotary tables."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        result = block(hidden, *self.args, **self.kwargs)
        return result[0] if isinstance(result, tuple) else result


@dataclass(frozen=True)
class InputGroup:
    """Linears of a block that receive the same tensor, in call order."""

    names: tuple[str, ...]
    in_features: int


Solve = Callable[[InputGroup, Hessian], None]
Report = Callable[[int, Tensor, Call], Tensor]
"""Index of a block, the hidden states that enter it and the rest of its call, to the hidden states that leave it."""


class StandIn(nn.Module):
    """Takes a decoder block's place while the model around it runs: reports the call and passes on what it is told to."""

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
        hidden = self.report(self.index, hidden, Call(args[1:], kwargs))
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
    """The forward came to the module it was meant for; what follows would be wasted."""


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
    """Hand `take` the inputs of the head for every batch, given the outputs of the last block."""

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


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a is b or torch.equal(a, b))
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or a == b


@torch.no_grad()
def discover(block: nn.Module, linears: dict[str, nn.Linear], hidden: Tensor, call: Call) -> list[InputGroup]:
    """Input groups of a block in call order, by one probe forward. Linears that the forward never reaches are in no group."""
    seen: list[tuple[Tensor, list[str]]] = []
    called: set[str] = set()

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if name in called:
                raise UnsupportedModelError(f"{name}: called more than once in one forward of its block, which is not supported yet")
            called.add(name)
            for tensor, names in seen:
                if tensor is args[0]:
                    names.append(name)
                    return
            seen.append((args[0], [name]))

        return hook

    handles = [module.register_forward_pre_hook(record(name)) for name, module in linears.items()]
    try:
        call(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return [InputGroup(tuple(names), linears[names[0]].in_features) for _, names in seen]


@torch.no_grad()
def run(block: nn.Module, hidden_states: list[Tensor], calls: dict[int, Call]) -> None:
    """Replace each batch's hidden states by the block's output."""
    for index, hidden in enumerate(hidden_states):
        hidden_states[index] = calls[hidden.shape[0]](block, hidden)


@torch.no_grad()
def walk(
    block: nn.Module,
    linears: dict[str, nn.Linear],
    groups: list[InputGroup],
    hidden_states: list[Tensor],
    calls: dict[int, Call],
    solve: Solve,
    true_sequential: bool,
) -> None:
    """Quantize a block and replace `hidden_states` by its outputs.

    `solve` receives each group and its Hessian and must write the quantized weights into the modules. With `true_sequential`
    it is called group by group inside one forward of every batch; without, all Hessians come from one pass with the original
    weights, and a second pass computes the outputs.
    """
    hessians: dict[int, Hessian] = {}
    solved: set[int] = set()
    counted: set[tuple[int, int]] = set()  # (group, batch): a group's first called member counts the batch

    def stage(number: int, group: InputGroup) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            coroutine = getcurrent()
            if number in solved or (number, coroutine.batch) in counted:
                return
            counted.add((number, coroutine.batch))
            if number not in hessians:
                hessians[number] = Hessian(group.in_features, args[0].device)
            hessians[number].add(args[0])
            if true_sequential:
                coroutine.parent.switch(number)

        return hook

    handles = [linears[name].register_forward_pre_hook(stage(number, group)) for number, group in enumerate(groups) for name in group.names]
    try:
        waiting: dict[int, list[Coroutine]] = {}
        ready = [Coroutine(block, batch, hidden_states, calls) for batch in range(len(hidden_states))]
        while True:
            for coroutine in ready:
                at = coroutine.switch()
                if not coroutine.dead:
                    waiting.setdefault(at, []).append(coroutine)
                elif true_sequential:
                    hidden_states[coroutine.batch] = at
            if not waiting:
                break
            earliest = min(waiting)
            solve(groups[earliest], hessians.pop(earliest))
            solved.add(earliest)
            ready = waiting.pop(earliest)
    finally:
        for handle in handles:
            handle.remove()
    if not true_sequential:
        for number in sorted(hessians):
            solve(groups[number], hessians.pop(number))
        run(block, hidden_states, calls)


class Coroutine(greenlet):
    """One batch on its way through a block; switches to the hub with the number of the group where it waits."""

    def __init__(self, block: nn.Module, batch: int, hidden_states: list[Tensor], calls: dict[int, Call]) -> None:
        super().__init__(self._forward)
        self.batch = batch
        self._block, self._hidden_states, self._calls = block, hidden_states, calls

    def _forward(self) -> Tensor:
        hidden = self._hidden_states[self.batch]
        return self._calls[hidden.shape[0]](self._block, hidden)
