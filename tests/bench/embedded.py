"""What 4, 3 and 2 bits do to the embedded model: rounded to nearest, and by GPTQ with each recipe. One markdown table.

    python tests/bench/embedded.py

Rounding to nearest uses the same min-max scales. Perplexity and KL over the whole held-out text.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from gptq_core import Quantization, QuantizeConfig, Windows, calibration_windows, evaluate_pair, evaluation_windows
from gptq_core.solver import round_to_nearest
from gptq_core.source import load_tokenizer
from gptq_core.walk import InputGroup

EMBEDDED = Path(__file__).parents[2] / "flows" / "embedded"
MODEL = str(EMBEDDED / "model")


class RoundedToNearest(Quantization):
    """The engine with its solver replaced by rounding."""

    def _solve(self, path, group: InputGroup, linears, hessian):
        for name in group.names:
            yield name, round_to_nearest(linears[name].weight.float(), self.config), {
                "name": name, "bits": self.config.bits, "group_size": self.config.group_size, "fallback": "by request",
                "in_features": linears[name].in_features, "out_features": linears[name].out_features,
            }  # fmt: skip


def judge(kind: type[Quantization], config: QuantizeConfig, calibration: Windows, heldout: Windows) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        with kind.open(MODEL, config, calibration, out, device="cpu") as run:
            for index in range(run.block_count):
                run.quantize_block(index)
            run.assemble()
        return evaluate_pair(MODEL, str(out), heldout, device="cpu")


if __name__ == "__main__":
    torch.set_num_threads(2)
    tokenizer = load_tokenizer(MODEL)
    calibration = calibration_windows(str(EMBEDDED / "train.parquet"), tokenizer, 128, 256, 0)
    heldout = evaluation_windows(str(EMBEDDED / "heldout.parquet"), tokenizer, 256)
    print("| bits | rounded: perplexity | KL | classic: perplexity | KL | tuned: perplexity | KL |\n|---|---|---|---|---|---|---|")
    ways = ((RoundedToNearest, "classic"), (Quantization, "classic"), (Quantization, "tuned"))
    for bits in (4, 3, 2):
        results = [judge(kind, QuantizeConfig(bits=bits, recipe=recipe), calibration, heldout) for kind, recipe in ways]
        cells = [f"{result[key]:{form}}" for result in results for key, form in (("quantized_perplexity", ".2f"), ("kl", ".4f"))]
        print(f"| {bits} | {' | '.join(cells)} |")
    print(f"\noriginal perplexity {results[0]['original_perplexity']:.2f}")
