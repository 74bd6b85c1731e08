"""What this machine's processor can do."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch


def multiplies_in_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16; without them they are slower than in float32."""
    return any(_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is Arm's name


def has_avx512_bf16() -> bool:
    """Whether this processor has the instructions of AVX-512 for products of bfloat16."""
    return bool(_capabilities().get("avx512_bf16", False))


@functools.cache
def _capabilities() -> Mapping[str, Any]:
    """Empty for an older torch, which does not report them."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
