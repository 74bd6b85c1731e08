"""GPTQModel with its defaults. Its save writes a GPTQ checkpoint."""

from __future__ import annotations

import os

from measured import BATCH, DAMPING, Steps, arguments, torch_dtype

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.7.0 chooses one on a machine of two cores, and then does not load

args, steps = arguments(), Steps()

import torch  # noqa: E402 - after the environment is set
from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402

config = QuantizeConfig(
    bits=args.bits, group_size=args.group_size, sym=True, desc_act=False, damp_percent=DAMPING, offload_to_disk=False, device="cpu"
)
with steps("load"):
    model = GPTQModel.load(args.model, config, dtype=torch_dtype(args.dtype))
rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in args.tokens]
with steps("quantize"):
    model.quantize(rows, batch_size=BATCH, calibration_sort=None)
with steps("save"):
    model.save(args.out)
steps.answer("gptqmodel")
