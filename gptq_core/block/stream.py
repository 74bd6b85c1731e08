"""A model of which one decoder block at a time is in memory, and hidden states on their way through its blocks.

    with BlockStream.open(model, dtype="auto", device="auto") as stream:
        [states] = stream.enter(windows)
        for index in range(stream.block_count):
            with stream.filled(index) as block:
                states.run(block, index)
        with stream.outside_filled():
            logits = [stream.logits(*batch) for batch in zip(states.batches, states.states)]

Memory does not grow with depth: a block's tensors come from their shards, are released with the block, and are fetched ahead where that
helps. Any number of variants of the same windows may be carried along: the original model's, a quantized one's, those of single layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from gptq_core.block import walk
from gptq_core.data.windows import Windows
from gptq_core.errors import InputError
from gptq_core.method.hessian import Hessian
from gptq_core.model import architecture, capture
from gptq_core.model.architecture import Read
from gptq_core.model.opened import Model, OpenedModel, open_model
from gptq_core.runtime import heap
from gptq_core.runtime.timing import Stages
from gptq_core.work_sizes import TOKENS_PER_FORWARD

DISCOVERY_TOKENS = 16
"""Tokens of the probe forward that discovers input groups."""

SolveLinears = Callable[[dict[str, nn.Linear], Hessian], None]
"""Takes the linears of an input group by their full names, and their Hessian."""


@dataclass
class HiddenStates:
    """Some windows before one of the decoder blocks."""

    batches: list[Tensor]
    """Token ids, (windows, tokens) each."""
    states: list[Tensor]
    """(windows, tokens, hidden), one for each batch."""
    calls: list[dict[int, capture.Call]]
    """For each block, what it is called with beside the hidden states, by the windows in a batch."""

    def copy(self) -> HiddenStates:
        """Another variant of the same windows, which goes its own way from here."""
        return replace(self, states=list(self.states))

    def call(self, index: int) -> capture.Call:
        """The call of block `index` for the largest batch."""
        return self.calls[index][max(self.calls[index])]

    def run(self, block: nn.Module, index: int) -> None:
        """Replace the states by the outputs of block `index`."""
        walk.run(block, self.states, self.calls[index])


def check_token_ids(windows: Windows, config: PretrainedConfig, role: str) -> None:
    """Raise InputError for token ids outside the vocabulary. role: calibration or held-out, for the message."""
    vocabulary = config.get_text_config(decoder=True).vocab_size
    if (largest := int(windows.tokens.max())) >= vocabulary or int(windows.tokens.min()) < 0:
        raise InputError(
            f"token id {largest} in the {role} windows: the model's vocabulary ends at {vocabulary - 1}; use the model's own tokenizer"
        )


class BlockStream:
    """A causal language model, filled block by block. Closed by `close` or `with`."""

    def __init__(self, model: OpenedModel, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.source, self.decoder = model.source, model.decoder(dtype)
        self.block_count = len(self.decoder.blocks)
        self.timed = Stages(device)
        self._first: dict[str, Tensor] | None = None  # the first block's tensors, from `enter`, which runs it, to their use
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}
        if device.type == "cpu":
            heap.keep()

    @classmethod
    def open(cls, model: Model, *, dtype: str, device: str) -> BlockStream:
        """Raises InputError for a folder, hub id or device that cannot be used, UnsupportedModelError for the architecture."""
        opened = open_model(model)
        target = architecture.choose_device(device)
        return cls(opened, target, architecture.choose_dtype(dtype, opened.config, target))

    def __enter__(self) -> BlockStream:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the memory."""
        self._reader.shutdown(cancel_futures=True)
        self._first, self._ahead = None, {}
        if self.device.type == "cpu":
            heap.let_go()

    def path(self, index: int) -> str:
        """Full name of a decoder block, such as model.layers.7."""
        return f"{self.decoder.prefix}.{index}"

    # -- tensors ------------------------------------------------------------------------------------------------------

    def _source_name(self, name: str) -> str:
        return architecture.source_name(self.decoder.model, name, self.source.__contains__) or name

    def read(self, name: str) -> Tensor:
        """A tensor by the model's own name for it; a tied one is the one that it is tied to."""
        source = self._source_name(getattr(self.decoder.model, "all_tied_weights_keys", {}).get(name, name))
        return self.source.read_apart([source])[source]

    def read_block(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block by their full names, once: what was read ahead is handed over."""
        if index in self._ahead:
            return self._ahead.pop(index).result()
        first, self._first = self._first, None
        return first if first is not None and index == 0 else self._read_block(index)

    def read_ahead(self, index: int) -> None:
        """Prepare for `read_block(index)`, while something else is computed. Does nothing behind the last block."""
        if index >= self.block_count or index in self._ahead:
            return
        if self.device.type == "cpu":  # where a second block in memory would count, the system is asked for its pages
            self.source.expect(self._block_sources(index).values())
        else:
            self._ahead[index] = self._reader.submit(self._read_block, index)

    def skip(self, index: int) -> None:
        """Give up what was read ahead of a block that does not have to be read."""
        self._ahead.pop(index, None)
        if index == 0:
            self._first = None

    def _block_sources(self, index: int) -> dict[str, str]:
        return {name: self._source_name(name) for name in architecture.tensor_names(self.decoder.blocks[index], self.path(index))}

    def _read_block(self, index: int) -> dict[str, Tensor]:
        sources = self._block_sources(index)
        found = self.source.read_apart(sources.values())
        if self.device.type == "cuda":  # a copy from pinned memory to the GPU runs beside the computation
            found = {source: tensor.pin_memory() for source, tensor in found.items()}
        return {name: found[source] for name, source in sources.items()}

    @contextmanager
    def filled(self, index: int, read: Read | None = None) -> Iterator[nn.Module]:
        """Decoder block `index` with its tensors, which leave with the context. read: by full names; None: the source's."""
        block = self.decoder.blocks[index]
        try:
            with self.timed("read"):
                architecture.fill(block, self.path(index), read or self.read_block(index).__getitem__, self.device, self.dtype)
            yield block
        finally:
            architecture.empty(block)

    @contextmanager
    def outside_filled(self, without: Iterable[str] = ()) -> Iterator[PreTrainedModel]:
        """The model with its tensors outside the decoder blocks, which leave with the context. without: full names that stay empty."""
        model, blocks = self.decoder.model, self.decoder.blocks
        skip = {*self.decoder.block_tensor_names(), *without}
        try:
            with self.timed("read"):
                architecture.fill(model, "", self.read, self.device, self.dtype, skip=skip)
            yield model
        finally:
            for module in architecture.outside(model, blocks):
                architecture.empty(module)

    # -- hidden states ------------------------------------------------------------------------------------------------

    def enter(self, *texts: Windows) -> list[HiddenStates]:
        """The hidden states of each text before the first block: the model runs up to there, and around its blocks."""
        model, blocks = self.decoder.model, self.decoder.blocks
        batches = [self._batches(text) for text in texts]
        few = batches[0][0][:1, :DISCOVERY_TOKENS]
        beyond = [name for name in architecture.tensor_names(model) if not name.startswith(f"{model.base_model_prefix}.")]
        with self.outside_filled(without=beyond):  # the head is not needed to reach the blocks
            self._first = self.read_block(0)
            with self.filled(0, self._first.__getitem__), self.timed("forward"):
                self._as_tuple = capture.returns_tuple(model.base_model, blocks[0], few)
            with self.timed("forward"):
                self._probe = self._captured([few])
                return [self._captured(each) for each in batches]

    def _batches(self, windows: Windows) -> list[Tensor]:
        size = max(1, TOKENS_PER_FORWARD.get(self.device.type, TOKENS_PER_FORWARD["cuda"]) // windows.seqlen)
        return [batch.to(self.device) for batch in windows.tokens.split(size)]

    def _captured(self, batches: list[Tensor]) -> HiddenStates:
        states, calls = capture.capture(self.decoder.model.base_model, self.decoder.blocks, batches, self._as_tuple)
        return HiddenStates(batches, states, calls)

    def input_groups(self, index: int, block: nn.Module, linears: dict[str, nn.Linear]) -> list[walk.InputGroup]:
        """The input groups of a filled block, in call order. Raises InputError for a linear that no forward reaches."""
        groups = walk.discover(block, linears, self._probe.states[0], self._probe.call(index))
        unreached = set(linears) - {name for group in groups for name in group.names}
        if unreached:
            raise InputError(f"{self.path(index)}.{min(unreached)}: a forward never reaches this linear, so it has no calibration inputs")
        return groups

    def residual_writers(self, index: int, block: nn.Module, linears: dict[str, nn.Linear]) -> frozenset[str]:
        """Linears of a filled block whose outputs are added to the residual stream."""
        return walk.residual_writers(block, linears, self._probe.states[0], self._probe.call(index))

    @contextmanager
    def pass_original(self, index: int, states: HiddenStates, names: Iterable[str], solve: SolveLinears) -> Iterator[nn.Module]:
        """Take `states` past a block as it is; then the block, for variants beside it. `names`: linears that `solve` gets Hessians of.

        The weights stay as they are, so one pass gives every Hessian of the original model and the next block's inputs, and of
        the Hessians there is never more than one.
        """
        with self.filled(index) as block:
            linears = architecture.linears_of(block)
            wanted = {name: linears[name] for name in names}

            def solve_named(group: walk.InputGroup, hessian: Hessian, _shift: object) -> None:
                solve({f"{self.path(index)}.{name}": wanted[name] for name in group.names}, hessian)

            groups = self.input_groups(index, block, wanted)
            walk.walk(block, wanted, groups, states.states, states.calls[index], solve_named, true_sequential=True)
            yield block

    def head_hessian(self, states: HiddenStates, head: nn.Linear) -> Hessian:
        """The head's Hessian, of states behind the last block; what stands between the two must be filled."""
        hessian = Hessian(head.in_features, self.device)
        model, blocks = self.decoder.model, self.decoder.blocks
        capture.finish(model, blocks, head, states.batches, states.states, self._as_tuple, hessian.add)
        return hessian

    def logits(self, batch: Tensor, hidden: Tensor) -> Tensor:
        """The model's own logits of some windows behind the last block; everything outside the blocks must be filled."""
        return capture.logits(self.decoder.model, self.decoder.blocks, batch, hidden, self._as_tuple)


@contextmanager
def quantized(weights: Mapping[nn.Linear, Tensor]) -> Iterator[None]:
    """Put these weights in the place of the linears' own, and their biases in float16, as a checkpoint has them."""
    originals = [(linear, linear.weight.data, None if linear.bias is None else linear.bias.data) for linear in weights]
    for linear, weight in weights.items():
        linear.weight.data = weight
        if linear.bias is not None:
            linear.bias.data = linear.bias.half().to(linear.bias.dtype)
    try:
        yield
    finally:
        for linear, weight, bias in originals:
            linear.weight.data = weight
            if bias is not None:
                linear.bias.data = bias
