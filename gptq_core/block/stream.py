"""Hidden states on their way through the decoder blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from gptq_core.block import walk
from gptq_core.method.hessian import Hessian
from gptq_core.model import architecture, capture
from gptq_core.run.engine import Quantization

Solve = Callable[[dict[str, nn.Linear], Hessian], None]
"""The linears of an input group by their full names, and their Hessian."""


class OriginalStream(Quantization):
    """The original model's calibration stream through all blocks, and room for others beside it."""

    _first: dict[str, Tensor] = {}  # the first block's tensors: the capture runs it, and the walk comes back to it

    def _read_block(self, index: int) -> dict[str, Tensor]:
        if index:
            return super()._read_block(index)
        self._first = self._first or super()._read_block(0)
        return self._first

    def _fill_outside(self) -> None:
        """Fill what is not in a block."""
        tied = getattr(self.decoder.model, "all_tied_weights_keys", {})
        inside = set(self.decoder.block_tensor_names())
        architecture.fill(self.decoder.model, "", lambda name: self._read(tied.get(name, name)), self.device, self.dtype, skip=inside)

    @contextmanager
    def _passed(self, index: int, names: Iterable[str], solve: Solve) -> Iterator[nn.Module]:
        """Take the original stream past a block; then the block, for the streams beside it. `names`: linears to have Hessians.

        The weights stay as they are, so one pass gives every Hessian of the original model and the next block's inputs, and of
        the Hessians there is never more than one.
        """
        block, path = self.decoder.blocks[index], f"{self.decoder.prefix}.{index}"
        architecture.fill(block, path, self._read_block(index).__getitem__, self.device, self.dtype)
        self._first = {}
        try:
            linears = architecture.linears_of(block)
            wanted = {name: linears[name] for name in names}

            def solve_named(group: walk.InputGroup, hessian: Hessian, _shift: None) -> None:
                solve({f"{path}.{name}": wanted[name] for name in group.names}, hessian)

            groups = self._groups(index, block, wanted)
            walk.walk(block, wanted, groups, self._hidden, self._calls[index], solve_named, true_sequential=True)
            yield block
        finally:
            architecture.empty(block)

    def _head_hessian(self, head: nn.Linear) -> Hessian:
        """Of the original's final hidden states, as they reach the head."""
        hessian = Hessian(head.in_features, self.device)
        capture.finish(self.decoder.model, self.decoder.blocks, head, self._batches, self._hidden, self._as_tuple, hessian.add)
        return hessian


@contextmanager
def quantized(weights: Mapping[nn.Linear, Tensor]) -> Iterator[None]:
    """These weights instead of the linears' own, and their biases in float16, as a checkpoint has them."""
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
