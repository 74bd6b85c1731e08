"""gptq_core: quantize causal language models with GPTQ, and run what comes out."""

from gptq_core.calibration import Windows, calibration_windows, evaluation_windows
from gptq_core.checkpoint.inspection import inspect_checkpoint
from gptq_core.config import QuantizeConfig
from gptq_core.engine import Quantization
from gptq_core.errors import GPTQError
from gptq_core.evaluation import evaluate_pair
from gptq_core.linear import QuantizedLinear, load_quantized

__all__ = [
    "GPTQError",
    "Quantization",
    "QuantizeConfig",
    "QuantizedLinear",
    "Windows",
    "calibration_windows",
    "evaluate_pair",
    "evaluation_windows",
    "inspect_checkpoint",
    "load_quantized",
]
