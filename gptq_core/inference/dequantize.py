"""Turn a quantized checkpoint into a dense one, shard by shard, for tools that do not read GPTQ.

Its weights are those that a consumer of the packed files computes, in the model's own dtype.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from gptq_core.checkpoint.carried import carried_files
from gptq_core.checkpoint.format import LEAVES, layout, read_quantization_config
from gptq_core.checkpoint.packing import unpack, unpack_zeros
from gptq_core.checkpoint.reader import INDEX, Checkpoint
from gptq_core.checkpoint.writer import replace_file
from gptq_core.errors import InputError
from gptq_core.method import grid
from gptq_core.model.architecture import load_config, own_dtype


def dequantize_checkpoint(checkpoint: str | Path, out: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write a GPTQ checkpoint as a dense one to the new folder `out`. dtype: None is that of the checkpoint's config.

    Raises InputError when `checkpoint` is not quantized or `out` exists or cannot be made. `out` appears when it is complete.
    """
    folder, target = Path(checkpoint), Path(out)
    quantization = read_quantization_config(folder)
    if os.path.exists(target):  # unlike Path.exists, false for a name that is too long
        raise InputError(f"{target} exists already; name a new folder")
    source = Checkpoint(folder)
    kind = dtype or own_dtype(load_config(folder)) or torch.float16
    format = layout(quantization)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{target}: no folder can be made there ({error.strerror}); name another") from error
    weight_map: dict[str, str] = {}
    total = 0
    for shard, names in source.shards().items():
        tensors = dict(_dense(source, name, format, kind) for name in names if not _belongs_to_packed(source, name))
        replace_file(partial / shard, tensors)
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    replace_file(partial / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    config["dtype"] = str(kind).removeprefix("torch.")
    replace_file(partial / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    for path in carried_files(folder):
        replace_file(partial / path, folder / path)
    os.rename(partial, target)
    return target


def _belongs_to_packed(source: Checkpoint, name: str) -> bool:
    stem, _, leaf = name.rpartition(".")
    return leaf in LEAVES[1:] and f"{stem}.qweight" in source


def _dense(source: Checkpoint, name: str, format: str, dtype: torch.dtype) -> tuple[str, Tensor]:
    tensor = source.read(name)
    if not name.endswith(".qweight"):
        return name, tensor.to(dtype) if tensor.is_floating_point() else tensor
    stem = name.removesuffix(".qweight")
    qzeros, scales = source.read(f"{stem}.qzeros"), source.read(f"{stem}.scales")
    bits = qzeros.shape[1] * 32 // scales.shape[1]
    columns = tensor.shape[0] * 32 // bits
    if f"{stem}.g_idx" in source:
        g_idx = source.read(f"{stem}.g_idx")
    else:
        g_idx = torch.arange(columns) // (columns // scales.shape[0])
    return f"{stem}.weight", grid.dequantize(unpack(tensor, bits), scales, unpack_zeros(qzeros, bits, format), g_idx, dtype)
