"""Llama-shaped models with random weights, written shard by shard, so that none needs a hub and a large one little memory; and
one run of the engine over a model folder, timed."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from floors import Rates, floors, stage_records
from safetensors.torch import save_file

from gptq_core import Quantization, QuantizeConfig, Windows
from gptq_core.model import architecture

_LLAMA_3 = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "dtype": "bfloat16", "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        **_LLAMA_3,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "1b": {
        **_LLAMA_3,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "small": {
        **_LLAMA_3,
        "vocab_size": 1024,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "tiny": {
        **_LLAMA_3,
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
"""Llama-3-8B, Llama-3.2-1B, and two for the CPU."""
SPREAD = 0.02
"""Standard deviation of the weights, as transformers initializes them."""
SHARD_BYTES = 5 * 10**9
"""As large models are given out; a shard is digested by one thread."""
WRITERS = 2
"""Shards in memory at once, on their way to their files."""


def write_llama(folder: Path, shape: dict[str, Any], device: torch.device) -> int:
    """A model of a shape in bfloat16, in shards, every weight drawn anew. Its bytes."""
    config = transformers.LlamaConfig(**shape, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    model = architecture.empty_model(config, torch.bfloat16)
    tied = getattr(model, "all_tied_weights_keys", {})
    sizes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    draws = torch.Generator(device).manual_seed(0)

    def drawn(name: str) -> torch.Tensor:
        if len(sizes[name]) == 1:
            return torch.ones(sizes[name], dtype=torch.bfloat16)  # norms
        return torch.randn(sizes[name], generator=draws, device=device, dtype=torch.bfloat16).mul_(SPREAD).cpu()

    parts: list[list[str]] = [[]]
    for name in sizes:
        if parts[-1] and 2 * sum(sizes[other].numel() for other in (*parts[-1], name)) > SHARD_BYTES:
            parts.append([])
        parts[-1].append(name)
    shards = {f"model-{number:05d}-of-{len(parts):05d}.safetensors": names for number, names in enumerate(parts, 1)}
    with ThreadPoolExecutor(WRITERS) as pool:
        waiting = []
        for file, names in shards.items():
            if len(waiting) == WRITERS:
                waiting.pop(0).result()
            waiting.append(pool.submit(save_file, {name: drawn(name) for name in names}, folder / file, {"format": "pt"}))
        for written in waiting:
            written.result()
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum((folder / file).stat().st_size for file in shards)


def random_windows(shape: dict[str, Any], windows: int, seqlen: int) -> Windows:
    """Random token ids in place of calibration text."""
    ids = torch.randint(0, shape["vocab_size"], (windows, seqlen), generator=torch.Generator().manual_seed(1))
    return Windows(ids, "random ids", windows)


def roomy(size: int, wanted: Path | None) -> Path:
    """A new folder with room for so many bytes: in `wanted`, or in memory (/dev/shm), or where temporary files go."""
    for parent in (wanted,) if wanted else (Path("/dev/shm"), Path(tempfile.gettempdir())):
        if parent.is_dir() and shutil.disk_usage(parent).free > size:
            return Path(tempfile.mkdtemp(dir=parent))
    raise SystemExit(f"no room for {size / 1e9:.0f} GB: give --folder on a disk that has it, or a smaller --shape or --blocks")


def quantize(
    model: Path, config: QuantizeConfig, windows: Windows, out: Path, device: str = "cpu", dtype: str = "auto", rates: Rates | None = None
) -> dict[str, Any]:
    """Wall seconds from the folder of a model to that of its checkpoint: in all, around the blocks, of each block, and by stage. With
    `rates`, each stage beside its floor."""
    started = time.perf_counter()
    with Quantization.open(str(model), config, windows, out, device=device, dtype=dtype) as run:
        opened = time.perf_counter()
        run.capture()
        captured = time.perf_counter()
        blocks = [run.quantize_block(index)["seconds"] for index in range(run.block_count)]
        walked = time.perf_counter()
        run.assemble()
        stages = run.stage_seconds  # waits for a GPU
        ended = time.perf_counter()
        return {
            "seconds": ended - started,
            "open": opened - started,
            "capture": captured - opened,
            "blocks": blocks,
            "all_blocks": walked - captured,
            "assemble": ended - walked,
            "tokens": windows.tokens.numel(),
            "dtype": str(run.stream.dtype).removeprefix("torch."),
            "stages": stage_records(stages, floors(run, rates)) if rates else {name: {"seconds": value} for name, value in stages.items()},
        }
