"""Optimum's GPTQQuantizer, whose solver is that of GPTQModel. --by-block: all linears of a block in one pass, as other peers do;
without it one pass for each step of true_sequential, its default. Its save writes a GPTQ checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

from measured import DAMPING, Steps, arguments, torch_dtype

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # as for GPTQModel

args, steps = arguments(by_block={"action": "store_true"}), Steps()

import torch  # noqa: E402 - after the environment is set
from optimum.gptq import GPTQQuantizer  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

with steps("load"):
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch_dtype(args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
# batches of one: it pads larger ones with a collator of its own, and one window fills the GEMMs of a CPU
rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in args.tokens]
quantizer = GPTQQuantizer(
    bits=args.bits,
    dataset=rows,
    group_size=args.group_size,
    damp_percent=DAMPING,
    desc_act=False,
    sym=True,
    true_sequential=not args.by_block,
    model_seqlen=args.tokens.shape[1],
    batch_size=1,
)
with steps("quantize"):
    model = quantizer.quantize_model(model, tokenizer)
with steps("save"):
    # the rows are tensors, which no JSON file takes
    quantizer.dataset = None
    if hasattr(model.config, "quantization_config"):
        model.config.quantization_config["dataset"] = None
    quantizer.save(model, args.out)
# 2.3 turns the zeros to those of "gptq" and says so in quantize_config.json, while config.json goes on to say "gptq_v2"
written = json.loads((Path(args.out) / "quantize_config.json").read_text())["format"]
config = json.loads((Path(args.out) / "config.json").read_text())
config["quantization_config"]["format"] = written
(Path(args.out) / "config.json").write_text(json.dumps(config, indent=2) + "\n")
steps.answer("optimum", "gptqmodel")
