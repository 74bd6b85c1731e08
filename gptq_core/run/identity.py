"""The content key of a run: what decides the bytes of its result. Equal keys are equal work, which is resumed or not done again."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import gptq_core
from gptq_core.checkpoint import format
from gptq_core.checkpoint.reader import Checkpoint, file_sha256
from gptq_core.config import QuantizeConfig
from gptq_core.data.windows import Windows
from gptq_core.kernels import dispatch
from gptq_core.model import architecture
from gptq_core.model.opened import OpenedModel


@functools.cache
def code_sha256() -> str:
    """sha256 of this library's own sources: another solver is other work, whatever the version says."""
    files = sorted(path for path in Path(gptq_core.__file__).parent.rglob("*") if path.suffix in (".py", ".c"))
    return hashlib.sha256("".join(file_sha256(path) for path in files).encode()).hexdigest()


def content_key(identity: dict[str, Any]) -> str:
    """sha256 of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def identity(source: Checkpoint, config: QuantizeConfig, windows: Windows, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What decides the bytes of a result, as the first line of its manifest holds it. dtype: of the forward."""
    # the dataset is represented by the digest of its tokens, backend concerns loading only
    settings = config.model_dump(exclude={"dataset", "backend"})
    if config.dynamic:  # the first rule that matches decides, so their order counts: as pairs it does for JSON too
        settings["dynamic"] = [[rule, changes] for rule, changes in config.dynamic.items()]
    return {
        "config": settings,
        "model_sha256": source.digest(),
        "tokens_sha256": windows.digest,
        "versions": {
            "gptq_core": format.code_version(),
            "code_sha256": code_sha256(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
            "machine": platform.machine(),
            "kernels": dispatch.implementation(device, dtype),
        },
    }


def request_key(model: OpenedModel, config: QuantizeConfig, windows: Windows, *, device: str, dtype: str) -> str:
    """The content key of a run before it is opened, also of one whose widths are still to be chosen."""
    target = architecture.choose_device(device)
    chosen = architecture.choose_dtype(dtype, model.config, target)
    return content_key(identity(model.source, config, windows, target, chosen))
