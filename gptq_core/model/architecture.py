"""What a model is made of, discovered rather than listed.

A causal language model is built empty, on the meta device, and filled piece by piece from its checkpoint. Its decoder blocks
are the one list of modules as long as the config says there are layers; its quantizable parts are the `nn.Linear` in them.
What this engine cannot quantize yet (GPT-2's Conv1D, experts stacked in one 3-D parameter) is refused with its name, because
silently leaving most of a model as it was would look like success.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gptq_core.errors import CorruptCheckpointError, InputError, UnsupportedModelError, foreign_input
from gptq_core.kernels.processor import multiplies_in_bfloat16

Read = Callable[[str], Tensor]

MOST_LAYERS = 1024
"""Far beyond any model there is; building an empty one of a million layers would take hours."""


@dataclass(frozen=True)
class Decoder:
    """An empty model and where its decoder blocks are."""

    model: PreTrainedModel
    prefix: str
    """Name of the list of blocks, such as `model.layers`."""
    blocks: nn.ModuleList

    def block_tensor_names(self) -> list[str]:
        """Full names of all tensors of all blocks."""
        return [name for index, block in enumerate(self.blocks) for name in tensor_names(block, f"{self.prefix}.{index}")]


def load_config(folder: Path) -> PretrainedConfig:
    """The model's config. Raises InputError for an architecture that transformers does not know (remote code is never run)."""
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{folder}: no config.json; give the folder of a Hugging Face model")
    with foreign_input(file, "mend it, or download the model again"):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config._attn_implementation = None  # transformers chooses; a name in the file could be that of code to fetch
        layers = config.get_text_config(decoder=True).num_hidden_layers
        known = config.dtype is None or isinstance(config.dtype, torch.dtype)
    if not known:
        raise InputError(f"{file}: dtype = {config.dtype!r} is none that torch knows; mend it, or download the model again")
    if not 1 <= layers <= MOST_LAYERS:
        raise InputError(f"{file}: num_hidden_layers = {layers} (must be 1 to {MOST_LAYERS}); mend it, or download the model again")
    return config


def own_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The dtype that a config names for its weights; None where it names none."""
    dtype = config.dtype
    assert not isinstance(dtype, str), dtype  # transformers turns a name into torch's dtype when it makes the config
    return dtype


def choose_device(device: str | int | torch.device) -> torch.device:
    """A device by torch's name for it, or a GPU by its number; `auto` is the first GPU, or the CPU where there is none.

    Raises InputError for an unknown name and for a device that this machine's torch does not see.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(f"cuda:{device}" if type(device) is int else device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device = {device!r}: not a device; use 'cpu', 'cuda', 'cuda:1', the number of a GPU, or 'auto'") from error
    seen = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if seen is not None and seen.type == chosen.type else 0
    if chosen.type != "cpu" and (chosen.index or 0) >= count:
        found = f"{count} of type {chosen.type}, counted from 0" if count else "no GPU" if chosen.type == "cuda" else f"no {chosen.type}"
        raise InputError(f"device = {device!r}: this machine's torch sees {found}; use 'cpu' or 'auto'")
    return chosen


def choose_dtype(dtype: str, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype of the forward. `auto`: on a GPU the checkpoint's own; on a CPU bfloat16 if the processor multiplies in it and the
    config names it or no dtype, else float32."""
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    if device.type == "cpu" and own_dtype(config) in (torch.bfloat16, None) and multiplies_in_bfloat16():
        return torch.bfloat16
    return judging_dtype(config, device)


def judging_dtype(config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype that a model is evaluated in: float32 on the CPU, the checkpoint's own on a GPU."""
    return torch.float32 if device.type == "cpu" else (own_dtype(config) or torch.bfloat16)


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with all parameters on the meta device and its computed buffers real, on the CPU. `config` stays as it is."""
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(f"model_type {config.model_type!r}: transformers has no causal language model of this type")
    with foreign_input(f"model_type {config.model_type!r}", "mend config.json, or download the model again"), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
    for module in model.modules():
        computed = {name: buffer for name in module._non_persistent_buffers_set if (buffer := module._buffers.get(name)) is not None}
        for name, buffer in computed.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if computed:
            # transformers computes such buffers (rotary frequencies, embedding scales) here when it loads a checkpoint itself;
            # the module's parameters are still on meta, where initialising does nothing
            model._init_weights(module)
    model.eval().requires_grad_(False)
    return model


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Find the decoder blocks. Raises UnsupportedModelError when there is no single list of them."""
    expected = model.config.get_text_config(decoder=True).num_hidden_layers
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == expected
        and len(module) > 0
        and all(any(True for _ in b.children()) for b in module)
    ]
    outermost = [(n, m) for n, m in candidates if not any(n.startswith(f"{other}.") for other, _ in candidates)]
    if len(outermost) != 1:
        found = ", ".join(name for name, _ in outermost) or "none"
        raise UnsupportedModelError(f"{type(model).__name__}: one list of {expected} decoder blocks is needed, found: {found}")
    prefix, blocks = outermost[0]
    for index, block in enumerate(blocks):
        _refuse_unsupported(f"{prefix}.{index}", block)
    return Decoder(model, prefix, blocks)


def _refuse_unsupported(path: str, block: nn.Module) -> None:
    for name, module in block.named_modules():
        if isinstance(module, Conv1D):
            raise UnsupportedModelError(f"{path}.{name}: Conv1D (GPT-2's transposed linear) cannot be quantized yet")
        stacked = [p for p, tensor in module.named_parameters(recurse=False) if tensor.ndim == 3]
        if stacked and not isinstance(module, nn.modules.conv._ConvNd):
            raise UnsupportedModelError(f"{path}.{name}.{stacked[0]}: experts stacked in one 3-D parameter cannot be quantized yet")


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block by their name inside it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def head_name(model: PreTrainedModel) -> str | None:
    """Name of the output head, such as `lm_head`."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def outside(model: nn.Module, blocks: nn.ModuleList) -> Iterator[nn.Module]:
    """Modules that own tensors outside the decoder blocks."""
    inside = {id(m) for m in blocks.modules()}
    for module in model.modules():
        if id(module) not in inside and not any(True for _ in module.children()):
            yield module


def source_name(model: PreTrainedModel, name: str, available: Callable[[str], bool]) -> str | None:
    """The name under which a checkpoint stores a tensor: the model's own, or without the prefix of the base model."""
    bare = name.removeprefix(f"{model.base_model_prefix}.")
    return next((candidate for candidate in (name, bare) if available(candidate)), None)


def tensor_names(module: nn.Module, prefix: str = "") -> list[str]:
    """Names of all parameters and persistent buffers, tied ones included."""
    dot = f"{prefix}." if prefix else ""
    return [dot + name for name in module.state_dict()]


def fill(module: nn.Module, prefix: str, read: Read, device: torch.device, dtype: torch.dtype, skip: Set[str] = frozenset()) -> None:
    """Give a module on meta its tensors: floating ones in `dtype`, all on `device`. `skip` names (full names) stay on meta.

    Computed buffers only move to the device.
    """
    for owner_name, owner in module.named_modules():
        path = ".".join(part for part in (prefix, owner_name) if part)
        dot = f"{path}." if path else ""
        for name, weight in owner._parameters.items():
            if weight is not None and dot + name not in skip:
                owner._parameters[name] = nn.Parameter(_placed(read(dot + name), weight, dot + name, device, dtype), requires_grad=False)
        for name, buffer in owner._buffers.items():
            if buffer is None or dot + name in skip:
                continue
            computed = name in owner._non_persistent_buffers_set
            owner._buffers[name] = buffer.to(device) if computed else _placed(read(dot + name), buffer, dot + name, device, dtype)


def _placed(tensor: Tensor, expected: Tensor, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    if tensor.shape != expected.shape:
        raise CorruptCheckpointError(f"{name}: shape {tuple(tensor.shape)} on disk, {tuple(expected.shape)} expected by config.json")
    return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)  # where it is pinned


def empty(module: nn.Module) -> None:
    """Release a block's tensors: back to meta. Computed buffers stay, because no checkpoint could bring them back."""
    for owner in module.modules():
        for name, weight in owner._parameters.items():
            if weight is not None:
                owner._parameters[name] = nn.Parameter(weight.to("meta"), requires_grad=False)
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                owner._buffers[name] = buffer.to("meta")
