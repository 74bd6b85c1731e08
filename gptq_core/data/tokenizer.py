"""A model folder's tokenizer, and the longest window that the model allows; no weight is read."""

from __future__ import annotations

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from gptq_core.checkpoint.reader import resolve
from gptq_core.errors import InputError
from gptq_core.model.architecture import load_config


def load_tokenizer(model_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises InputError when the folder has none."""
    folder = resolve(model_path, revision)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no tokenizer that transformers can load ({str(error).splitlines()[0]})") from error


def model_limits(model_path: str, revision: str | None = None) -> int:
    """The longest window of tokens that the model allows."""
    return window_limit(load_config(resolve(model_path, revision)))


def window_limit(config: PretrainedConfig) -> int:
    """The longest window that a model of this config allows."""
    config = config.get_text_config(decoder=True)
    return next((n for n in (getattr(config, a, None) for a in ("max_position_embeddings", "n_positions", "seq_length")) if n), 1 << 20)
