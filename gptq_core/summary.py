"""What a finished run tells about its checkpoint: sizes, counts, what was left or fell back, and who will load it."""

from __future__ import annotations

from typing import Any

from gptq_core import plan
from gptq_core.config import QuantizeConfig
from gptq_core.selection import Selection, bits_on_disk


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
        "loads": [verdict.record() for verdict in plan.loadability(config, selection)],
        "unused_source_tensors": unused,
    }
