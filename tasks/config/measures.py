"""Schemas of `evaluation.measures`, and the presets of configs/measures."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field

from gptq_core.schema import Schema

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ROOT / "configs" / "measures"
TEXTS = (".txt", ".jsonl", ".parquet")
Positive = Annotated[int, Field(gt=0)]


class PerplexityMeasure(Schema):
    """Perplexity of a text as the GPTQ papers count it: documents joined by two newlines, adjacent windows, mean over all targets."""

    kind: Literal["perplexity"]
    """Kind of the measure: perplexity."""
    dataset: str
    """Text: wikitext2 or c4 from the hub, or a .txt, .jsonl or .parquet file."""
    name: str | None = None
    """Name in tables and in MLflow; null: the name of the text."""
    seqlen: Annotated[int, Field(ge=2)] = 2048
    """Tokens per window; cut to the limit of the model."""
    samples: Positive | None = None
    """Maximum number of windows, spread evenly over the text; null: all."""

    @property
    def label(self) -> str:
        return self.name or Path(self.dataset).stem


class TasksMeasure(Schema):
    """Tasks of lm-eval, run on the checkpoint and on the original and compared question by question."""

    kind: Literal["tasks"]
    """Kind of the measure: tasks."""
    tasks: Annotated[list[str], Field(min_length=1)]
    """Names of tasks or groups: lm-eval's own, whose data come from the hub, or those of include."""
    include: str | None = None
    """Folder with your own task YAMLs, their data files beside them; null: none. Python functions that the YAMLs name are executed."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; null: as the task defines."""
    limit: Positive | None = None
    """Maximum number of questions per task; null: all."""
    batch_size: Positive = 8
    """Questions per forward pass."""
    seed: Annotated[int, Field(ge=0)] = 1234
    """Seed for the choice of examples and other random draws of a task."""


Measure = Annotated[PerplexityMeasure | TasksMeasure, Field(discriminator="kind")]


def _expanded(value: Any) -> Any:
    """Replace names of presets, YAML files and texts in a list of measures by the measures that they stand for."""
    if not isinstance(value, list):
        return value
    return [_preset(entry) if isinstance(entry, str) else entry for entry in value]


def _preset(name: str) -> Any:
    if name.endswith(TEXTS):
        return {"kind": "perplexity", "dataset": name}
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    known = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if not path.is_file():
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"{name!r} is not a preset: {hint}known presets are {', '.join(known)}; or give a text file, a YAML file, or a measure in place"
        )
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    # paths in a preset are relative to the checkout, wherever the command is called
    if path.parent == PRESETS and isinstance(found, dict):
        for key in ("include", "dataset"):
            if key in found and not Path(found[key]).exists() and (ROOT / found[key]).exists():
                found[key] = str(ROOT / found[key])
    return found


# the JSON schema, and with it Prefect's form and parameter check, accepts names too
Measures = Annotated[list[Measure], BeforeValidator(_expanded, json_schema_input_type=list[Measure | str])]
