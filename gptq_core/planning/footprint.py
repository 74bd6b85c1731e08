"""What the forward of a decoder block holds in memory, found by running it on shapes alone.

The block runs once on the meta device, where a tensor has a shape and no bytes, and every storage is followed from its making to its
release. So the numbers are those of the model's own code, whatever its architecture: nothing is assumed about what a block keeps.
The parts around the blocks run for real, on weights of one repeated zero, because models look at positions to choose a mask.

Fused attention is taken as fused: its kernels never hold the square of the window, which its meta form would.

`resident` computes what that takes in a process. A large tensor is mapped and goes back to the system when it is released. Below
ON_HEAP it lies in the C library's heap, where a hole that one tensor leaves is often too small for the next: what the walk keeps for
every batch at once then takes up to twice its size. The heap is simulated: best fit, neighbours joined, as glibc does it.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gptq_core.block import walk
from gptq_core.model import architecture, capture
from gptq_core.model.architecture import Decoder
from gptq_core.runtime.heap import KEPT, ON_HEAP

ALIGNMENT = 128
"""Bytes beyond its size that an aligned allocation looks for, so that the hole of an equal tensor does not do for it."""
SIMULATED = 64
"""Batches after which the heap is taken to grow in proportion."""

Events = tuple[tuple[int, int], ...]
"""(number of a storage, its bytes when it is made or 0 when it is released), in order."""


@dataclass(frozen=True)
class Footprint:
    """One window of tokens on its way through a block. Bytes for that window."""

    groups: tuple[walk.InputGroup, ...]
    events: tuple[Events, ...]
    """Before the first group, between the groups, and behind the last one."""
    entering: int
    """The hidden states, which are made outside the block."""
    made: int
    """All tensors that the forward makes, one after another."""
    assumed: bool = False
    """The block asks for values, which shapes do not have: what its linears make is taken to be kept, and each to stand alone."""

    @property
    def live(self) -> list[int]:
        """Held while the window waits at each group, without what entered."""
        held: dict[int, int] = {}
        found = []
        for part in self.events[:-1]:
            held |= dict(part)
            found.append(sum(held.values()))
        return found

    @property
    def highest(self) -> int:
        """Held at the fullest moment."""
        held: dict[int, int] = {}
        most = 0
        for number, size in (event for part in self.events for event in part):
            held[number] = size
            most = max(most, sum(held.values()))
        return most


class _Follow(TorchDispatchMode):
    """Follows storages. Views of known storages, and tensors that come in from outside, are not counted as made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no annotations
        self.parts: list[list[tuple[int, int]]] = [[]]
        self._alive: dict[int, StorageWeakRef] = {}
        self._count = 0

    def cut(self) -> None:
        """Begin another part: the forward is at a group."""
        self.released()
        self.parts.append([])

    def released(self) -> None:
        for number in [n for n, storage in self._alive.items() if storage.expired()]:
            del self._alive[number]
            self.parts[-1].append((number, 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.released()
        result = func(*args, **(kwargs or {}))
        known = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage(tensor) not in known:
                known.add(_storage(tensor))
                self._count += 1
                self._alive[self._count] = StorageWeakRef(tensor.untyped_storage())
                self.parts[-1].append((self._count, tensor.untyped_storage().nbytes()))
        return result


class _Fused(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


@torch.no_grad()
def footprints(decoder: Decoder, seqlen: int) -> list[Footprint]:
    """One for each kind of block, by the sizes of its linears, of a decoder on the meta device. It is left as it was."""
    kinds = {tuple(_sizes(block)): index for index, block in reversed(list(enumerate(decoder.blocks)))}
    for module in architecture.outside(decoder.model, decoder.blocks):
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_meta:
                module._parameters[name] = nn.Parameter(_zero(weight), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = _zero(buffer)
    try:
        ids = torch.zeros(1, seqlen, dtype=torch.long)
        hidden, calls = capture.capture(decoder.model.base_model, decoder.blocks, [ids], as_tuple=False)
        return [_look(decoder.blocks[index], hidden[0].to("meta"), _on_meta(calls[index][1])) for index in sorted(kinds.values())]
    finally:
        for module in architecture.outside(decoder.model, decoder.blocks):
            architecture.empty(module)


def _zero(like: Tensor) -> Tensor:
    """One number, whatever the shape."""
    return torch.zeros((), dtype=like.dtype).expand(like.shape)


def _sizes(block: nn.Module) -> list[tuple[str, int, int]]:
    return [(name, linear.in_features, linear.out_features) for name, linear in architecture.linears_of(block).items()]


def _on_meta(call: capture.Call) -> capture.Call:
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (call.args, call.kwargs))
    return capture.Call(args, kwargs, call.size)


def _look(block: nn.Module, hidden: Tensor, call: capture.Call) -> Footprint:
    try:
        return _follow(block, hidden, call)
    except (RuntimeError, NotImplementedError):  # what torch raises where a value is asked of the meta device
        return _assumed(block, hidden)


def _assumed(block: nn.Module, hidden: Tensor) -> Footprint:
    linears, row = architecture.linears_of(block), hidden.untyped_storage().nbytes() // hidden.shape[-1]
    groups = tuple(walk.InputGroup((name,), linear.in_features) for name, linear in linears.items())
    outputs = [((number, row * linear.out_features),) for number, linear in enumerate(linears.values())]
    made = sum(size for part in outputs for _, size in part)
    return Footprint(groups, ((), *outputs), hidden.untyped_storage().nbytes(), made, assumed=True)


def _follow(block: nn.Module, hidden: Tensor, call: capture.Call) -> Footprint:
    computed = {(module, name): value for module in block.modules() for name, value in module._buffers.items() if value is not None}
    for module, name in computed:
        module._buffers[name] = computed[module, name].to("meta")
    linears, follow = architecture.linears_of(block), _Follow()
    try:
        with _Fused():
            groups = walk.discover(block, linears, hidden, call)
        at = [linears[group.names[0]].register_forward_pre_hook(lambda *_: follow.cut()) for group in groups]
        try:
            with _Fused(), follow:
                result = call(block, hidden)
        finally:
            for handle in at:
                handle.remove()
        follow.released()
        del result  # alive until here: it is what enters the next block
    finally:
        for (module, name), value in computed.items():
            module._buffers[name] = value
    events = tuple(map(tuple, follow.parts))
    made = sum(size for part in events for _, size in part)
    return Footprint(tuple(groups), events, hidden.untyped_storage().nbytes(), made)


# -- in a process ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resident:
    """Bytes that all batches together keep resident."""

    at: tuple[int, ...]
    """While all of them wait at each group."""
    highest: int
    """At the fullest moment between."""


def resident(footprint: Footprint, windows: int, windows_at_once: int, streams: int, heap: bool) -> Resident:
    """The walk of `windows` windows, `windows_at_once` a batch, through `streams` copies of the block, group by group.

    heap: where tensors lie in a process's memory; else on a device whose allocator is asked only for what is live.
    """
    batches = max(1, -(-windows // windows_at_once))
    if not heap:
        at = [live * windows * streams for live in footprint.live]
        return Resident(tuple(at), max(at) + footprint.highest * min(windows, windows_at_once) * streams)
    simulated = min(batches, SIMULATED)
    share = windows / (simulated * windows_at_once) if batches > SIMULATED else 1.0
    memory, at = _Heap(), []
    for part in footprint.events:
        for stream in range(simulated * streams):
            size = min(windows_at_once, windows - stream // streams * windows_at_once)
            for number, count in part:
                memory.take((stream, number), count * size) if count else memory.give((stream, number))
        at.append(memory.high + memory.mapped)
    return Resident(tuple(int(held * share) for held in at[:-1]), int(memory.highest * share))


class _Heap:
    """Which addresses are in use: best fit, free neighbours joined, the end given back when it grows long."""

    def __init__(self) -> None:
        self.top = self.high = self.mapped = self.highest = 0
        self._free: list[tuple[int, int]] = []  # (size, start), sorted
        self._starts: dict[int, int] = {}  # of free ranges, to their sizes
        self._ends: dict[int, int] = {}  # of free ranges, to their starts
        self._used: dict[Any, tuple[int, int]] = {}

    def take(self, key: Any, size: int) -> None:
        start = -1
        if size >= ON_HEAP:
            self.mapped += size
        else:
            place = bisect.bisect_left(self._free, (size + ALIGNMENT, 0))
            if place < len(self._free):
                free, start = self._free[place]
                self._forget(start, free)
                if free > size:
                    self._remember(start + size, free - size)
            else:
                start = self.top
                self.top += size
                self.high = max(self.high, self.top)
        self._used[key] = (start, size)
        self.highest = max(self.highest, self.high + self.mapped)

    def give(self, key: Any) -> None:
        start, size = self._used.pop(key)
        if start < 0:
            self.mapped -= size
            return
        if start + size in self._starts:
            after = self._starts[start + size]
            self._forget(start + size, after)
            size += after
        if start in self._ends:
            before = self._ends[start]
            size += start - before
            self._forget(before, start - before)
            start = before
        if start + size < self.top:
            self._remember(start, size)
            return
        self.top = start
        if self.high - self.top > KEPT:
            self.high = self.top

    def _remember(self, start: int, size: int) -> None:
        bisect.insort(self._free, (size, start))
        self._starts[start], self._ends[start + size] = size, start

    def _forget(self, start: int, size: int) -> None:
        del self._free[bisect.bisect_left(self._free, (size, start))]
        del self._starts[start], self._ends[start + size]
