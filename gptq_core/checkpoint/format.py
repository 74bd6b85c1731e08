"""The JSON of a GPTQ checkpoint, and the tensors of one packed linear.

The same dict goes into `config.json["quantization_config"]` and into `quantize_config.json`: readers differ in which of the
two they take first. The keys are those that vLLM, SGLang, transformers and GPTQModel read; ours beyond them go under `meta`.
The calibration dataset is left out: transformers raises on a name it does not know, and a path would leak a folder.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from gptq_core.checkpoint.packing import CODES_PER_UNIT, pack, pack_zeros
from gptq_core.config import QuantizeConfig
from gptq_core.errors import InputError

LEAVES = ("qweight", "qzeros", "scales", "g_idx")

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Linears that vLLM and SGLang run as one, by the name of the whole."""


def code_version() -> str:
    try:
        return version("gptq-pipeline")
    except PackageNotFoundError:  # run from a checkout on a machine where it was not installed
        return "0.1.0"


def quantization_config(
    config: QuantizeConfig, modules: list[str] | None = None, rules: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The dict of both JSON files. `modules`: names inside a block that were quantized, given only when some were left out;
    `rules`: `dynamic` as readers need it."""
    found: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": config.desc_act,
        "sym": config.sym,
        "lm_head": config.lm_head,
        "true_sequential": config.true_sequential,
        "act_group_aware": config.act_group_aware,
        "static_groups": config.static_groups,
        "format": config.format,
        "checkpoint_format": config.format,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"gptq-pipeline:{code_version()}"], "recipe": config.recipe},
    }
    if config.damp_percent != "auto":  # readers want a number; what auto came to stands in the manifest, layer by layer
        found["damp_percent"] = config.damp_percent
    if modules is not None:
        found["modules_in_block_to_quantize"] = [[name] for name in modules]
    if rules:
        found["dynamic"] = rules
    return found


def with_meta(quantization: dict[str, Any], meta: dict[str, Any] | None) -> dict[str, Any]:
    """The dict with a user's `meta` over the entries that are written by themselves; the recipe is that of the work."""
    own = quantization["meta"]
    return quantization | {"meta": own | (meta or {}) | {"recipe": own["recipe"]}}


def read_quantization_config(folder: Path) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint, from either file. Raises InputError when it is not a GPTQ checkpoint."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json; give the folder of a quantized checkpoint")
    try:
        found: dict[str, Any] | None = json.loads(path.read_text()).get("quantization_config")
        if found is None and (folder / "quantize_config.json").is_file():
            found = json.loads((folder / "quantize_config.json").read_text())
    except (ValueError, AttributeError) as error:
        raise InputError(f"{folder}: its JSON cannot be read ({error}); download it again") from error
    if found is None or found.get("quant_method", "gptq") != "gptq":
        raise InputError(f"{folder}: not a GPTQ checkpoint (quant_method is {found and found.get('quant_method')!r})")
    return found


def layout(quantization: dict[str, Any]) -> str:
    """'gptq' or 'gptq_v2', under whichever key the writer put it; without one it is the older layout."""
    return quantization.get("checkpoint_format") or quantization.get("format") or "gptq"


def packed_tensors(name: str, codes: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor, config: QuantizeConfig) -> dict[str, Tensor]:
    """The four tensors of a quantized linear under their names on disk. codes (in, out), scales and zeros (groups, out)."""
    return {
        f"{name}.qweight": pack(codes, config.bits),
        f"{name}.qzeros": pack_zeros(zeros, config.bits, config.format),
        f"{name}.scales": scales,
        f"{name}.g_idx": g_idx,
    }


def why_not_packable(in_features: int, out_features: int, group_size: int) -> str | None:
    """The reason why a linear of this size cannot be stored in the format, or None."""
    if in_features % CODES_PER_UNIT or out_features % CODES_PER_UNIT:
        return f"in {in_features} and out {out_features} must be multiples of {CODES_PER_UNIT}"
    if group_size != -1 and in_features % group_size:
        return f"group_size {group_size} does not divide in {in_features}"
    return None
