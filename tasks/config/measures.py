"""What a checkpoint is measured by beside its held-out text: the schema of `evaluation.measures`, and the presets of configs/measures."""

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
    """Perplexity of a text by the papers' protocol: documents joined with two newlines, windows side by side, mean over their targets."""

    kind: Literal["perplexity"]
    dataset: str
    """wikitext2, c4, ptb (a local file), or any .txt, .jsonl or .parquet."""
    name: str | None = None
    """What it is called in tables and in MLflow; null: the text's."""
    seqlen: Annotated[int, Field(ge=2)] = 2048
    """Tokens in a window; cut to what the model allows."""
    samples: Positive | None = None
    """At most this many windows; null: all of the text."""

    @property
    def label(self) -> str:
        return self.name or Path(self.dataset).stem


class TasksMeasure(Schema):
    """Tasks of lm-eval, zero-shot or with examples, on the checkpoint and on the original, question by question."""

    kind: Literal["tasks"]
    tasks: Annotated[list[str], Field(min_length=1)]
    """Names of tasks or groups, lm-eval's own (their data come from the hub) or those of `include`."""
    include: str | None = None
    """Folder with task YAMLs of one's own; their data files are found beside them. Functions that they name are run."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; null: as the task says."""
    limit: Positive | None = None
    """Questions of each task; null: all."""
    batch_size: Positive = 8
    """Questions in one forward."""
    seed: Annotated[int, Field(ge=0)] = 1234
    """Of the choice of examples, and of whatever else a task draws."""


Measure = Annotated[PerplexityMeasure | TasksMeasure, Field(discriminator="kind")]


def _expanded(value: Any) -> Any:
    """A list of measures in which names of presets, YAML files and texts are replaced by what they mean."""
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
        raise ValueError(f"{name!r} is no preset: {hint}known are {', '.join(known)}; or give a text, a YAML, or a measure in place")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    # a preset's own files belong to the checkout, wherever the command is called
    if path.parent == PRESETS and isinstance(found, dict):
        for key in ("include", "dataset"):
            if key in found and not Path(found[key]).exists() and (ROOT / found[key]).exists():
                found[key] = str(ROOT / found[key])
    return found


# the form of Prefect's page and its check of parameters know names too
Measures = Annotated[list[Measure], BeforeValidator(_expanded, json_schema_input_type=list[Measure | str])]
