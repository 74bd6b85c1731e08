"""The embedded default: a model and texts that travel with the project, so that the first run needs no hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.config import RunConfig, load

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "demo.yaml"


def demo_config(overrides: dict[str, Any] | None = None) -> RunConfig:
    """configs/demo.yaml, with its files found from any working directory."""
    config = load(CONFIG)
    keys = {"model.path": config.model.path, "quantization.dataset": config.quantization.dataset,
            "evaluation.dataset": config.evaluation.dataset}
    # only where the relative path does not do: it is the same on every machine
    found = {key: str(ROOT / path) for key, path in keys.items() if not Path(path).exists()}
    return load(CONFIG, {**found, **(overrides or {})})
