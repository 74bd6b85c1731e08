"""Records made by hand, the size of real ones, and all that an MLflow store tells of what was logged from them."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from tasks.config.run import RunConfig, from_dict
from tasks.outcome.gate import judge
from tasks.outcome.machine import machine, source
from tasks.outcome.record import RunRecord, SweepRecord

DAY = 1_700_000_000_000


def make_config(folder: Path, name: str = "out", uri: str = "env:GPTQ_STORE", bits: int = 4, **sections: Any) -> RunConfig:
    """Of a run in `folder`/`name`, whose store stands in the environment: so the same config can be logged to several."""
    out = folder / name
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.jsonl").write_text(f'{{"kind": "{name}"}}\n')
    tracking = {"uri": uri, "experiment": "e", "outbox": str(folder / "outbox")} | sections.pop("tracking", {})
    return from_dict(
        {
            "model": {"path": "models/llama"},
            "quantization": {"bits": bits, "dataset": "t.txt"},
            "output": {"dir": str(out)},
            "tracking": tracking,
            **sections,
        }
    )


def make_record(config: RunConfig, kl: float = 0.25, **changes: Any) -> RunRecord:
    """As tasks.run.compute leaves it on disk."""

    def layer(block: int, name: str, error: float | None) -> dict[str, Any]:
        return {"name": f"model.layers.{block}.{name}", "loss": 1.5 + block, "relative_error": error, "tokens": 64 + block, "bits": 4}

    data = {"file": "f", "digest": "d" * 64, "source": "t.txt", "windows": 2, "seqlen": 8, "total_windows": 9}
    measures = [
        {
            "name": "arc_easy",
            "kind": "tasks",
            "protocol": "lm-eval",
            "metric": "acc",
            "higher_is_better": True,
            "original": 0.5,
            "quantized": 0.25,
            "recovery": 0.5,
            "interval": [0.375, 0.625],
            "inside_noise": False,
            "lost": 3,
            "gained": 1,
            "count": 8,
            "sentence": "worse",
        },
        {
            "name": "wikitext2",
            "kind": "perplexity",
            "protocol": "papers",
            "metric": "perplexity",
            "higher_is_better": False,
            "original": 4.0,
            "quantized": 5.0,
            "recovery": 0.8,
            "interval": None,
            "inside_noise": None,
            "lost": None,
            "gained": None,
            "count": 2,
            "sentence": "worse",
        },
    ]
    key = hashlib.sha256(config.out.name.encode()).hexdigest()
    record = RunRecord.model_validate(
        {
            "id": f"{key[:12]}-{uuid.uuid4().hex[:12]}",
            "key": key,
            "config": config.model_dump(mode="json"),
            "out": str(config.out),
            "machine": machine(),
            "source": source(),
            "started": "2023-11-14T22:13:10Z",
            "finished_ms": DAY,
            "seconds": 3.0,
            "stage_seconds": {"forward": 1.0},
            "peak_memory_bytes": {"host": 5},
            "calibration_data": data,
            "evaluation_data": data | {"digest": "e" * 64, "source": "h.txt"},
            "prefect_flow_run_id": "p",
            "model_digest": "m" * 64,
            "device": "cpu",
            "kernels": "c",
            "system": {
                "interval_seconds": 1.0,
                "times_ms": [DAY - 2000, DAY - 1000],
                "metrics": {"cpu_utilization_percentage": [50.0, None], "system_memory_usage_megabytes": [1.0, 2.0]},
            },
            "assembly": {
                "bytes": 10,
                "original_bytes": 40,
                "bits_per_weight": 4.2,
                "quantized_layers": 4,
                "fallback_layers": [],
                "skipped": [],
            },
            "evaluation": {
                "original_perplexity": 2.0,
                "quantized_perplexity": 2.5,
                "kl": kl,
                "top1_agreement": None,
                "digest": "e" * 64,
                "flips": 0.125,
                "overlap": {"share": 0.5, "ngram": 13, "positions": 9},
                "measures": measures,
            },
            "blocks": [{"block": b, "seconds": 0.5, "layers": [layer(b, "attn.q", 0.1 + b), layer(b, "mlp.up", None)]} for b in range(2)],
        }
        | changes
    )
    record.gate = judge(config.gate, record.evaluation, record.assembly) if config.gate else None
    return record


def make_sweep(folder: Path, cells: dict[str, RunRecord], model: str = "llama", **changes: Any) -> SweepRecord:
    """A sweep of cells by name, each with its record; the first is recommended."""
    head = {"id": f"sweep-{folder.name}", "folder": str(folder), "mode": "exact", "started_ms": DAY - 60_000, "model": model}
    rows = []
    for name, record in cells.items():
        record.sweep = head | {"cell": name}
        rows.append(
            {
                "name": name,
                "status": "done",
                "error": None,
                "out": record.out,
                "bytes": 10,
                "bits_per_weight": 4.2,
                "perplexity": record.evaluation.quantized_perplexity,
                "kl": record.evaluation.kl,
                "mlflow_run_id": None,
            }
        )
    first = next(iter(cells))
    found = head | {
        "config": {"grid": {"bits": [3, 4]}},
        "source": source(),
        "machine": machine(),
        "finished": "2023-11-14T22:13:20Z",
        "seconds": 60.0,
        "computed": list(cells),
        "measure": "kl",
        "cells": rows,
        "front": [first],
        "recommended": {"name": first, "rule": "best_within_size", "reason": "r"},
        "registry": None,
        "mlflow": None,
        "notified": None,
        **changes,
    }
    return SweepRecord.model_validate(found)


def dump(address: str, experiment: str = "e") -> dict[str, Any]:
    """Every run with its status, times, params, tags, metric histories, inputs and artifacts, and every version; by our own ids."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    client = MlflowClient(tracking_uri=address)
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id]) if found else []
    names = {run.info.run_id: run.data.tags.get("gptq.run") or run.data.tags["gptq.sweep_id"] for run in runs}
    assert len(set(names.values())) == len(runs), "a run is there twice"

    def ours(text: str) -> str:
        for run_id, name in names.items():
            text = text.replace(run_id, name)
        return text

    told: dict[str, Any] = {names[run.info.run_id]: _run(client, run, ours) for run in runs}
    for version in client.search_model_versions():
        tags = {key: value for key, value in version.tags.items() if not key.startswith("gptq.alias.")}  # times of the registry's own
        held = sorted(client.get_model_version(version.name, version.version).aliases)
        told[f"{version.name} {version.version}"] = (names[version.run_id], ours(version.source), tags, held)
    return told


def _run(client: MlflowClient, run: Any, ours: Any) -> dict[str, Any]:
    run_id = run.info.run_id
    histories = {
        key: sorted((point.step, point.timestamp, point.value) for point in client.get_metric_history(run_id, key))
        for key in run.data.metrics
    }
    artifacts = {
        item.path: ours(Path(client.download_artifacts(run_id, item.path)).read_bytes().decode("latin-1"))
        for item in client.list_artifacts(run_id)
    }
    inputs = sorted(
        (each.dataset.name, each.dataset.digest, each.dataset.profile, [(tag.key, tag.value) for tag in each.tags])
        for each in run.inputs.dataset_inputs
    )
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "start": run.info.start_time,
        "end": run.info.end_time,
        "params": run.data.params,
        "tags": {key: ours(value) for key, value in run.data.tags.items()},
        "metrics": histories,
        "inputs": inputs,
        "artifacts": artifacts,
    }
