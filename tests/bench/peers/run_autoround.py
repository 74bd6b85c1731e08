"""AutoRound without its iterations (iters=0): searched scales and rounding to nearest. Its save writes a GPTQ checkpoint."""

from __future__ import annotations

from auto_round import AutoRound
from measured import BATCH, Steps, arguments, torch_dtype
from transformers import AutoModelForCausalLM, AutoTokenizer

args, steps = arguments(), Steps()
with steps("load"):
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch_dtype(args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
with steps("quantize"):
    rounder = AutoRound(
        model,
        tokenizer,
        bits=args.bits,
        group_size=args.group_size,
        sym=True,
        iters=0,
        dataset=args.tokens.split(BATCH),
        seqlen=args.tokens.shape[1],
        nsamples=len(args.tokens),
        batch_size=BATCH,
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounder.quantize()
with steps("save"):
    rounder.save_quantized(args.out, format="auto_gptq", inplace=True)
steps.answer("auto-round")
