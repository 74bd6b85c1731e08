"""What 4, 3 and 2 bits do to the embedded model: rounded to nearest, and by GPTQ with each recipe. One markdown table.

    python tests/bench/embedded.py

Rounding to nearest uses the same min-max scales. Perplexity and KL over the whole held-out text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ablation import quantize

from gptq_core import QuantizeConfig, Windows, calibration_windows, evaluate_pair, evaluation_windows
from gptq_core.block.group import Member, solve_group
from gptq_core.data.tokenizer import load_tokenizer
from gptq_core.method.solver import round_to_nearest
from gptq_core.run import engine

EMBEDDED = Path(__file__).parents[2] / "flows" / "embedded"
MODEL = str(EMBEDDED / "model")


def rounded_to_nearest(members: list[Member], *_: Any) -> Iterator[tuple]:
    """Takes the place of the engine's solver."""
    for member in members:
        out_features, in_features = member.weight.shape
        yield (
            member.name,
            round_to_nearest(member.weight.float(), member.config),
            {
                "name": member.name,
                "bits": member.config.bits,
                "group_size": member.config.group_size,
                "fallback": "by request",
                "in_features": in_features,
                "out_features": out_features,
            },
        )


def judge(solve: Callable[..., Iterator[tuple]], config: QuantizeConfig, calibration: Windows, heldout: Windows) -> dict:
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(engine, "solve_group", solve):
        out = Path(folder) / "out"
        quantize(MODEL, config, calibration, out)
        return evaluate_pair(MODEL, str(out), heldout, device="cpu")


if __name__ == "__main__":
    torch.set_num_threads(2)
    tokenizer = load_tokenizer(MODEL)
    calibration = calibration_windows(str(EMBEDDED / "train.parquet"), tokenizer, 128, 256, 0)
    heldout = evaluation_windows(str(EMBEDDED / "heldout.parquet"), tokenizer, 256)
    print("| bits " + "".join(f"| {way}: perplexity | KL " for way in ("rounded", "classic", "tuned", "best")) + "|\n" + "|---" * 9 + "|")
    ways = ((rounded_to_nearest, "classic"), (solve_group, "classic"), (solve_group, "tuned"), (solve_group, "best"))
    for bits in (4, 3, 2):
        results = [judge(solve, QuantizeConfig(bits=bits, recipe=recipe), calibration, heldout) for solve, recipe in ways]
        cells = [f"{result[key]:{form}}" for result in results for key, form in (("quantized_perplexity", ".2f"), ("kl", ".4f"))]
        print(f"| {bits} | {' | '.join(cells)} |")
    print(f"\noriginal perplexity {results[0]['original_perplexity']:.2f}")
