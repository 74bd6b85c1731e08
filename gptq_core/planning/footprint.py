"""What the forward of a decoder block holds in memory, found by running it on shapes alone.

The block runs once on the meta device, where a tensor has a shape and no bytes, and every storage is followed from its making to its
release. So the numbers are those of the model's own code, whatever its architecture: nothing is assumed about what a block keeps.
The parts around the blocks run for real, on weights of one repeated zero, because models look at positions to choose a mask.

Fused attention is taken as fused: its kernels never hold the square of the window, which its meta form would.

`resident` adds up what all batches hold in a process. A large tensor is mapped and goes back to the system when it is released. Below
ON_HEAP it lies in the C library's heap, where the hole that one tensor leaves is often too small for the next: FRAGMENTATION.
"""

from __future__ import annotations

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
from gptq_core.runtime.heap import ON_HEAP

FRAGMENTATION = 1.5
"""Memory that small tensors of many batches keep resident, as a multiple of their size: fitted to the peaks of runs of small models."""

Events = tuple[tuple[int, int], ...]
"""(number of a storage, its bytes when it is made or 0 when it is released), in order."""


@dataclass(frozen=True)
class Footprint:
    """One window of tokens on its way through a block. Bytes for that window."""

    groups: tuple[walk.InputGroup, ...]
    events: tuple[Events, ...]
    """Before the first group, between the groups, and behind the last one."""
    entering: int
    """The hidden states, which exist before the block runs."""
    made: int
    """All tensors that the forward makes, one after another."""
    assumed: bool = False
    """The block reads values, which the meta device does not have. Every linear is then taken for a group of its own, its output kept."""

    @property
    def held(self) -> list[list[int]]:
        """Sizes of the storages held while the window waits at each group, without what entered."""
        alive: dict[int, int] = {}
        found = []
        for part in self.events[:-1]:
            alive |= dict(part)
            found.append([size for size in alive.values() if size])
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
    """Follows the storages that a forward makes; views of earlier storages and tensors from outside do not count."""

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

    heap: tensors lie in a process's memory, where small ones fragment the C library's heap; else on a device, which holds what is live.
    """
    batch = min(windows, windows_at_once)
    at = []
    for sizes in footprint.held:
        small = sum(size for size in sizes if size * batch < ON_HEAP) if heap else 0
        at.append(int((sum(sizes) + (FRAGMENTATION - 1) * small) * windows * streams))
    return Resident(tuple(at), max(at) + footprint.highest * batch * streams)
