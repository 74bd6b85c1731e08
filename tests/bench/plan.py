"""What `plan` foretells against real runs, and how long it takes for the shape of Llama-3-70B. Two markdown tables.

    python tests/bench/plan.py [FOLDER TEXT ...]

Each FOLDER is a model and TEXT its calibration text, beside the embedded model; recipes tuned and best, 32 windows. Every run is a process
of its own, `python -m flows quantize`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "flows" / "embedded"
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def flows(*args: str) -> str:
    return subprocess.run([sys.executable, "-m", "flows", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def compare(model: str, text: str, recipe: str, folder: Path) -> str:
    out, request = folder / f"{Path(model).name}-{recipe}", folder / "run.yaml"
    request.write_text(
        json.dumps(
            {
                "model": {"path": model},
                "quantization": {"bits": 4, "dataset": text, "recipe": recipe},
                "output": {"dir": str(out)},
                "calibration": {"samples": 32},
                "evaluation": {"samples": 8},
                "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
            }
        )
    )
    plan = json.loads(flows("plan", str(request), "--json"))
    flows("quantize", str(request))
    real = json.loads(Path(f"{out}.run.json").read_text())
    pairs = [(plan["bytes"], real["assembly"]["bytes"], 1e6), (plan["host_bytes"], real["peak_memory_bytes"]["host"], 1e6)]
    if "gpu" in real["peak_memory_bytes"]:
        pairs.append((plan["device_bytes"], real["peak_memory_bytes"]["gpu"], 1e6))
    if plan["total_seconds"]:
        pairs.append((plan["total_seconds"], real["seconds"], 1))
    cells = " | ".join(f"{one / unit:.1f} | {other / unit:.1f} | {one / other - 1:+.1%}" for one, other, unit in pairs)
    return f"| {Path(model).name}, {recipe} | {cells} |"


if __name__ == "__main__":
    arguments = [str(EMBEDDED / "model"), str(EMBEDDED / "train.parquet"), *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print("| run | size, MB: plan | run | | host memory, MB: plan | run | | (GPU memory, MB) seconds: plan | run | |")
        for model, text in zip(arguments[::2], arguments[1::2], strict=True):
            for recipe in ("tuned", "best"):
                print(compare(model, text, recipe, folder), flush=True)
        (folder / "config.json").write_text(json.dumps(LLAMA_70B))
        (folder / "run.yaml").write_text(json.dumps({"model": {"path": temporary}, "quantization": {"bits": 4, "dataset": "wikitext2"}}))
        started = time.perf_counter()
        flows("plan", str(folder / "run.yaml"), "--json")
        print(f"\nplan of Llama-3-70B's shape, imports included: {time.perf_counter() - started:.1f} s")
