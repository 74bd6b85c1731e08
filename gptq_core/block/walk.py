"""The staged forward: one pass through a decoder block that captures, quantizes and produces the next block's inputs.

Every calibration batch runs through the block as a coroutine (greenlet). A pre-hook on the linears adds the batch's inputs to
the Hessian of their *input group* and switches back to the hub. When the hub sees every batch waiting, it solves the earliest
group, writes the quantized weights into the modules, and resumes the batches that wait there: the rest of their forward already
sees quantized weights. So the pass that captures is also the pass that computes the outputs, and no layer is run twice.

Input groups are discovered by a probe: linears that receive the very same tensor object form one group (q, k and v; gate and
up), in call order. No table of architectures is needed.

Where targets are shifted, each coroutine has a shadow: the same batch on its way through the original block, resumed whenever the
inputs of a group are compared, so that a group's two inputs are never kept for more than one batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gptq_core.errors import UnsupportedModelError
from gptq_core.method.hessian import Hessian, Shift
from gptq_core.model.capture import Call
from gptq_core.runtime.timing import Stages


@dataclass(frozen=True)
class InputGroup:
    """Linears of a block that receive the same tensor, in call order."""

    names: tuple[str, ...]
    in_features: int


SolveGroup = Callable[[InputGroup, Hessian, Shift | None], None]


def _called_again(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name}: called more than once in one forward of its block, which is not supported yet")


@torch.no_grad()
def discover(block: nn.Module, linears: dict[str, nn.Linear], hidden: Tensor, call: Call) -> list[InputGroup]:
    """Input groups of a block in call order, by one probe forward. Linears that the forward never reaches are in no group."""
    seen: list[tuple[Tensor, list[str]]] = []
    called: set[str] = set()

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if name in called:
                raise _called_again(name)
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
    solve: SolveGroup,
    true_sequential: bool,
    original: Original | None = None,
    timed: Stages | None = None,
    once: bool = False,
) -> None:
    """Quantize a block and replace `hidden_states` by its outputs; with `original`, its hidden states likewise.

    `solve` receives each group and its Hessian and must write the quantized weights into the modules. With `true_sequential`
    it is called group by group inside one forward of every batch; without, all Hessians come from one pass with the original
    weights, and a second pass computes the outputs. `timed` measures the stages hessian and shift; the rest is the forward.
    `once`: the block's weights are not needed after the walk, so each is released when the last batch has passed its linear.
    """
    timed = timed or Stages(hidden_states[0].device)
    hessians: dict[int, Hessian] = {}
    shifts: dict[int, Shift] = {}
    solved: set[int] = set()
    counted: set[tuple[int, int]] = set()  # (group, batch): a group's first called member counts the batch
    called: set[tuple[str, int]] = set()

    def stage(number: int, group: InputGroup, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            coroutine = getcurrent()
            assert isinstance(coroutine, Coroutine)
            if (name, coroutine.batch) in called:
                raise _called_again(name)
            called.add((name, coroutine.batch))
            if number in solved or (number, coroutine.batch) in counted:
                return
            counted.add((number, coroutine.batch))
            if number not in hessians:
                hessians[number] = Hessian(group.in_features, args[0].device)
            with timed("hessian"):
                hessians[number].add(args[0])
            if original is not None and coroutine.shadow is not None:
                lost = coroutine.shadow.lost_by(coroutine) if original.writers.intersection(group.names) else None
                inputs = coroutine.shadow.inputs_of(number)  # resumes the shadow
                with timed("shift"):
                    shifts.setdefault(number, Shift()).add(args[0], inputs, lost)
            if true_sequential:
                coroutine.wait(number)

        return hook

    members = [(number, group, name) for number, group in enumerate(groups) for name in group.names]
    handles = [linears[name].register_forward_pre_hook(stage(number, group, name)) for number, group, name in members]
    if once and true_sequential:
        handles += [_given_up_after(len(hidden_states), linear) for linear in linears.values()]
    if original is not None:
        handles += original.hooks(groups, linears)
    try:
        waiting: dict[int, list[Coroutine]] = {}
        ready = [Coroutine(block, batch, hidden_states, calls) for batch in range(len(hidden_states))]
        if original is not None:
            for coroutine in ready:
                coroutine.shadow = Shadow(original.block, coroutine.batch, original.hidden_states, calls)
        while True:
            for coroutine in ready:
                at = coroutine.switch()
                if not coroutine.dead:
                    waiting.setdefault(at, []).append(coroutine)
                    continue
                if original is not None and coroutine.shadow is not None:
                    original.hidden_states[coroutine.batch] = coroutine.shadow.outputs()
                if true_sequential:
                    hidden_states[coroutine.batch] = at
            if not waiting:
                break
            earliest = min(waiting)
            solve(groups[earliest], hessians.pop(earliest), shifts.pop(earliest, None))
            solved.add(earliest)
            ready = waiting.pop(earliest)
    finally:
        for handle in handles:
            handle.remove()
    if not true_sequential:
        for number in sorted(hessians):
            solve(groups[number], hessians.pop(number), shifts.pop(number, None))
        run(block, hidden_states, calls)


def _given_up_after(passes: int, linear: nn.Linear) -> RemovableHandle:
    """Register a hook that releases a linear's weight after `passes` forwards; a linear that some batch bypasses keeps it."""
    left = itertools.count(passes - 1, -1)

    def hook(module: nn.Linear, _args: tuple[Any, ...], _output: Tensor) -> None:
        if next(left) == 0:
            module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)

    return linear.register_forward_hook(hook)


@dataclass
class Original:
    """The original block, and the hidden states of the original model that enter it."""

    block: nn.Module
    linears: dict[str, nn.Linear]
    hidden_states: list[Tensor]
    writers: frozenset[str]
    """Linears whose outputs are added to the residual stream, where errors in that stream are made up for."""

    def hooks(self, groups: list[InputGroup], linears: dict[str, nn.Linear]) -> list[RemovableHandle]:
        """On the original linears, to hand their inputs over; on the writers of both blocks (`linears`: the other's), to sum up."""

        def hand_over(number: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                shadow = getcurrent()
                assert isinstance(shadow, Shadow)
                if number not in shadow.passed:
                    shadow.passed.add(number)
                    shadow.wait((number, args[0]))

            return hook

        def sum_up(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            coroutine = getcurrent()
            assert isinstance(coroutine, Coroutine)
            coroutine.written += output.flatten(0, -2)

        handles = [self.linears[n].register_forward_pre_hook(hand_over(i)) for i, group in enumerate(groups) for n in group.names]
        return handles + [which[name].register_forward_hook(sum_up) for which in (linears, self.linears) for name in self.writers]


@torch.no_grad()
def residual_writers(block: nn.Module, linears: dict[str, nn.Linear], hidden: Tensor, call: Call) -> frozenset[str]:
    """Linears whose outputs, added to the block's input, are its output: seen in one probe forward, empty where there are none.

    A block that normalizes or scales before it adds has none.
    """
    outputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _m, _a, output, name=name: outputs.__setitem__(name, output.reshape(hidden.shape)))
        for name, module in linears.items()
        if module.out_features == hidden.shape[-1]
    ]
    try:
        change = call(block, hidden) - hidden
    finally:
        for handle in handles:
            handle.remove()
    tolerance = 16 * torch.finfo(hidden.dtype).eps * (change.abs().max() + hidden.abs().max())
    for count in range(1, len(outputs) + 1):
        for names in itertools.combinations(outputs, count):
            if bool(((change - sum(outputs[name] for name in names)).abs() <= tolerance).all()):
                return frozenset(names)
    return frozenset()


class Coroutine(greenlet):
    """One batch on its way through a block; switches to the hub with the number of the group where it waits."""

    def __init__(self, block: nn.Module, batch: int, hidden_states: list[Tensor], calls: dict[int, Call]) -> None:
        super().__init__(self._forward)
        self.batch = batch
        self.shadow: Shadow | None = None
        self.written: Tensor | float = 0.0
        self._block, self._hidden_states, self._calls = block, hidden_states, calls

    def _forward(self) -> Tensor:
        hidden = self._hidden_states[self.batch]
        return self._calls[hidden.shape[0]](self._block, hidden)

    def wait(self, value: Any) -> None:
        """Switch to the hub, or to whoever resumed this coroutine, with a value."""
        assert self.parent is not None
        self.parent.switch(value)


class Shadow(Coroutine):
    """The same batch on its way through the original block; always resumed by the coroutine that it accompanies."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.passed: set[int] = set()

    def inputs_of(self, number: int) -> Tensor:
        """The original inputs of a group; groups are asked for in call order."""
        self.parent = getcurrent()
        inputs: Tensor
        reached, inputs = self.switch()
        if reached != number:
            raise UnsupportedModelError(
                "a block that calls its linears in another order from batch to batch cannot have its targets shifted"
            )
        return inputs

    def outputs(self) -> Tensor:
        """The original block's outputs."""
        self.parent = getcurrent()
        found: Tensor = self.switch()
        while not self.dead:  # at a group that the other did not ask for
            found = self.switch()
        return found

    def lost_by(self, coroutine: Coroutine) -> Tensor:
        """r - r̃, (tokens, hidden): the residual stream of the original model less that of the quantized one, as both stand now."""
        entered = self._hidden_states[self.batch] - coroutine._hidden_states[self.batch]
        return entered.flatten(0, -2) + (self.written - coroutine.written)
