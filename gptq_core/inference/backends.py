"""Run a checkpoint with GPTQModel's kernels: list them, check which of them fit a checkpoint and a device, and install one.

The package is optional, `pip install 'gptq-pipeline[kernels]'`, and imported only when a kernel is requested: its import prints, sets
environment variables and patches other packages. Its linears are used, its loader is not, which refuses asymmetric `gptq` files, shards
for some kernels, and folders without a tokenizer. Instead the tensors of each QuantizedLinear are passed on one by one, with the true
zero points, so both layouts and layers of different bits are handled alike.

Names are the values of GPTQModel's BACKEND, `gptq_marlin`, or those without their prefix, `marlin`. `torch` alone is this library's own
path; GPTQModel's torch kernel is `gptq_torch`. Left out are gptq_w4afp8 and gptq_w4a_nvfp4, which quantize the activations too, and
gptq_bitblas, which builds its layers around a compiler of its own.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

import torch
from torch import Tensor, nn

from gptq_core.checkpoint.format import layout, read_quantization_config
from gptq_core.checkpoint.packing import pack_zeros, unpack_zeros
from gptq_core.checkpoint.reader import Checkpoint
from gptq_core.config import KERNELS, QuantizeConfig, kernel_name
from gptq_core.errors import CorruptCheckpointError, InputError
from gptq_core.model.architecture import own_dtype
from gptq_core.model.opened import Model, OpenedModel

REMEDY = "pip install 'gptq-pipeline[kernels]'"


@dataclass(frozen=True)
class Layer:
    """Properties of a linear that decide which kernels fit. desc_act: its g_idx is not in order; sym: every zero point is 2^(bits-1)."""

    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    in_features: int
    out_features: int

    @classmethod
    def planned(cls, config: QuantizeConfig, in_features: int, out_features: int) -> Layer:
        """The layer that quantizing a linear of that size will write."""
        size = -1 if config.group_size == in_features else config.group_size
        return cls(config.bits, size, config.desc_act and size != -1, config.sym, in_features, out_features)

    def __str__(self) -> str:
        return (
            f"{self.bits} bits, group_size {self.group_size}, desc_act {self.desc_act}, sym {self.sym}, "
            f"{self.in_features} x {self.out_features}"
        )


@dataclass(frozen=True)
class Kernel:
    """A kernel that supports all layers of a checkpoint. dtype: of the arithmetic."""

    name: str
    linear: Any
    """GPTQModel's class of linears, which has no types."""
    dtype: torch.dtype


@runtime_checkable
class Packed(Protocol):
    """Attributes of a QuantizedLinear that a kernel's linear is made of."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: nn.Parameter | None
    bits: int
    format: str


def stored(source: Checkpoint, format: str) -> list[Layer]:
    """The distinct layers of a checkpoint, by its tensors and not by its labels; qweight is not read."""
    found = []
    for name in source.names:
        if name.endswith(".qweight"):
            stem = name.removesuffix(".qweight")
            shapes = source.header(name)[1], source.header(f"{stem}.scales")[1]
            g_idx = source.read(f"{stem}.g_idx") if f"{stem}.g_idx" in source else None
            found.append(_layer(stem, *shapes, source.read(f"{stem}.qzeros"), g_idx, format))
    return list(dict.fromkeys(found))


def named(backend: str | None) -> str | None:
    """The kernel that a `backend` names, None for this library's own path. Raises InputError for any other name."""
    if not isinstance(backend, str | None):
        raise InputError(f"backend = {backend!r}: must be a name, such as 'torch' or 'gptq_marlin'")
    try:
        return kernel_name(backend)
    except ValueError as error:
        raise InputError(f"backend = {backend!r}: {error}") from error


def choose(
    backend: str | None, layers: Iterable[Layer], device: torch.device, dtype: torch.dtype | None = None, own: torch.dtype | None = None
) -> Kernel | None:
    """The kernel of that name, if it supports all `layers` on `device`; None if `backend` is this library's own path.

    dtype: of the arithmetic. None picks the first that the kernel supports of: what load_quantized would use in torch, `own` (that of
    the checkpoint), float16, bfloat16. Raises InputError for an unknown name, if gptqmodel is not installed, and if the kernel does not
    support a layer, the device or the dtype; the error names the kernels that do. A kernel that must be compiled is compiled.
    """
    name = named(backend)
    if name is None:
        return None
    linear, layers = _kernel(name, backend), list(layers)
    kernel = Kernel(name, linear, dtype or _dtype(linear, device, own))
    for layer in layers:
        if reason := _against(kernel, layer, device, ready=True):
            others = [other for other in KERNELS if other != name and _takes(other, layers, device, dtype, own)]
            raise InputError(
                f"backend = {backend!r}: {reason} (a layer of {layer}; {_bare(kernel.dtype)} on {device}); "
                f"the checkpoint and the device allow {', '.join(['torch', *others])}"
            )
    return kernel


def for_checkpoint(backend: str | None, checkpoint: Model, device: torch.device, dtype: torch.dtype | None = None) -> Kernel | None:
    """`choose` for the checkpoint in a folder. Also raises InputError if the folder is not a GPTQ checkpoint."""
    if choose(backend, [], device, dtype) is None:
        return None
    opened = checkpoint if isinstance(checkpoint, OpenedModel) else OpenedModel(Path(checkpoint))
    layers = stored(opened.source, layout(read_quantization_config(opened.folder)))
    return choose(backend, layers, device, dtype, own_dtype(opened.config))


def put_in(model: nn.Module, names: Iterable[str], kernel: Kernel) -> None:
    """Replace the QuantizedLinears of these names by the kernel's linears, in place, ready to run."""
    from gptqmodel.utils.model import hf_gptqmodel_post_init

    with _on_stderr():
        for name in names:
            packed = model.get_submodule(name)
            assert isinstance(packed, Packed), name
            model.set_submodule(name, _converted(name, packed, kernel))
        hf_gptqmodel_post_init(model, use_act_order=False)


def _converted(name: str, packed: Packed, kernel: Kernel) -> nn.Module:
    """A linear of the kernel with the tensors of a QuantizedLinear; scales and bias in the kernel's dtype, as GPTQModel loads them."""
    from gptqmodel.quantization import FORMAT
    from gptqmodel.utils.backend import BACKEND

    layer = _layer(name, packed.qweight.shape, packed.scales.shape, packed.qzeros, packed.g_idx, packed.format)
    zeros = unpack_zeros(packed.qzeros, packed.bits, packed.format)
    made = kernel.linear(
        bits=layer.bits,
        group_size=layer.group_size,
        desc_act=layer.desc_act,
        sym=layer.sym,
        in_features=layer.in_features,
        out_features=layer.out_features,
        bias=packed.bias is not None,
        pack_dtype=torch.int32,
        dtype=kernel.dtype,
        adapter=None,
        backend=BACKEND(kernel.name),
        format=FORMAT.GPTQ,
        name=name,
        register_buffers=True,
    )
    tensors = {
        "qweight": packed.qweight,
        "qzeros": pack_zeros(zeros, packed.bits, "gptq_v2"),
        "scales": packed.scales.to(kernel.dtype),
        "g_idx": packed.g_idx % packed.scales.shape[0],
    }
    if packed.bias is not None:
        tensors["bias"] = packed.bias.data.to(kernel.dtype)
    unexpected = made.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    assert not unexpected, f"{kernel.name} has no {unexpected}"
    made.qzero_format(format=2)
    ready: nn.Module = made.to(packed.qweight.device).requires_grad_(False).eval()
    return ready


def _layer(name: str, qweight: Sequence[int], scales: Sequence[int], qzeros: Tensor, g_idx: Tensor | None, format: str) -> Layer:
    """The layer that packed tensors describe; of qweight and scales only the shapes are needed."""
    (rows, out), groups = qweight, scales[0]
    bits = qzeros.shape[1] * 32 // out
    if bits not in (2, 3, 4, 8) or rows % bits or qzeros.shape[0] != groups:
        raise CorruptCheckpointError(
            f"{name}: qweight {tuple(qweight)}, qzeros {tuple(qzeros.shape)} and scales {tuple(scales)} do not fit"
        )
    columns = rows * 32 // bits
    size = -1 if groups == 1 else columns // groups
    in_order = g_idx is None or groups == 1 or torch.equal(g_idx.cpu() % groups, torch.arange(columns, dtype=torch.int32) // size)
    zeros = unpack_zeros(qzeros, bits, format)
    return Layer(bits, size, not in_order, bool((zeros == 2 ** (bits - 1)).all()), columns, out)


def _kernel(name: str, backend: str | None = None) -> Any:
    """GPTQModel's class of linears of that kernel; backend: the name in the config, for the error."""
    try:
        with _on_stderr():
            from gptqmodel.quantization import FORMAT, METHOD
            from gptqmodel.utils.backend import BACKEND
            from gptqmodel.utils.importer import get_kernel_for_backend

            return get_kernel_for_backend(BACKEND(name), METHOD.GPTQ, FORMAT.GPTQ)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"backend = {(backend or name)!r}: needs the package gptqmodel, 7.7 or newer ({error}); {REMEDY}, "
            "or leave backend out to run in plain torch"
        ) from error


def _dtype(linear: Any, device: torch.device, own: torch.dtype | None) -> torch.dtype:
    """The first dtype that GPTQModel's class supports."""
    usual = torch.float32 if device.type == "cpu" else own
    candidates = (usual, own, torch.float16, torch.bfloat16)
    return next(dtype for dtype in candidates if dtype is not None and dtype in linear.SUPPORTS_DTYPES)


def _against(kernel: Kernel, layer: Layer, device: torch.device, ready: bool) -> str | None:
    """Why a kernel does not support a layer, in GPTQModel's words, or None. ready: also check that it runs here, which may compile it."""
    if kernel.name == "gptq_torch_fused" and device.type == "cpu" and not layer.sym:
        return "on the CPU it runs every zero point as the middle one, whatever the file says"
    from gptqmodel.utils.importer import validate_quant_linear

    asked = vars(layer) | {"pack_dtype": torch.int32, "dtype": kernel.dtype, "device": device}
    with _on_stderr():
        ok, error = validate_quant_linear(kernel.linear, **asked) if ready else kernel.linear._validate(**asked)
    # its first sentence is the rule; the rest is advice or a compiler's output
    return None if ok else str(error).removeprefix(str(kernel.linear)).strip(" :").partition("\n")[0].partition(". ")[0].rstrip(".")


def _takes(name: str, layers: list[Layer], device: torch.device, dtype: torch.dtype | None, own: torch.dtype | None) -> bool:
    """Whether a kernel declares support for the layers; it is not compiled."""
    try:
        linear = _kernel(name)
    except InputError:  # not in this release of GPTQModel, or not with this machine's triton
        return False
    kernel = Kernel(name, linear, dtype or _dtype(linear, device, own))
    return all(_against(kernel, layer, device, ready=False) is None for layer in layers)


def _bare(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _on_stderr() -> contextlib.redirect_stdout[TextIO]:
    """Redirect GPTQModel's banner and log, which it prints on stdout, where a command prints its result."""
    return contextlib.redirect_stdout(sys.stderr)
