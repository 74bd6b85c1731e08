"""llm-compressor's GPTQModifier with its default order of columns (static). It saves packed files of compressed-tensors, which that
library itself turns back to dense weights here: the folder that is left is a dense model with them, for the common evaluator."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from measured import BATCH, DAMPING, Steps, arguments, torch_dtype
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

args, steps = arguments(), Steps()
with steps("load"):
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch_dtype(args.dtype))
rows = Dataset.from_dict({"input_ids": args.tokens.tolist(), "attention_mask": torch.ones_like(args.tokens).tolist()})
weights = {"num_bits": args.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": args.group_size}
recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"], dampening_frac=DAMPING)
with steps("quantize"):
    oneshot(
        model=model,
        dataset=rows,
        recipe=recipe,
        max_seq_length=args.tokens.shape[1],
        num_calibration_samples=len(args.tokens),
        shuffle_calibration_samples=False,
        batch_size=BATCH,
    )
packed = Path(args.out).with_suffix(".packed")
with steps("save"):
    model.save_pretrained(packed, save_compressed=True)
del model
gc.collect()
unpacked = AutoModelForCausalLM.from_pretrained(
    packed, dtype=torch.float32, quantization_config=CompressedTensorsConfig(run_compressed=False)
)
found = {name: module.weight.detach() for name, module in unpacked.named_modules() if isinstance(module, torch.nn.Linear)}
dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
for name, module in dense.named_modules():
    if isinstance(module, torch.nn.Linear) and name != "lm_head":
        module.weight.data = found[name]
dense.save_pretrained(args.out)
steps.answer("llmcompressor", "compressed-tensors")
