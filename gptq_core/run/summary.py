"""What a finished run tells about its checkpoint: sizes, counts, what was left or fell back, and who will load it."""

from __future__ import annotations

from typing import Any

import torch

from gptq_core.config import QuantizeConfig
from gptq_core.method.solver import Solution
from gptq_core.model.selection import Selection, bits_on_disk
from gptq_core.planning.consumers import loadability


def summarize(
    records: list[dict[str, Any]], config: QuantizeConfig, selection: Selection, original_bytes: int, size: int, unused: list[str]
) -> dict[str, Any]:
    """The summary of a manifest's records. size: bytes of all shards; unused: tensors of the source that the model does not have."""
    blocks = [record for record in records if record["kind"] == "block"]
    layers = [layer for record in records if record["kind"] in ("block", "rest") for layer in record["layers"]]
    weights = sum(layer["in_features"] * layer["out_features"] for layer in layers)
    return {
        "bytes": size,
        "original_bytes": original_bytes,
        "bits_per_weight": sum(bits_on_disk(layer) for layer in layers) / weights,
        "quantized_layers": len(layers),
        "fallback_layers": [layer["name"] for layer in layers if layer["fallback"]],
        "untuned_blocks": [record["block"] for record in blocks if "tuning" in record and not record["tuning"]["kept"]],
        "lm_head": next((layer for layer in layers if not layer["name"].startswith(f"{selection.prefix}.")), None),
        "skipped": [{"name": name, "reason": reason} for name, reason in selection.left.items()],
        "loads": [verdict.record() for verdict in loadability(config, selection)],
        "unused_source_tensors": unused,
    }


def distribution(solution: Solution, bits: int) -> dict[str, Any]:
    """{"codes": count of each code 0 … 2^bits - 1, "scales": {"first_octave", "counts"}}.

    counts[i] is the number of scales s with floor(log2 |s|) = first_octave + i; scales of zero are not counted.
    """
    codes = torch.bincount(solution.codes.flatten(), minlength=2**bits).tolist()
    magnitudes = solution.scales.float().abs()
    octaves = torch.log2(magnitudes[magnitudes > 0]).floor().int()
    if not octaves.numel():
        return {"codes": codes, "scales": {"first_octave": 0, "counts": []}}
    first = int(octaves.min())
    return {"codes": codes, "scales": {"first_octave": first, "counts": torch.bincount(octaves - first).tolist()}}
