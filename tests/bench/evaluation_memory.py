"""Memory of an evaluation with a large vocabulary: python tests/bench/evaluation_memory.py [--vocabulary N] [--seqlen N]

Makes a small random Llama with that vocabulary, quantizes it, and judges it against the original in a process of its own. The bound
that gptq_core.planning.estimate states: both models, and the log-probabilities of `pieces` positions five times over, and a tenth for the
forward of a window. The last column is what whole windows would take.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from pathlib import Path

import torch
import transformers
from ablation import quantize
from rich.console import Console
from rich.table import Table

from gptq_core import QuantizeConfig
from gptq_core.data.windows import Windows
from gptq_core.inference.evaluation import evaluate_pair, load_for_evaluation, pieces
from tasks.outcome.machine import peak_memory, reset_peak_memory

COPIES = 5


def make(folder: Path, vocabulary: int, seqlen: int) -> Windows:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=seqlen,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    windows = Windows(torch.randint(0, vocabulary, (3, seqlen)), "random ids", 3)
    quantize(str(folder / "model"), QuantizeConfig(bits=4, group_size=64), windows, folder / "out")
    return windows


def measure(folder: Path, windows: Windows, answer: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    paths = [str(folder / name) for name in ("model", "out")]
    models = [load_for_evaluation(path, "cpu") for path in paths]
    size = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    judge = Windows(windows.tokens[:1, :64], "", 1)
    evaluate_pair(*paths, judge, device="cpu")  # what libraries take once
    del models
    reset_peak_memory()
    base = peak_memory()["host"]
    found = evaluate_pair(*paths, windows, device="cpu")
    answer.put((peak_memory()["host"] - base, size, found["kl"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=152_064)
    parser.add_argument("--seqlen", type=int, default=2048)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        windows = make(folder, args.vocabulary, args.seqlen)
        context = multiprocessing.get_context("spawn")
        answer = context.Queue()
        process = context.Process(target=measure, args=(folder, windows, answer))
        process.start()
        above, size, _ = answer.get()
        process.join()
    at_once, positions = pieces(args.vocabulary, args.seqlen)
    each = at_once * positions * args.vocabulary * 4
    table = Table(title=f"vocabulary {args.vocabulary}, windows of {args.seqlen}, {positions} positions at a time")
    for name in ("models MB", "peak above the start MB", "bound MB", "a whole window MB"):
        table.add_column(name, justify="right")
    bound = 1.1 * (size + COPIES * each)
    whole = COPIES * args.seqlen * args.vocabulary * 4
    table.add_row(*(f"{value / 1e6:.0f}" for value in (size, above, bound, size + whole)))
    Console().print(table)
    if above > bound:
        raise SystemExit("the bound does not hold")


if __name__ == "__main__":
    main()
