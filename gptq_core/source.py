"""Where `gptq_core.data.tokenizer` used to be found; kept for code that imports it from here."""

from gptq_core.data.tokenizer import load_tokenizer, model_limits, window_limit

__all__ = ["load_tokenizer", "model_limits", "window_limit"]
