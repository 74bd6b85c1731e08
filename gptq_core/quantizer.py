"""GPTQQuantizer: Optimum's constructor and methods on top of the engine. A user of Optimum changes one import.

    from gptq_core import GPTQQuantizer

    quantizer = GPTQQuantizer(bits=4, dataset="wikitext2")
    model = quantizer.quantize_model(model, tokenizer)
    quantizer.save(model, "folder")

Differences from Optimum 2.3 are repairs: group_size -1 and desc_act=True work with everything else at its default, both JSON
files agree, and what was used (windows, tokens, digest) is in the manifest beside the weights.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from gptq_core.checkpoint.format import LEAVES, layout, quantization_config, read_quantization_config, with_meta
from gptq_core.checkpoint.reader import Checkpoint
from gptq_core.config import RECIPES, QuantizeConfig
from gptq_core.data.tokenizer import window_limit
from gptq_core.data.windows import Windows, calibration_windows
from gptq_core.errors import InputError
from gptq_core.inference import backends
from gptq_core.inference.linear import QuantizedLinear, load_quantized
from gptq_core.run.engine import Quantization
from gptq_core.schema import explain

SAMPLES = 128
"""Windows drawn from a text, as in Optimum and the paper."""
LONGEST_WINDOW = 2048
"""Default of model_seqlen where the model allows more, as in the paper: 128k tokens a window would not fit most machines."""
KEYS_PASSED_OVER = {
    "quant_method",
    "method",
    "checkpoint_format",
    "pack_dtype",
    "lm_head",
    "tokenizer",
    "max_input_length",
    "use_cuda_fp16",
    "use_exllama",
    "disable_exllama",
    "exllama_config",
    "damp_auto_increment",
    "model_name_or_path",
    "model_file_base_name",
    "is_marlin_format",
}
"""Keys of a written quantization_config and of transformers' GPTQConfig that the constructor does not take and that change no result."""
KEYS_IN_META = ("damp_percent", "act_group_aware", "static_groups", "true_sequential")
"""Options that GPTQModel writes under meta."""
WRITERS = ("gptq-pipeline:", "gptqmodel:", "optimum:")
"""Tags under meta.quantizer of who made a checkpoint."""
DATASET = "give 'wikitext2', 'c4', a .txt, .jsonl or .parquet file, a list of texts, or a list of tokenized examples"


@dataclass(frozen=True)
class Work:
    """What quantizing a model left behind: its checkpoint, and the modules that were put into it."""

    folder: tempfile.TemporaryDirectory[str]
    packed: dict[str, nn.Module]

    @property
    def checkpoint(self) -> Path:
        return Path(self.folder.name) / "quantized"

    def changed(self, model: nn.Module) -> str | None:
        """The first packed linear of the model that is not the one in the checkpoint. A kernel's own layout is not looked into."""
        source, there = Checkpoint(self.checkpoint), dict(model.named_modules())
        for name, module in self.packed.items():
            if there.get(name) is not module:
                return name
            leaves = LEAVES if isinstance(module, QuantizedLinear) else ()
            if any(not torch.equal(getattr(module, leaf).cpu(), source.read(f"{name}.{leaf}")) for leaf in leaves):
                return name
        return None


class GPTQQuantizer:
    """Quantize a model object. Arguments are Optimum's, and recipe: 'classic' computes what Optimum does, 'tuned', 'best' and 'max'
    come nearer to the original at equal bits, in the same files.

    Accepted and without effect, because the engine finds out by itself: block_name_to_quantize,
    module_name_preceding_first_block, batch_size, pad_token_id, cache_block_outputs. An unknown argument is a TypeError, a value
    that the schema refuses an InputError.
    """

    def __init__(
        self,
        bits: int,
        dataset: Any = None,
        group_size: int = 128,
        damp_percent: float | str = 0.1,
        desc_act: bool = False,
        act_group_aware: bool = True,
        sym: bool = True,
        true_sequential: bool = True,
        model_seqlen: int | None = None,
        block_name_to_quantize: str | None = None,
        module_name_preceding_first_block: list[str] | None = None,
        batch_size: int = 1,
        pad_token_id: int | None = None,
        cache_block_outputs: bool | None = True,
        modules_in_block_to_quantize: list[list[str]] | None = None,
        format: str = "gptq",
        meta: dict[str, Any] | None = None,
        backend: str | None = None,
        recipe: str = "classic",
    ) -> None:
        fields = dict(
            recipe=recipe,
            bits=bits,
            group_size=group_size,
            damp_percent=damp_percent,
            desc_act=desc_act,
            sym=sym,
            true_sequential=true_sequential,
            modules_in_block_to_quantize=modules_in_block_to_quantize,
            format=format,
            backend=backend,
        )
        if not (desc_act and act_group_aware):
            # Optimum's default for both is a pair that excludes itself: there, as here, desc_act wins
            fields["act_group_aware"] = act_group_aware
        self.config = _config(fields)
        if model_seqlen is not None and (type(model_seqlen) is not int or model_seqlen < 1):
            raise InputError(f"model_seqlen = {model_seqlen!r}: must be a whole number of tokens, at least 1")
        self.dataset, self.model_seqlen, self.meta = dataset, model_seqlen, _plain(meta)
        self._work: WeakKeyDictionary[nn.Module, Work] = WeakKeyDictionary()

    def to_dict(self) -> dict[str, Any]:
        """The dict of both JSON files, the backend, and the dataset where it is a name."""
        found = with_meta(quantization_config(self.config), self.meta)
        found["modules_in_block_to_quantize"] = self.config.modules_in_block_to_quantize
        return found | {"backend": self.config.backend, "dataset": self.dataset if isinstance(self.dataset, str) else None}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> GPTQQuantizer:
        """The quantizer of a dict such as `to_dict` gives, a checkpoint holds, or transformers' GPTQConfig gives.

        Its own entries under meta stay, the tag of who made that checkpoint does not. Raises InputError for another method than
        gptq, for rules (dynamic) and for a quantized head; TypeError for an unknown key.
        """
        method = config_dict.get("quant_method") or config_dict.get("method") or "gptq"
        if method != "gptq":
            raise InputError(f"quant_method = {method!r}: only gptq is computed here; leave it out to quantize by gptq")
        if config_dict.get("lm_head"):
            raise InputError("lm_head = true: this class leaves the head alone; use QuantizeConfig(lm_head=True) with Quantization")
        if not _said_by_modules(config_dict):
            raise InputError(
                f"dynamic = {_short(config_dict['dynamic'])}: this class has no rules for single linears; "
                "use QuantizeConfig(dynamic=...) with Quantization, or leave it out"
            )
        meta = dict(config_dict.get("meta") or {})
        fields = {key: meta[key] for key in KEYS_IN_META if meta.get(key) is not None} | config_dict
        fields = {key: value for key, value in fields.items() if key not in KEYS_PASSED_OVER | {"dynamic", "meta"} and value is not None}
        fields["format"] = layout(config_dict)
        static_groups = fields.pop("static_groups", None)
        tags = meta.pop("quantizer", None) or []
        tags = tags if isinstance(tags, list) else [tags]
        if meta.get("recipe") in list(RECIPES):  # written by this library, which leaves out damp_percent where it is no number
            fields = {"damp_percent": "auto", "recipe": meta.pop("recipe")} | fields
        own = [tag for tag in tags if not str(tag).startswith(WRITERS)]
        meta |= {"quantizer": own} if own else {}
        meta.pop("offload_to_disk_path", None)  # a folder of the machine where GPTQModel worked
        made = cls(**fields, meta=meta or None)
        if static_groups is not None:
            chosen = made.config.model_dump(include=made.config.model_fields_set)
            made.config = _config(chosen | {"static_groups": static_groups})
        return made

    def quantize_model(self, model: PreTrainedModel, tokenizer: Any = None) -> PreTrainedModel:
        """Quantize `model` in place and return it. tokenizer: an object, a folder, or a hub id; not needed for tokenized data.

        The weights pass through a folder of their own on disk (the size of the model), because the engine streams them; the result
        stays there for `save` as long as the model and this object live. With a `backend` of GPTQModel its kernel runs the result, in
        the model's dtype; InputError before any work where it cannot.
        """
        if isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if getattr(model.config, "quantization_config", None):
            raise InputError(f"{type(model).__name__}: this model is already quantized; give the original")
        windows = self._windows(model, tokenizer)
        work = Work(tempfile.TemporaryDirectory(prefix="gptq-"), {})
        source, out = Path(work.folder.name) / "source", work.checkpoint
        model.save_pretrained(source)
        if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(source)
        with Quantization.open(str(source), self.config, windows, out, device=str(model.device), meta=self.meta) as run:
            kernel = run.kernel(model.dtype)
            for index in range(run.block_count):
                run.quantize_block(index)
            run.assemble()
        shutil.rmtree(source)
        quantized = load_quantized(out, dtype=model.dtype, device=model.device)
        packed = {name: module for name, module in quantized.named_modules() if isinstance(module, QuantizedLinear)}
        for name, module in packed.items():
            model.set_submodule(name, module)
        if kernel:
            backends.put_in(model, packed, kernel)
        model.config.quantization_config = read_quantization_config(out)
        work.packed.update((name, model.get_submodule(name)) for name in packed)
        self._work[model] = work
        model.eval()
        return model

    def save(self, model: nn.Module, save_dir: str, max_shard_size: str = "10GB", safe_serialization: bool = True) -> None:
        """Write the checkpoint that `quantize_model` made of this model. max_shard_size has no effect: a decoder block is a shard.

        Raises InputError for a model that this quantizer did not quantize, or whose packed linears were changed since, when save_dir
        holds something or cannot be made, and for pickle (safe_serialization=False).
        """
        if not safe_serialization:
            raise InputError("safe_serialization = False: only safetensors are written; leave it out")
        work = self._work.get(model) if isinstance(model, nn.Module) else None
        if work is None:
            raise InputError(
                f"model = {type(model).__name__}: nothing to save, this quantizer has not quantized this model; "
                "call its quantize_model first, and save the model that it returned"
            )
        if (name := work.changed(model)) is not None:
            raise InputError(
                f"model = {type(model).__name__}: {name} is not as quantize_model left it, and only that can be saved; "
                "save before changing the model, or quantize the original again"
            )
        target = Path(save_dir)
        try:
            target.mkdir(parents=True, exist_ok=True)
            filled = any(target.iterdir())
        except OSError as error:
            raise InputError(f"save_dir = {str(save_dir)!r}: no folder can be made there ({error.strerror}); choose another") from error
        if filled:
            raise InputError(f"save_dir = {str(save_dir)!r} already holds something; choose another folder")
        shutil.copytree(work.checkpoint, target, dirs_exist_ok=True)

    def _windows(self, model: PreTrainedModel, tokenizer: Any) -> Windows:
        dataset = self.dataset
        if not isinstance(dataset, str | list) or not dataset:
            raise InputError(f"dataset = {_short(dataset)}: a calibration dataset is needed; {DATASET}")
        if isinstance(dataset, list) and not all(isinstance(example, str) for example in dataset):
            dataset = [_ids(example, index) for index, example in enumerate(dataset)]
        elif tokenizer is None:
            raise InputError("tokenizer = None: a tokenizer is needed unless the dataset is tokenized; give the model's own")
        seqlen = self.model_seqlen or min(window_limit(model.config), LONGEST_WINDOW)
        if isinstance(dataset, list):
            # a few short examples, as in the documentation, are one window as long as they are together
            rows = dataset if isinstance(dataset[0], list) else tokenizer(dataset, verbose=False)["input_ids"]
            seqlen = min(seqlen, sum(map(len, rows)))
        return calibration_windows(dataset, tokenizer, SAMPLES, max(seqlen, 1), 0)


def load_quantized_model(
    model: nn.Module | None,
    save_folder: str,
    backend: str | None = None,
    quant_config_name: str = "quantize_config.json",
    state_dict_name: str | None = None,
    device_map: Any = None,
    max_memory: dict[Any, Any] | None = None,
    no_split_module_classes: list[str] | None = None,
    offload_folder: str | None = None,
    offload_buffers: bool | None = None,
    offload_state_dict: bool = False,
) -> PreTrainedModel:
    """Optimum's loader: the model of a checkpoint folder. `model`, an empty one there, is not needed and may be None.

    device_map: a device as in `load_quantized`, as itself or as {"": device}; None, "auto", "balanced" and "sequential" are the first
    GPU, or the CPU where there is none. The model goes there whole, so what would part it has no effect: max_memory,
    no_split_module_classes and the offload arguments; a map over several devices raises InputError. The files are found by their
    kind: quant_config_name and state_dict_name have no effect. backend: as in `load_quantized`, and so is what it raises; 'torch' is
    this library here, and GPTQModel's torch kernel is 'gptq_torch'.
    """
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if isinstance(device_map, dict):
        raise InputError(f"device_map = {device_map!r}: a model is loaded onto one device; name it")
    if device_map in (None, "auto", "balanced", "balanced_low_0", "sequential"):
        device_map = "auto"
    return load_quantized(save_folder, device=device_map, backend=backend)


def _config(fields: dict[str, Any]) -> QuantizeConfig:
    try:
        return QuantizeConfig(**fields)
    except ValidationError as error:
        raise InputError(explain(error)) from error


def _plain(meta: Any) -> dict[str, Any] | None:
    """`meta` as JSON would give it back."""
    try:
        found = json.loads(json.dumps(meta))
    except (TypeError, ValueError) as error:
        raise InputError(f"meta = {_short(meta)}: must be what JSON can hold ({error})") from error
    if not isinstance(found, dict | None):
        raise InputError(f"meta = {_short(meta)}: must be a dict, such as {{'quantizer': ['name:version']}}")
    return found


def _said_by_modules(config_dict: dict[str, Any]) -> bool:
    """Whether `dynamic` says no more than modules_in_block_to_quantize does, as where this library left linears out by name."""
    named = config_dict.get("modules_in_block_to_quantize") is not None
    return all(
        named and (rule.startswith("-:") or changes.items() <= config_dict.items())
        for rule, changes in (config_dict.get("dynamic") or {}).items()
    )


def _ids(example: Any, index: int) -> list[int]:
    """Token ids of one tokenized example, padding removed by its attention mask."""
    fields = example if isinstance(example, Mapping) else {"input_ids": example}
    try:
        ids, mask = torch.as_tensor(fields["input_ids"]), fields.get("attention_mask")
        whole = not ids.is_floating_point() and ids.dtype != torch.bool
        if ids.dim() and (whole or not ids.numel()):  # an empty list is floating
            ids = ids.flatten()
            return (ids if mask is None else ids[torch.as_tensor(mask).flatten().bool()]).tolist()
        reason = "not a row of whole numbers"
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
    raise InputError(
        f"dataset[{index}] = {_short(example)}: not a tokenized example ({reason}); {DATASET}, each a dict with input_ids "
        "or a row of token ids"
    )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) < 80 else shown[:77] + "..."
