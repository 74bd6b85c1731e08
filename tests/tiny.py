"""Tiny random models of several architectures, and helpers to quantize them quickly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from gptq_core import Quantization, QuantizeConfig, QuantizedLinear, Windows

SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "max_position_embeddings": 64}
GATED = {**SIZE, "intermediate_size": 128, "num_key_value_heads": 2}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**GATED),
    "mistral": lambda: transformers.MistralConfig(**GATED, sliding_window=16),
    "qwen3": lambda: transformers.Qwen3Config(**GATED, head_dim=16),
    "qwen2_tied_with_bias": lambda: transformers.Qwen2Config(**GATED, tie_word_embeddings=True, pad_token_id=0),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **GATED, head_dim=32, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "opt": lambda: transformers.OPTConfig(**SIZE, ffn_dim=128, word_embed_proj_dim=64),
    "bloom": lambda: transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=96),
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64),
    "mixtral": lambda: transformers.MixtralConfig(**GATED, num_local_experts=4),
}
DENSE = [name for name in CONFIGS if name not in ("gpt2", "mixtral")]


def save_model(architecture: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random model of an architecture, saved as safetensors. Biases are random too, so that losing one shows."""
    torch.manual_seed(seed)
    config = CONFIGS[architecture]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def windows(count: int = 6, seqlen: int = 32, seed: int = 1) -> Windows:
    tokens = torch.randint(0, 96, (count, seqlen), generator=torch.Generator().manual_seed(seed))
    return Windows(tokens, "random ids", count)


def quantize(model: Path, out: Path, config: QuantizeConfig, tokens: Windows | None = None) -> dict[str, Any]:
    """The whole engine on one model; the summary, with the last block's outputs under 'hidden'."""
    with Quantization.open(str(model), config, tokens or windows(), out, device="cpu") as run:
        for index in range(run.block_count):
            run.quantize_block(index)
        hidden = torch.cat(run._captured.states) if run._captured else None
        return run.assemble() | {"hidden": hidden}


def dense_twin(original: Path, quantized: torch.nn.Module) -> torch.nn.Module:
    """The original model, loaded by transformers itself, with the dequantized weights put in."""
    twin = transformers.AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    modules = dict(quantized.named_modules())
    replaced = 0
    for name, module in twin.named_modules():
        if isinstance(modules.get(name), QuantizedLinear):
            module.weight.data = modules[name].weight_in(torch.float32)
            if module.bias is not None:
                module.bias.data = module.bias.data.half().float()
            replaced += 1
    assert replaced > 0
    return twin


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits
