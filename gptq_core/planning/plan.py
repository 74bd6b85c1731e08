"""What a run will write, from config.json and tensor headers alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptq_core.checkpoint.carried import carried_files
from gptq_core.checkpoint.inspection import DTYPE_BYTES
from gptq_core.checkpoint.packing import CODES_PER_UNIT
from gptq_core.checkpoint.reader import INDEX, PICKLES, Checkpoint
from gptq_core.config import QuantizeConfig
from gptq_core.model import architecture, selection
from gptq_core.model.architecture import Decoder
from gptq_core.model.opened import Model, OpenedModel, open_model
from gptq_core.model.selection import Selection
from gptq_core.planning.consumers import Verdict, loadability


@dataclass(frozen=True)
class Plan:
    """What a run will write. Sizes in bytes."""

    selection: Selection
    verdicts: list[Verdict]
    bits_per_weight: float
    original_bytes: int
    bytes: int
    """All shards, headers included."""
    other_bytes: int
    """The rest of the folder: the model's own small files, the index and the manifest, these to some per cent."""
    model: OpenedModel
    notes: tuple[str, ...] = ()


def plan(model: Model, config: QuantizeConfig, revision: str | None = None) -> Plan:
    """Look at a model's config.json and tensor headers, and judge. Raises InputError as `select` does; writes nothing.

    A folder with config.json and no weights does: the tensors are then those that the model would have, in the config's dtype.
    """
    opened = open_model(model, revision)
    folder, decoder = opened.folder, opened.shapes
    source: Checkpoint
    notes: tuple[str, ...] = ()
    if _only_config(folder):
        source, notes = Presumed(folder, decoder, architecture.own_dtype(opened.config)), (PRESUMED,)
        chosen = selection.select(source, decoder, config)
    else:
        source, chosen = opened.source, opened.select(config)
    weights = packed = 0
    for layer in chosen.layers.values():
        weights += layer.in_features * layer.out_features
        packed += selection.bits_on_disk(layer.in_features, layer.out_features, layer.config.bits, layer.config.group_size)
    shards = list(_shards(source, decoder, chosen))
    carried = sum((folder / path).stat().st_size for path in carried_files(folder))
    names = sum(map(len, shards))
    others = carried + 2 * BYTES_A_NAME * names + BYTES_A_LAYER * len(chosen.layers) + 4 * (folder / "config.json").stat().st_size
    verdicts = loadability(config, chosen)
    size, notes = sum(map(_file_bytes, shards)), (*notes, *chosen.notes)
    return Plan(chosen, verdicts, packed / weights, source.bytes(), size, others, opened, notes)


PRESUMED = "config.json only: shapes are the model's own, and sizes assume the dtype that it names (float32 where none)"
BYTES_A_NAME, BYTES_A_LAYER = 90, 420
"""What a tensor takes in the index and in the manifest, and what a layer's report takes."""
SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Header = tuple[str, tuple[int, ...]]
"""(dtype as safetensors spells it, shape)."""


class Presumed(Checkpoint):
    """Stands for the checkpoint of a folder that has none: the tensors of the empty model. Only their headers can be read."""

    def __init__(self, folder: Path, decoder: Decoder, dtype: torch.dtype | None) -> None:
        self.folder = folder
        tied = getattr(decoder.model, "all_tied_weights_keys", {})
        self._headers: dict[str, Header] = {
            name: (SAFETENSORS[(dtype or torch.float32) if tensor.is_floating_point() else tensor.dtype], tuple(tensor.shape))
            for name, tensor in decoder.model.state_dict().items()
            if name not in tied
        }

    def __contains__(self, name: str) -> bool:
        return name in self._headers

    def header(self, name: str) -> Header:
        return self._headers[name]

    @property
    def names(self) -> list[str]:
        return list(self._headers)

    def bytes(self) -> int:
        """Size of one shard with all tensors."""
        return _file_bytes(self._headers)


def _only_config(folder: Path) -> bool:
    weights = ("*.safetensors", INDEX, *PICKLES)
    return (folder / "config.json").is_file() and not any(True for pattern in weights for _ in folder.glob(pattern))


def _shards(source: Checkpoint, decoder: Decoder, chosen: Selection) -> Iterator[dict[str, Header]]:
    """Headers of the files that a run writes: one for each block, and one for the rest."""
    rest = dict.fromkeys(architecture.tensor_names(decoder.model))
    for index, block in enumerate(decoder.blocks):
        names = architecture.tensor_names(block, f"{decoder.prefix}.{index}")
        yield dict(_written(source, decoder, chosen, names))
        for name in names:
            rest.pop(name, None)
    yield dict(_written(source, decoder, chosen, rest))


def _written(source: Checkpoint, decoder: Decoder, chosen: Selection, names: Any) -> Iterator[tuple[str, Header]]:
    for name in names:
        found = architecture.source_name(decoder.model, name, source.__contains__)
        if found is None:  # tied to another
            continue
        owner, _, leaf = name.rpartition(".")
        layer = chosen.layers.get(owner)
        if layer and leaf == "weight":
            columns, out, bits = layer.in_features, layer.out_features, layer.config.bits
            groups = layer.config.groups_of(columns)
            yield f"{owner}.qweight", ("I32", (columns // CODES_PER_UNIT * bits, out))
            yield f"{owner}.qzeros", ("I32", (groups, out // CODES_PER_UNIT * bits))
            yield f"{owner}.scales", ("F16", (groups, out))
            yield f"{owner}.g_idx", ("I32", (columns,))
        else:
            dtype, shape = source.header(found)
            yield name, ("F16" if layer and leaf == "bias" else dtype, shape)


def _file_bytes(tensors: dict[str, Header]) -> int:
    """Size of a safetensors file: eight bytes, the header as compact JSON padded to eight, and the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + DTYPE_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + end
