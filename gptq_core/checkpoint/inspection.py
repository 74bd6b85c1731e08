"""List the packed linears of a checkpoint with their widths, and its dense tensors, without loading it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypedDict

from gptq_core.checkpoint.format import layout, read_quantization_config
from gptq_core.checkpoint.reader import Checkpoint
from gptq_core.checkpoint.writer import MANIFEST
from gptq_core.errors import CorruptCheckpointError

DTYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}


class PackedLinear(TypedDict):
    """A quantized linear of a checkpoint."""

    name: str
    in_features: int
    out_features: int
    groups: int
    bits: int
    bytes: int
    """Size of its tensors."""


class DenseTensor(TypedDict):
    """A tensor of a checkpoint that belongs to no quantized linear."""

    name: str
    shape: list[int]
    dtype: str
    """As safetensors spells it."""
    bytes: int


class Inspection(TypedDict):
    """What a checkpoint holds. bits, group_size, sym and desc_act are the checkpoint's own; rules of `dynamic` may differ from them."""

    path: str
    format: str
    bits: int | None
    group_size: int | None
    sym: bool | None
    desc_act: bool | None
    bits_per_weight: float | None
    """Scales, zeros and g_idx included; None if nothing is quantized."""
    bytes: int
    loads: list[dict[str, Any]] | None
    """`Verdict.record` of each consumer; None if another program made the checkpoint."""
    layers: list[PackedLinear]
    dense: list[DenseTensor]


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Format, widths, groups and sizes, from the JSON and the tensor headers alone. Raises InputError for another kind of folder."""
    quantization = read_quantization_config(Path(path))
    source = Checkpoint(Path(path))
    size = {name: _bytes(*source.header(name)) for name in source.names}
    layers: list[PackedLinear] = []
    packed: set[str] = set()
    for name in source.names:
        if not name.endswith(".qweight"):
            continue
        stem = name.removesuffix(".qweight")
        parts = [f"{stem}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx") if f"{stem}.{leaf}" in source]
        if len(parts) < 3:
            raise CorruptCheckpointError(f"{path}: {stem} has only {', '.join(parts)}")
        packed.update(parts)
        words, out = source.header(name)[1]
        groups, stored_zeros = source.header(f"{stem}.scales")[1][0], source.header(f"{stem}.qzeros")[1][1]
        bits = stored_zeros * 32 // out
        layers.append(
            {
                "name": stem,
                "in_features": words * 32 // bits,
                "out_features": out,
                "groups": groups,
                "bits": bits,
                "bytes": sum(size[p] for p in parts),
            }
        )
    dense: list[DenseTensor] = [
        {"name": n, "shape": list(source.header(n)[1]), "dtype": source.header(n)[0], "bytes": size[n]}
        for n in source.names
        if n not in packed
    ]
    weights = sum(layer["in_features"] * layer["out_features"] for layer in layers)
    return {
        "path": str(path),
        "format": layout(quantization),
        "bits": quantization.get("bits"),
        "group_size": quantization.get("group_size"),
        "sym": quantization.get("sym"),
        "desc_act": quantization.get("desc_act"),
        "bits_per_weight": 8 * sum(layer["bytes"] for layer in layers) / weights if weights else None,
        "bytes": sum(size.values()),
        "loads": _loads(Path(path)),
        "layers": layers,
        "dense": dense,
    }


def _loads(folder: Path) -> list[dict[str, Any]] | None:
    path = folder / MANIFEST
    lines = path.read_text().splitlines() if path.is_file() else []
    loads: list[dict[str, Any]] | None = json.loads(lines[-1]).get("summary", {}).get("loads") if lines else None
    return loads


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return DTYPE_BYTES[dtype] * math.prod(shape)
