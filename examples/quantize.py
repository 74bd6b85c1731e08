"""Quantize a model folder with a calibration text: `python examples/quantize.py MODEL TEXT OUT --bits 4`.

The same command continues an interrupted run at the block where it stopped.
"""

import argparse
from pathlib import Path

from gptq_core import Quantization, QuantizeConfig, calibration_windows
from gptq_core.data.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a Hugging Face causal language model")
    parser.add_argument("text", help="calibration text: .txt, .jsonl or .parquet")
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--recipe", default="tuned")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens of a window, at most the limit of the model")
    args = parser.parse_args()

    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, recipe=args.recipe)
    windows = calibration_windows(args.text, load_tokenizer(args.model), args.samples, args.seqlen, seed=0)
    with Quantization.open(args.model, config, windows, args.out) as run:
        for index in range(run.block_count):
            record = run.quantize_block(index)
            print(f"block {index + 1} of {run.block_count}: {len(record['layers'])} layers, {record['seconds']:.1f} s")
        made = run.assemble()
    print(f"{made['path']}: {made['bits_per_weight']:.2f} bits per weight")


if __name__ == "__main__":
    main()
