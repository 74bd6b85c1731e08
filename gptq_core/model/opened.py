"""A model folder, opened once: its tensors, its config, its empty model and the selections made in it.

Whoever takes a path of a model takes an `OpenedModel` as well, so that a run which looks at its model in several places (texts, plan,
engine, evaluation) reads each file once.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from transformers import PretrainedConfig

from gptq_core.checkpoint.reader import Checkpoint, resolve
from gptq_core.config import QuantizeConfig
from gptq_core.errors import InputError
from gptq_core.model import architecture, selection
from gptq_core.model.architecture import Decoder
from gptq_core.model.selection import Selection


class OpenedModel:
    """A model folder. What is found in it is found when it is first needed, and kept. Made by `open_model`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._decoders: dict[torch.dtype, Decoder] = {}
        self._selections: dict[str, Selection] = {}

    @cached_property
    def source(self) -> Checkpoint:
        """The tensors. Raises InputError for a folder without weights that can be read."""
        return Checkpoint(self.folder)

    @cached_property
    def config(self) -> PretrainedConfig:
        """config.json, in the dtype that it names. Raises InputError as `architecture.load_config` does."""
        return architecture.load_config(self.folder)

    def require_weights(self) -> None:
        """Raise InputError for a folder without weights: a plan does without them, a run does not."""
        if not self.source.names:
            raise InputError(f"{self.folder}: its *.safetensors hold no tensors; download it again")

    def decoder(self, dtype: torch.dtype) -> Decoder:
        """The empty model in this dtype. Its users share it: one at a time fills it, and empties it again."""
        if dtype not in self._decoders:
            self._decoders[dtype] = architecture.find_decoder(architecture.empty_model(self.config, dtype))
        return self._decoders[dtype]

    @property
    def shapes(self) -> Decoder:
        """An empty model for its names and shapes, which are the same in every dtype."""
        return next(iter(self._decoders.values()), None) or self.decoder(torch.float32)

    def select(self, config: QuantizeConfig) -> Selection:
        """What `config` makes of each linear. Raises InputError as `selection.select` does."""
        key = config.model_dump_json()
        if key not in self._selections:
            self._selections[key] = selection.select(self.source, self.shapes, config)
        return self._selections[key]


Model = str | Path | OpenedModel
"""A model by its folder or hub id, or opened."""


def open_model(model: Model, revision: str | None = None) -> OpenedModel:
    """The model of a path or a hub id; one that is opened is given back. Raises InputError where there is no such folder."""
    return model if isinstance(model, OpenedModel) else OpenedModel(resolve(str(model), revision))
