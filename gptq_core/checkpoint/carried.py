"""The files of a model folder that belong to the model as much as its weights do: tokenizer, templates, processors, licences."""

from __future__ import annotations

from pathlib import Path

from gptq_core.errors import InputError

PATTERNS = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "additional_chat_templates/*.jinja",
)
"""Relative to the folder. A download from the hub fetches them with the weights."""
OWN = ("config.json", "quantize_config.json", "*.index.json", "*.py")
"""Of these, what a checkpoint has of its own, and code, which is never run and so not handed on."""


def carried_files(folder: Path) -> list[Path]:
    """Their paths relative to the folder, in order.

    Raises InputError for a link that leads out of the folder (and out of the hub's store of blobs): it could name any file of this
    machine.
    """
    found = {path.relative_to(folder) for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
    chosen = sorted(path for path in found if not any(path.match(pattern) for pattern in OWN))
    inside = [folder.resolve()]
    if folder.parent.name == "snapshots":  # models--OWNER--NAME/snapshots/REVISION links to models--OWNER--NAME/blobs
        inside.append(folder.parent.parent.resolve() / "blobs")
    for path in chosen:
        target = (folder / path).resolve()
        if not any(target.is_relative_to(place) for place in inside):
            raise InputError(f"{folder / path}: a link to {target}, outside of the model's folder; put a copy of that file in its place")
    return chosen
