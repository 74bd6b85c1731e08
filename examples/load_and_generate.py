"""Load a quantized checkpoint and continue a text greedily: `python examples/load_and_generate.py OUT "Once upon a time"`."""

import argparse

import torch

from gptq_core import load_quantized
from gptq_core.data.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="folder of a quantized checkpoint")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate, at most")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.checkpoint)
    model = load_quantized(args.checkpoint, device=args.device)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        ids = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=args.tokens, do_sample=False)
    print(tokenizer.decode(ids[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
