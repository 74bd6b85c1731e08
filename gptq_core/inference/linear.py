"""Run a packed checkpoint: QuantizedLinear in plain torch, and load_quantized, which can also load GPTQModel's kernels in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq_core.checkpoint.format import layout, read_quantization_config
from gptq_core.checkpoint.packing import unpack, unpack_zeros
from gptq_core.checkpoint.reader import Checkpoint
from gptq_core.errors import CorruptCheckpointError
from gptq_core.inference import backends
from gptq_core.method import grid
from gptq_core.model import architecture
from gptq_core.model.opened import Model, OpenedModel


class QuantizedLinear(nn.Module):
    """A linear that runs from its packed tensors; the weight exists only during a forward, in the dtype of the input."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def __init__(self, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bias: Tensor | None, bits: int, format: str) -> None:
        super().__init__()
        self.bits, self.format = bits, format
        self.in_features, self.out_features = qweight.shape[0] * 32 // bits, qweight.shape[1]
        for name, tensor in {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx}.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # scales are exact in float16 and nowhere coarser: `.to(bfloat16)` on the model must not round them
        exact = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's has no annotations
        self.scales = exact.to(self.scales.device)
        return self

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight (out, in)."""
        codes, zeros = unpack(self.qweight, self.bits), unpack_zeros(self.qzeros, self.bits, self.format)
        return grid.dequantize(codes, self.scales, zeros, self.g_idx, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight_in(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, groups={self.scales.shape[0]}"


def load_quantized(
    path: Model, *, dtype: torch.dtype | None = None, device: str | int | torch.device | None = None, backend: str | None = None
) -> PreTrainedModel:
    """A transformers model whose quantized linears run from the packed tensors.

    dtype: of everything else and of the arithmetic; None is float32 on the CPU, where it costs nothing in accuracy, and the
    checkpoint's own dtype elsewhere. device: torch's name for it, a GPU's number, or 'auto'; None is the CPU. backend: None or
    'torch' is plain torch; the name of a kernel of GPTQModel (see `kernels`) puts that in, and where it does not take the default
    dtype, None is the checkpoint's own or else float16 or bfloat16. Reads `gptq` and `gptq_v2` of any writer, with or
    without g_idx.

    Raises InputError for a folder that is not a GPTQ checkpoint, for a device that is not there, and for a backend that is
    unknown, not installed, or not possible for this checkpoint and device; CorruptCheckpointError for a checkpoint that
    contradicts itself.
    """
    opened = path if isinstance(path, OpenedModel) else OpenedModel(Path(path))
    folder, quantization = opened.folder, read_quantization_config(opened.folder)
    target = architecture.choose_device("cpu" if device is None else device)
    kernel = backends.for_checkpoint(backend, opened, target, dtype)
    source, config = opened.source, copy.deepcopy(opened.config)
    if kernel:
        dtype = kernel.dtype
    elif dtype is None:
        dtype = torch.float32 if target.type == "cpu" else (architecture.own_dtype(config) or torch.float16)
    del config.quantization_config  # transformers would otherwise look for kernels of its own
    model = architecture.empty_model(config, dtype)

    def locate(name: str) -> str | None:
        return architecture.source_name(model, name, source.__contains__)

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and locate(f"{name}.qweight"):
            model.set_submodule(name, _packed_linear(source, locate, name, quantization, module, target))
    packed = {f"{name}.{leaf}" for name, m in model.named_modules() if isinstance(m, QuantizedLinear) for leaf in m.state_dict()}
    absent = {name for name in architecture.tensor_names(model) if name not in packed and locate(name) is None}
    architecture.fill(model, "", lambda name: source.read(locate(name) or name), target, dtype, skip=packed | absent)
    model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise CorruptCheckpointError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]!r}")
    if kernel:
        backends.put_in(model, [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)], kernel)
    return model


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every QuantizedLinear by a plain linear with its dequantized weight, in place: same logits, no unpacking a forward."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            dense.weight = nn.Parameter(module.weight_in(dtype), requires_grad=False)
            if module.bias is not None:
                dense.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
            model.set_submodule(name, dense)
    return model


def _packed_linear(
    source: Checkpoint,
    locate: Callable[[str], str | None],
    name: str,
    quantization: dict[str, Any],
    linear: nn.Linear,
    device: torch.device,
) -> QuantizedLinear:
    def read(leaf: str) -> Tensor:
        found = locate(f"{name}.{leaf}")
        return source.read(found or f"{name}.{leaf}").to(device)  # which raises where there is none

    qweight, qzeros, scales = read("qweight"), read("qzeros"), read("scales")
    # the width of this layer, from its shape: a checkpoint may mix widths
    bits = qweight.shape[0] * 32 // linear.in_features
    if locate(f"{name}.g_idx"):
        g_idx = read("g_idx")
    else:
        g_idx = torch.arange(linear.in_features, dtype=torch.int32, device=device) // (linear.in_features // scales.shape[0])
    if bits not in (2, 3, 4, 8) or qweight.shape[1] != linear.out_features or g_idx.numel() != linear.in_features:
        raise CorruptCheckpointError(
            f"{name}: qweight {tuple(qweight.shape)} and g_idx {tuple(g_idx.shape)} do not fit a linear "
            f"of {linear.in_features} inputs and {linear.out_features} outputs"
        )
    bias = read("bias") if locate(f"{name}.bias") else None
    return QuantizedLinear(qweight, qzeros, scales, g_idx, bias, bits, layout(quantization))
