"""A model folder's tokenizer, and the longest window that the model allows; no weight is read."""

from __future__ import annotations

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from gptq_core.errors import InputError, foreign_input
from gptq_core.model.opened import Model, open_model


def load_tokenizer(model: Model, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises InputError when the folder has none."""
    opened = open_model(model, revision)
    with foreign_input(f"{opened.folder}: no tokenizer that transformers can load", "put the model's own tokenizer files there"):
        return AutoTokenizer.from_pretrained(opened.folder, config=opened.config, local_files_only=True, trust_remote_code=False)


def model_limits(model: Model, revision: str | None = None) -> int:
    """The longest window of tokens that the model allows."""
    return window_limit(open_model(model, revision).config)


def window_limit(config: PretrainedConfig) -> int:
    """The longest window that a model of this config allows."""
    config = config.get_text_config(decoder=True)
    keys = ("max_position_embeddings", "n_positions", "seq_length")
    key, limit = next(((key, value) for key in keys if (value := getattr(config, key, None))), ("", 1 << 20))
    if not isinstance(limit, int) or limit < 1:
        raise InputError(f"config.json: {key} = {limit!r} (must be a number of tokens, at least 1); mend it, or download the model again")
    return limit
