"""What this machine's processor can do."""

from __future__ import annotations

import functools

import torch


@functools.cache
def multiplies_in_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16; without them they are slower than in float32. An older torch,
    which does not tell, counts as one without."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last as Arm calls it
