"""Records made by hand, for the tests of the report: every field that a record may have, and what an old one had.

They are JSON, so that a test can change any part; `run_page` and the like take them as if they were read from disk.
"""

from __future__ import annotations

import copy
from typing import Any

from tasks.outcome.parts import Block
from tasks.outcome.record import RunRecord, SweepRecord
from tasks.report import compare
from tasks.report import run as runs
from tasks.report import sweep as sweeps
from tasks.report.parts import Page

EVIL = '</script><script>window.evil = 1</script><img src=x onerror="window.evil = 1">'


def layer(name: str, error: float | None, bits: int = 4, tokens: int = 512, fallback: str | None = None) -> dict[str, Any]:
    codes = [1 + (code in (2**bits // 2, 2**bits // 2 - 1)) for code in range(2**bits)]
    return {
        "name": name,
        "bits": bits,
        "group_size": 32,
        "in_features": 64,
        "out_features": 128,
        "loss": 1.0,
        "relative_error": error,
        "tokens": tokens,
        "damp_percent": 0.1,
        "failed_attempts": 0,
        "fallback": fallback,
        "codes": codes,
        "scales": {"first_octave": -8, "counts": [0, 3, 1]},
    }


def run(**changes: Any) -> dict[str, Any]:
    """A run of two blocks, one of whose layers fell back."""
    blocks = [
        {
            "block": index,
            "resumed": False,
            "seconds": 0.5,
            "layers": [
                layer(f"model.layers.{index}.self_attn.q_proj", 0.001 * (index + 1)),
                layer(f"model.layers.{index}.mlp.down_proj", 0.1, fallback="not positive definite" if index else None),
            ],
        }
        for index in (0, 1)
    ]
    record = {
        "id": "abc-1",
        "key": "abc",
        "out": "runs/small",
        "started": "2026-01-02T03:04:05Z",
        "finished_ms": 1,
        "seconds": 5.0,
        "config": {
            "model": {"path": "models/small"},
            "quantization": {"bits": 4, "group_size": 32, "recipe": "tuned", "dataset": "a.txt"},
            "evaluation": {"seqlen": 64},
        },
        "stage_seconds": {"sweep": 3.0, "forward": 1.0},
        "peak_memory_bytes": {"host": 2_500_000_000},
        "machine": {"python": "3.11", "torch": "2.13", "gpu": None},
        "calibration_data": {"source": "a.txt", "windows": 8, "seqlen": 64, "digest": "c" * 64},
        "evaluation_data": {"source": "b.txt", "windows": 8, "seqlen": 64, "digest": "e" * 64, "file": "x"},
        "assembly": {
            "bytes": 3_000_000,
            "original_bytes": 12_000_000,
            "bits_per_weight": 4.5,
            "quantized_layers": 4,
            "lm_head": None,
            "fallback_layers": ["model.layers.1.mlp.down_proj"],
            "untuned_blocks": [1],
            "skipped": [{"name": "model.layers.0.mlp.gate", "reason": "router"}],
            "unused_source_tensors": ["extra.weight"],
            "loads": [{"consumer": "vLLM", "version": "0.33", "loads": False, "reasons": ["rules it does not read"]}],
        },
        "evaluation": {
            "original_perplexity": 20.0,
            "quantized_perplexity": 21.0,
            "kl": 0.05,
            "top1_agreement": 0.9,
            "tokens": 504,
            "windows": 8,
            "seqlen": 64,
            "digest": "e" * 64,
            "backend": "torch",
            "seconds": 1.0,
            "flips": 0.04,
            "overlap": {"share": 0.25, "ngram": 13, "positions": 400},
            "measures": [measure("choice", 0.5, 0.45, [0.8, 0.98], False), measure("easy", 0.5, 0.5, [0.9, 1.1], True)],
        },
        "evaluation_error": None,
        "allocation": None,
        "blocks": blocks,
        "prefect_flow_run_id": "f-1",
        "mlflow": None,
        "gate": {
            "passed": False,
            "measure": "kl",
            "value": 0.05,
            "checks": [{"limit": "max_kl", "limit_value": 0.01, "value": 0.05, "passed": False}],
        },
    }
    return copy.deepcopy(record) | changes


def measure(name: str, original: float, quantized: float, interval: list[float] | None, inside: bool | None) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "tasks",
        "protocol": "lm-eval, 0-shot",
        "metric": "acc",
        "higher_is_better": True,
        "original": original,
        "quantized": quantized,
        "recovery": quantized / original,
        "interval": interval,
        "inside_noise": inside,
        "lost": 3,
        "gained": 1,
        "count": 40,
        "sentence": f"{name}: told in one sentence.",
    }


def old_run() -> dict[str, Any]:
    """As records were before layers told codes and scales, and evaluations measures."""
    record = run(gate=None)
    for block in record["blocks"]:
        for one in block["layers"]:
            del one["codes"], one["scales"]
    for key in ("flips", "overlap", "measures"):
        del record["evaluation"][key]
    return record


def experts(count: int, blocks: int = 2) -> dict[str, Any]:
    """A run of a mixture whose expert 0 of block 1 saw no token."""
    names = [f"mlp.experts.{expert}.{part}" for expert in range(count) for part in ("gate_proj", "up_proj")]
    return run(
        blocks=[
            {
                "block": block,
                "resumed": False,
                "seconds": 1.0,
                "layers": [
                    layer(f"model.layers.{block}.{name}", 0.01 * (1 + place), tokens=0 if block == 1 and ".0." in name else 100 + place)
                    for place, name in enumerate(names)
                ],
            }
            for block in range(blocks)
        ]
    )


def cell(name: str, size: int | None, kl: float | None, perplexity: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "settings": {"bits": 4},
        "status": "done",
        "error": None,
        "bytes": size,
        "original_bytes": 12_000_000,
        "bits_per_weight": 4.25,
        "original_perplexity": 20.0,
        "perplexity": perplexity,
        "kl": kl,
        "agreement": 0.9,
        "seconds": 2.0,
        "gate": None,
        "fallback_layers": 0,
        "out": f"runs/s/{name}",
        "mlflow_run_id": None,
        "judged_on": "m@ e",
    } | changes


def sweep(**changes: Any) -> dict[str, Any]:
    """Six cells, five on the front, the last one failed."""
    cells = [
        cell("b4g32", 3_000_000, 0.03, 20.5),
        cell("b2g128", 1_500_000, 0.9, 40.0),
        cell("b3g32", 2_500_000, 0.12, 22.0),
        cell("b3g128", 2_200_000, 0.17, 23.0),
        cell("b2g32", 2_300_000, 0.6, 35.0),
        cell(
            "b7",
            None,
            None,
            None,
            status="invalid",
            error="bits = 7: must be 2, 3, 4 or 8",
            seconds=None,
            agreement=None,
            bits_per_weight=None,
            original_bytes=None,
        ),
    ]
    found = {
        "id": "s1",
        "mode": "exact",
        "folder": "runs/s",
        "finished": "2026-01-02T03:04:05Z",
        "seconds": 30.0,
        "computed": [],
        "measure": "kl",
        "config": {"base": {"model": {"path": "models/small"}}, "grid": {"bits": [2, 3, 4]}},
        "cells": cells,
        "front": ["b2g128", "b3g128", "b3g32", "b4g32"],
        "recommended": {"name": "b4g32", "rule": "the smallest that passes the gate", "reason": "4.250 bits per weight; 1 of 6 cells fit"},
        "registry": None,
        "mlflow": None,
        "notified": None,
    }
    return found | changes


def run_page(record: dict[str, Any]) -> Page:
    return runs.page(RunRecord.model_validate(record))


def sweep_page(record: dict[str, Any]) -> Page:
    return sweeps.page(SweepRecord.model_validate(record))


def comparison(a: dict[str, Any], b: dict[str, Any]) -> Page:
    return compare.page(RunRecord.model_validate(a), RunRecord.model_validate(b))


def blocks_of(found: list[dict[str, Any]]) -> list[Block]:
    return [Block.model_validate(block) for block in found]
