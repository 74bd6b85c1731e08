"""Judge three widths from one pass through a model and choose one: `python examples/sweep_and_choose.py MODEL TEXT HELDOUT`.

Screening writes no checkpoint. It ranks widths; the figures of a checkpoint come from evaluating it.
"""

import argparse

from gptq_core import QuantizeConfig, calibration_windows, evaluation_windows, screen
from gptq_core.data.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a Hugging Face causal language model")
    parser.add_argument("text", help="calibration text: .txt, .jsonl or .parquet")
    parser.add_argument("heldout", help="text to judge on, not the calibration text")
    parser.add_argument("--max-kl", type=float, default=0.1, help="largest KL per token of the choice")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=32, help="windows of each text")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a window, at most the limit of the model")
    args = parser.parse_args()

    configs = {f"{bits} bits": QuantizeConfig(bits=bits, group_size=args.group_size) for bits in (2, 3, 4)}
    tokenizer = load_tokenizer(args.model)
    calibration = calibration_windows(args.text, tokenizer, args.samples, args.seqlen, seed=0)
    heldout = evaluation_windows(args.heldout, tokenizer, args.seqlen, args.samples)
    results = screen(args.model, configs, calibration, heldout)

    judged = {name: found for name, found in results.items() if found.kl is not None}
    for name, found in judged.items():
        print(f"{name}  {found.bytes / 1e6:10.2f} MB  perplexity {found.quantized_perplexity:10.2f}  KL {found.kl:.4f}")
    within = [name for name, found in judged.items() if found.kl <= args.max_kl]
    choice = min(within, key=lambda name: judged[name].bytes, default=None)
    print(f"choice: {choice}" if choice else f"no width has a KL of {args.max_kl:g} or less: raise --max-kl, or try --group-size 32")


if __name__ == "__main__":
    main()
