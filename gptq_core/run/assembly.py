"""Between solutions and files: tensors as they go to a shard and come back, and what a checkpoint has beside its blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_core.checkpoint import format
from gptq_core.checkpoint.carried import carried_files
from gptq_core.checkpoint.finite import half
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
            shard[name] = half(tensor, name) if owner in solutions and leaf == "bias" else tensor
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


def outside_blocks(decoder: Decoder, source: Checkpoint) -> dict[str, Tensor]:
    """The model's tensors that are in no block, as the source stores them."""
    blocks = set(decoder.block_tensor_names())
    names = (name for name in architecture.tensor_names(decoder.model) if name not in blocks)
    found = {name: architecture.source_name(decoder.model, name, source.__contains__) for name in names}
    return {name: source.read(there) for name, there in found.items() if there}


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
    if selection.unused:
        _promise_no_more(found)
    found.setdefault("architectures", [type(decoder.model).__name__])
    output.write_text("config.json", _json(found | {"quantization_config": quantization}))
    output.write_text("quantize_config.json", _json(quantization))
    for path in carried_files(source):
        output.copy(source, path)


PREDICTION_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
"""Keys that promise layers for the prediction of further tokens, which stand behind the decoder blocks and are not written."""


def _promise_no_more(config: dict[str, Any]) -> None:
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.update({key: 0 for key in PREDICTION_LAYERS if part.get(key)})


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
