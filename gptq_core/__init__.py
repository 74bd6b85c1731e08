"""gptq_core: quantize causal language models with GPTQ, and run what comes out.

The public names are imported when they are first used: a config is validated, or refused, without waiting for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptq_core.checkpoint.inspection import inspect_checkpoint
    from gptq_core.config import QuantizeConfig
    from gptq_core.data.windows import Windows, calibration_windows, evaluation_windows
    from gptq_core.errors import GPTQError
    from gptq_core.inference.evaluation import evaluate_pair
    from gptq_core.inference.linear import QuantizedLinear, load_quantized
    from gptq_core.quantizer import GPTQQuantizer, load_quantized_model
    from gptq_core.run.engine import Quantization
    from gptq_core.search.allocation import Allocation, allocate
    from gptq_core.search.screening import Screened, screen

_HOME = {
    "Allocation": "search.allocation",
    "GPTQError": "errors",
    "GPTQQuantizer": "quantizer",
    "Quantization": "run.engine",
    "QuantizeConfig": "config",
    "QuantizedLinear": "inference.linear",
    "Screened": "search.screening",
    "Windows": "data.windows",
    "allocate": "search.allocation",
    "calibration_windows": "data.windows",
    "evaluate_pair": "inference.evaluation",
    "evaluation_windows": "data.windows",
    "inspect_checkpoint": "checkpoint.inspection",
    "load_quantized": "inference.linear",
    "load_quantized_model": "quantizer",
    "screen": "search.screening",
}

__all__ = [
    "Allocation",
    "GPTQError",
    "GPTQQuantizer",
    "Quantization",
    "QuantizeConfig",
    "QuantizedLinear",
    "Screened",
    "Windows",
    "allocate",
    "calibration_windows",
    "evaluate_pair",
    "evaluation_windows",
    "inspect_checkpoint",
    "load_quantized",
    "load_quantized_model",
    "screen",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
