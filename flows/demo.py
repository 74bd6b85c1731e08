"""Find the embedded model and texts, which are part of the project, so that the first run needs no hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.config.run import RunConfig, load, load_yaml

ROOT = Path(__file__).resolve().parents[1]
CONFIG, SWEEP = ROOT / "configs" / "demo.yaml", ROOT / "configs" / "sweep.yaml"


def demo_config(overrides: dict[str, Any] | None = None) -> RunConfig:
    """configs/demo.yaml with paths that are valid from any working directory."""
    return load(CONFIG, {**_files(), **(overrides or {})})


def demo_sweep(store: str) -> list[str]:
    """Arguments of `python -m flows` for the sweep of configs/sweep.yaml, from any working directory, tracked in `store`."""
    sweep = load_yaml(SWEEP)
    axes = [f"--grid={axis}={json.dumps(values)}" for axis, values in sweep["grid"].items()]
    files = [f"--set={key}={path}" for key, path in _files().items()]
    return ["sweep", str(CONFIG), *axes, *files, f"--set=tracking.uri={store}", "--out", sweep["dir"]]


def _files() -> dict[str, str]:
    """Full paths for the files of configs/demo.yaml whose relative paths do not exist here; those that do stay relative, which keeps the
    identity of a run the same on every machine."""
    config = load(CONFIG)
    keys = {
        "model.path": config.model.path,
        "quantization.dataset": config.quantization.dataset,
        "evaluation.dataset": config.evaluation.dataset,
    }
    return {key: str(ROOT / path) for key, path in keys.items() if isinstance(path, str) and not Path(path).exists()}
