"""The summary of a finished checkpoint: sizes, counts, what was left or fell back, and who will load it."""

from __future__ import annotations

from typing import Any, TypedDict

import torch

from gptq_core.block.group import LayerReport
from gptq_core.config import QuantizeConfig
from gptq_core.method.solver import Solution
from gptq_core.model.selection import Selection, bits_on_disk
from gptq_core.planning.consumers import loadability


class Octaves(TypedDict):
    """Sizes of scales: counts[i] is the number of scales s with floor(log2 |s|) = first_octave + i; scales of zero are not counted."""

    first_octave: int
    counts: list[int]


class Distribution(TypedDict):
    """Which codes and scales a linear uses."""

    codes: list[int]
    """Count of each code 0 … 2^bits - 1."""
    scales: Octaves


class LayerRecord(LayerReport, Distribution):
    """What the manifest holds of a quantized linear."""


class LeftLinear(TypedDict):
    """A linear that was not quantized, and why."""

    name: str
    reason: str


class Summary(TypedDict):
    """A finished checkpoint as a whole."""

    bytes: int
    """Of all shards."""
    original_bytes: int
    bits_per_weight: float
    """Of the quantized linears; scales, zeros and g_idx included."""
    quantized_layers: int
    fallback_layers: list[str]
    """Linears that were rounded to nearest."""
    untuned_blocks: list[int]
    """Blocks that tuning did not improve."""
    lm_head: LayerRecord | None
    skipped: list[LeftLinear]
    loads: list[dict[str, Any]]
    """`Verdict.record` of each consumer."""
    unused_source_tensors: list[str]
    """Tensors of the source that the model does not have."""


def summarize(records: list[dict[str, Any]], config: QuantizeConfig, selection: Selection, original_bytes: int, size: int) -> Summary:
    """The summary of a manifest's records. size: bytes of all shards."""
    blocks = [record for record in records if record["kind"] == "block"]
    layers: list[LayerRecord] = [layer for record in records if record["kind"] in ("block", "rest") for layer in record["layers"]]
    weights = sum(layer["in_features"] * layer["out_features"] for layer in layers)
    return {
        "bytes": size,
        "original_bytes": original_bytes,
        "bits_per_weight": sum(map(_bits_on_disk, layers)) / weights,
        "quantized_layers": len(layers),
        "fallback_layers": [layer["name"] for layer in layers if layer["fallback"]],
        "untuned_blocks": [record["block"] for record in blocks if "tuning" in record and not record["tuning"]["kept"]],
        "lm_head": next((layer for layer in layers if not layer["name"].startswith(f"{selection.prefix}.")), None),
        "skipped": [{"name": name, "reason": reason} for name, reason in selection.left.items()],
        "loads": [verdict.record() for verdict in loadability(config, selection)],
        "unused_source_tensors": list(selection.unused),
    }


def _bits_on_disk(layer: LayerRecord) -> int:
    return bits_on_disk(layer["in_features"], layer["out_features"], layer["bits"], layer["group_size"])


def distribution(solution: Solution, bits: int) -> Distribution:
    """The codes and scales of a solution."""
    codes = torch.bincount(solution.codes.flatten(), minlength=2**bits).tolist()
    magnitudes = solution.scales.float().abs()
    octaves = torch.log2(magnitudes[magnitudes > 0]).floor().int()
    if not octaves.numel():
        return {"codes": codes, "scales": {"first_octave": 0, "counts": []}}
    first = int(octaves.min())
    return {"codes": codes, "scales": {"first_octave": first, "counts": torch.bincount(octaves - first).tolist()}}
