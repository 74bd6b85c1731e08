"""Between solutions and files: tensors as they go to a shard and come back, and what a checkpoint has beside its blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_core.checkpoint import format
from gptq_core.checkpoint.packing import unpack, unpack_zeros
from gptq_core.checkpoint.reader import INDEX, Checkpoint
from gptq_core.checkpoint.writer import OutputFolder
from gptq_core.config import QuantizeConfig
from gptq_core.method import grid
from gptq_core.method.solver import Solution
from gptq_core.model import architecture
from gptq_core.model.architecture import Decoder
from gptq_core.model.selection import Selection


def packed(tensors: dict[str, Tensor], solutions: dict[str, Solution], selection: Selection) -> dict[str, Tensor]:
    """Tensors as they go to disk: solved weights packed, and everything else in its dtype."""
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if owner in solutions and leaf == "weight":
            s = solutions[owner]
            shard |= format.packed_tensors(owner, s.codes, s.scales, s.zeros, s.g_idx, selection.layers[owner].config)
        else:
            shard[name] = tensor.half() if owner in solutions and leaf == "bias" else tensor
    return shard


def unpacking(stored: dict[str, Tensor], selection: Selection, layout: str, dtype: torch.dtype) -> Callable[[str], Tensor]:
    """A reader of a shard by the model's own names: packed weights come back dequantized in `dtype`."""

    def read(name: str) -> Tensor:
        stem = name.removesuffix(".weight")
        if f"{stem}.qweight" not in stored:
            return stored[name]
        qweight, qzeros, scales, g_idx = (stored[f"{stem}.{leaf}"] for leaf in format.LEAVES)
        bits = selection.layers[stem].config.bits
        return grid.dequantize(unpack(qweight, bits), scales, unpack_zeros(qzeros, bits, layout), g_idx, dtype)

    return read


def outside_blocks(decoder: Decoder, source: Checkpoint) -> tuple[dict[str, Tensor], list[str]]:
    """The model's tensors that are in no block, by the source's names, and names in the source that the model does not have."""
    blocks, rest, used = set(decoder.block_tensor_names()), {}, set()
    for name in architecture.tensor_names(decoder.model):
        found = architecture.source_name(decoder.model, name, source.__contains__)
        if found:
            used.add(found)
            if name not in blocks:
                rest[name] = source.read(found)
    return rest, sorted(set(source.names) - used)


def write_index(output: OutputFolder) -> int:
    """The index of all shards; their bytes."""
    records = [record for record in output.records if "file" in record]
    weight_map = {tensor: record["file"] for record in records for tensor in record["tensors"]}
    size = sum(sum(record["files"].values()) for record in records)
    output.write_text(INDEX, _json({"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}))
    return size


def write_configs(
    output: OutputFolder, source: Path, decoder: Decoder, config: QuantizeConfig, selection: Selection, meta: dict[str, Any] | None = None
) -> None:
    """config.json and quantize_config.json, and what is carried over from the source as it is: tokenizer, generation settings.

    meta: entries for `meta` in both. They take precedence, except for the recipe, which is that of the work.
    """
    found = json.loads((source / "config.json").read_text())
    quantization = format.quantization_config(config, selection.modules, selection.rules)
    quantization = format.with_meta(quantization, meta)
    found.pop("_name_or_path", None)
    found.setdefault("architectures", [type(decoder.model).__name__])
    output.write_text("config.json", _json(found | {"quantization_config": quantization}))
    output.write_text("quantize_config.json", _json(quantization))
    for path in sorted({p for pattern in format.CARRIED for p in source.glob(pattern) if p.is_file()}):
        output.copy(path)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
