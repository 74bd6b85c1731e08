"""GPTQQuantizer: Optimum's constructor and methods on top of the engine. A user of Optimum changes one import.

    from gptq_core import GPTQQuantizer

    quantizer = GPTQQuantizer(bits=4, dataset="wikitext2")
    model = quantizer.quantize_model(model, tokenizer)
    quantizer.save(model, "folder")

Differences from Optimum 2.3 are repairs: group_size -1 and desc_act=True work with everything else at its default, both JSON
files agree, and what was used (windows, tokens, digest) is in the manifest beside the weights.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from gptq_core import backends
from gptq_core.architecture import choose_device
from gptq_core.calibration import Windows, calibration_windows
from gptq_core.checkpoint.format import quantization_config, read_quantization_config
from gptq_core.config import QuantizeConfig, explain
from gptq_core.engine import Quantization
from gptq_core.errors import InputError
from gptq_core.linear import QuantizedLinear, load_quantized
from gptq_core.source import window_limit

SAMPLES = 128
"""Windows drawn from a text, as in Optimum and the paper."""
LONGEST_WINDOW = 2048
"""Default of model_seqlen where the model allows more, as in the paper: 128k tokens a window would not fit most machines."""
KEYS_PASSED_OVER = {"quant_method", "checkpoint_format", "pack_dtype", "lm_head", "static_groups", "tokenizer", "max_input_length"}
"""Keys of a written quantization_config and of transformers' GPTQConfig that the constructor does not take."""


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
        damp_percent: float = 0.1,
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
        fields = dict(recipe=recipe, bits=bits, group_size=group_size, damp_percent=damp_percent, desc_act=desc_act, sym=sym,
                      true_sequential=true_sequential, modules_in_block_to_quantize=modules_in_block_to_quantize,
                      format=format, backend=backend)  # fmt: skip
        if not (desc_act and act_group_aware):
            # Optimum's default for both is a pair that excludes itself: there, as here, desc_act wins
            fields["act_group_aware"] = act_group_aware
        try:
            self.config = QuantizeConfig(**fields)
        except ValidationError as error:
            raise InputError(explain(error)) from error
        if model_seqlen is not None and model_seqlen < 1:
            raise InputError(f"model_seqlen = {model_seqlen}: must be at least 1 token")
        self.dataset, self.model_seqlen, self.meta = dataset, model_seqlen, meta
        self._work: tempfile.TemporaryDirectory[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The dict of both JSON files, and the dataset where it is a name."""
        found = quantization_config(self.config)
        found["modules_in_block_to_quantize"] = self.config.modules_in_block_to_quantize
        if self.meta:
            found["meta"] = found["meta"] | self.meta
        return found | {"dataset": self.dataset if isinstance(self.dataset, str) else None}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> GPTQQuantizer:
        """The quantizer of a dict such as `to_dict` gives, a checkpoint holds, or transformers' GPTQConfig gives."""
        if config_dict.get("lm_head"):
            raise InputError("lm_head = true: this class leaves the head alone; use QuantizeConfig(lm_head=True) with Quantization")
        return cls(**{key: value for key, value in config_dict.items() if key not in KEYS_PASSED_OVER})

    def quantize_model(self, model: PreTrainedModel, tokenizer: Any = None) -> PreTrainedModel:
        """Quantize `model` in place and return it. tokenizer: an object, a folder, or a hub id; not needed for tokenized data.

        The weights pass through a folder of their own on disk (the size of the model), because the engine streams them. With a
        `backend` of GPTQModel its kernel runs the result, in the model's dtype; InputError before any work where it cannot.
        """
        if isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if getattr(model.config, "quantization_config", None):
            raise InputError(f"{type(model).__name__}: this model is already quantized; give the original")
        windows = self._windows(model, tokenizer)
        self._work = tempfile.TemporaryDirectory(prefix="gptq-")
        source, out = Path(self._work.name) / "source", Path(self._work.name) / "quantized"
        model.save_pretrained(source)
        if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(source)
        with Quantization.open(str(source), self.config, windows, out, device=str(model.device)) as run:
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
        return model.eval()

    def save(self, model: nn.Module, save_dir: str, max_shard_size: str = "10GB", safe_serialization: bool = True) -> None:
        """Write the checkpoint that `quantize_model` made. max_shard_size has no effect: a decoder block is a shard.

        Raises InputError when nothing was quantized, when save_dir holds something, or for pickle (safe_serialization=False).
        """
        if not safe_serialization:
            raise InputError("safe_serialization = False: only safetensors are written; leave it out")
        if self._work is None or not getattr(getattr(model, "config", None), "quantization_config", None):
            raise InputError("nothing to save: call quantize_model on this quantizer first, and save the model that it returned")
        target = Path(save_dir)
        if target.exists() and any(target.iterdir()):
            raise InputError(f"save_dir = {save_dir!r} already holds something; choose another folder")
        shutil.copytree(Path(self._work.name) / "quantized", target, dirs_exist_ok=True)

    def _windows(self, model: PreTrainedModel, tokenizer: Any) -> Windows:
        dataset = self.dataset
        if isinstance(dataset, list) and dataset and not isinstance(dataset[0], str):
            dataset = [_ids(example) for example in dataset]
        elif tokenizer is None:
            raise InputError("tokenizer = None: a tokenizer is needed unless the dataset is tokenized")
        seqlen = self.model_seqlen or min(window_limit(model.config), LONGEST_WINDOW)
        if isinstance(dataset, list) and dataset:
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

    device_map: a device, as itself or as {"": device}; None, "auto", "balanced" and "sequential" are the first GPU, or the CPU where
    there is none. The model goes there whole, so what would part it has no effect: max_memory, no_split_module_classes and the
    offload arguments; a map over several devices raises InputError. The files are found by their kind: quant_config_name and
    state_dict_name have no effect. backend: as in `load_quantized`, and so is what it raises; 'torch' is this library here, and
    GPTQModel's torch kernel is 'gptq_torch'.
    """
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if isinstance(device_map, dict):
        raise InputError(f"device_map = {device_map!r}: a model is loaded onto one device; name it")
    if device_map in (None, "auto", "balanced", "balanced_low_0", "sequential"):
        device_map = choose_device("auto")
    return load_quantized(save_folder, device=device_map, backend=backend)


def _ids(example: Any) -> list[int]:
    """Token ids of one tokenized example, padding removed by its attention mask."""
    if isinstance(example, list):
        return example
    ids = torch.as_tensor(example["input_ids"]).flatten()
    mask = example.get("attention_mask")
    return (ids if mask is None else ids[torch.as_tensor(mask).flatten().bool()]).tolist()
