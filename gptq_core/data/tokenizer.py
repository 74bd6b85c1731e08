"""A model folder's tokenizer, and the longest window that the model allows; no weight is read."""

from __future__ import annotations

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from gptq_core.errors import InputError
from gptq_core.model.opened import Model, open_model


def load_tokenizer(model: Model, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises InputError when the folder has none."""
    opened = open_model(model, revision)
    try:
        return AutoTokenizer.from_pretrained(opened.folder, config=opened.config, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{opened.folder}: no tokenizer that transformers can load ({str(error).splitlines()[0]})") from error


def model_limits(model: Model, revision: str | None = None) -> int:
    """The longest window of tokens that the model allows."""
    return window_limit(open_model(model, revision).config)


def window_limit(config: PretrainedConfig) -> int:
    """The longest window that a model of this config allows."""
    config = config.get_text_config(decoder=True)
    return next((n for n in (getattr(config, a, None) for a in ("max_position_embeddings", "n_positions", "seq_length")) if n), 1 << 20)
