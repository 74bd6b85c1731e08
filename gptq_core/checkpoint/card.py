"""The model card of a checkpoint: what it is, how it was made, how to load it, and how good it is once that is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptq_core.checkpoint.writer import MANIFEST, replace_file

EVALUATION = (
    ("original_perplexity", "perplexity, original"),
    ("quantized_perplexity", "perplexity, quantized"),
    ("kl", "KL(original ‖ quantized) per token"),
    ("top1_agreement", "top-1 agreement"),
    ("flips", "positions where only one of the two is right"),
    ("tokens", "tokens judged"),
)


def render(details: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    """The card as markdown. `details` is the manifest's first record with `summary` and `model_type`."""
    config, summary, tokens = details["config"], details["summary"], details["tokens"]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [gptq, quantized]",
        "---",
        "",
        f"# {details['model_type']}, {config['bits']}-bit GPTQ",
        "",
        f"A {config['bits']}-bit GPTQ checkpoint of a {details['model_type']} model, format `{config['format']}`: "
        f"{summary['quantized_layers']} linears quantized to {summary['bits_per_weight']:.2f} bits a weight "
        "(scales, zeros and indices included), "
        f"{summary['bytes']} bytes where the original has {summary['original_bytes']}.",
        "",
        f"Calibrated on {tokens['windows']} windows of {tokens['seqlen']} tokens from {tokens['source']}.",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {key} | {_cell(value)} |" for key, value in config.items()),
        "",
        "```python",
        "from gptq_core import load_quantized",
        "",
        'model = load_quantized("path/to/this/folder")',
        "```",
        "",
    ]
    if summary.get("loads"):
        lines += ["| loads in | by its rules |", "|---|---|"]
        lines += [
            f"| {row['consumer']} {row['version']} | {_cell('no: ' + '; '.join(row['reasons']) if row['reasons'] else 'yes')} |"
            for row in summary["loads"]
        ]
        lines.append("")
    if evaluation:
        lines += ["| measured on the checkpoint as written | |", "|---|---|"]
        lines += [f"| {label} | {evaluation[key]:.6g} |" for key, label in EVALUATION if evaluation.get(key) is not None]
        for row in evaluation.get("measures", []):
            what = f"{_cell(row['name'])}, {row['metric']}, {_cell(row['protocol'])}"
            lines.append(f"| {what} | {row['quantized']:.6g} (original {row['original']:.6g}) |")
        lines.append("")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", r"\|")  # as in the expressions of dynamic


def rewrite(checkpoint: Path, evaluation: dict[str, Any] | None) -> None:
    """Render the card of a finished checkpoint again from its manifest."""
    records = [json.loads(line) for line in (checkpoint / MANIFEST).read_text().splitlines()]
    model_type = json.loads((checkpoint / "config.json").read_text())["model_type"]
    details = records[0] | {"summary": records[-1]["summary"], "model_type": model_type}
    replace_file(checkpoint / "README.md", render(details, evaluation).encode())
