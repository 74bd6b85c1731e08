"""Which linears of a model are quantized, and why the others are not: decided from config and headers, before any work."""

from __future__ import annotations

import math
from typing import Any

import torch

from gptq_core.architecture import Decoder, linears_of, source_name
from gptq_core.checkpoint.format import why_not_packable
from gptq_core.checkpoint.reader import Checkpoint
from gptq_core.config import QuantizeConfig
from gptq_core.errors import InputError


def select(source: Checkpoint, decoder: Decoder, config: QuantizeConfig) -> dict[str, Any]:
    """{"blocks": count, "quantized": [name], "left": {name: reason}}.

    Raises InputError when the source is quantized already, lacks a tensor, or has a linear that cannot be packed and
    `config.strict` forbids leaving it.
    """
    if getattr(decoder.model.config, "quantization_config", None):
        raise InputError(f"{source.folder}: this checkpoint is already quantized; give the original model")
    _check_tensors(source, decoder)
    quantized: list[str] = []
    left: dict[str, str] = {}
    unwanted: dict[str, str] = {}
    sizes: list[tuple[int, int]] = []
    known = {name for block in decoder.blocks for name in linears_of(block)}
    for name in config.modules or []:
        if name not in known:
            raise InputError(f"modules_in_block_to_quantize: no linear {name!r} in a block; there are {', '.join(sorted(known))}")
    for index, block in enumerate(decoder.blocks):
        for name, linear in linears_of(block).items():
            if config.modules is not None and name not in config.modules:
                unwanted[f"{decoder.prefix}.{index}.{name}"] = "not in modules_in_block_to_quantize"
                continue
            sizes.append((linear.in_features, linear.out_features))
            reason = why_not_packable(linear.in_features, linear.out_features, config.group_size)
            if reason:
                left[f"{decoder.prefix}.{index}.{name}"] = reason
            else:
                quantized.append(f"{decoder.prefix}.{index}.{name}")
    if left and config.strict:
        first = next(iter(left))
        raise InputError(
            f"{first}: {left[first]}{_choices(sizes)}, or set quantization.strict: false to leave "
            f"{'it' if len(left) == 1 else f'these {len(left)} layers'} unquantized"
        )
    packed_by_block = {
        frozenset(name.removeprefix(f"{decoder.prefix}.{index}.") for name in quantized if name.startswith(f"{decoder.prefix}.{index}."))
        for index in range(len(decoder.blocks))
    }
    if left and len(packed_by_block) > 1:
        raise InputError(
            f"{source.folder}: strict: false would leave different linears in different blocks, which the files cannot say; "
            f"choose a group size that fits all{_choices(sizes)}"
        )
    if not quantized:
        raise InputError(f"{source.folder}: no linear of any decoder block can be quantized{_choices(sizes)}")
    return {"blocks": len(decoder.blocks), "quantized": quantized, "left": left | unwanted}


def _check_tensors(source: Checkpoint, decoder: Decoder) -> None:
    """Every tensor of the model is there, in its shape. Tied ones may be absent, and may not be something else."""
    tied = getattr(decoder.model, "all_tied_weights_keys", {})
    expected = {name: tuple(tensor.shape) for name, tensor in decoder.model.state_dict().items()}
    found = {name: source_name(decoder.model, name, source.__contains__) for name in expected}
    missing = [name for name, there in found.items() if there is None and not (name in tied and found.get(tied[name]))]
    if missing:
        raise InputError(
            f"{source.folder}: {len(missing)} tensors of the model are missing, the first is {missing[0]!r}; download it again"
        )
    for name, there in found.items():
        if there and (shape := source.header(there)[1]) != expected[name]:
            raise InputError(f"{name}: shape {shape} on disk, {expected[name]} by config.json; the two do not belong together")
    for name, twin in tied.items():
        if found.get(name) and found.get(twin) and not torch.equal(source.read(found[name]), source.read(found[twin])):
            raise InputError(
                f"{source.folder}: config.json ties {name} to {twin}, but the folder holds two different tensors; "
                "set tie_word_embeddings to false in config.json if both are meant"
            )


def _choices(sizes: list[tuple[int, int]]) -> str:
    """Group sizes that divide every layer that can be packed at all, as a phrase."""
    columns = [inputs for inputs, outputs in sizes if why_not_packable(inputs, outputs, -1) is None]
    common = math.gcd(*columns) if columns else 0
    fitting = [str(size) for size in (16, 32, 64, 128, 256, 512, 1024) if common and common % size == 0]
    if not fitting:
        return ""
    return f"; group sizes that fit{'' if len(columns) == len(sizes) else ' the other layers'}: {', '.join(fitting)} or -1"


def bits_on_disk(layer: dict[str, Any]) -> int:
    """Bits of the packed tensors of one layer, scales, zeros and g_idx included."""
    columns, out, bits = layer["in_features"], layer["out_features"], layer["bits"]
    groups = 1 if layer["group_size"] == -1 else columns // layer["group_size"]
    return columns * out * bits + groups * out * (16 + bits) + columns * 32
