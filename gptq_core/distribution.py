"""What a solved weight is made of, in a few numbers: how often each code is used, and how large the scales are."""

from __future__ import annotations

from typing import Any

import torch

from gptq_core.method.solver import Solution


def distribution(solution: Solution, bits: int) -> dict[str, Any]:
    """{"codes": count of each code 0 … 2^bits - 1, "scales": {"first_octave", "counts"}}.

    counts[i] is the number of scales s with floor(log2 |s|) = first_octave + i; scales of zero are not counted.
    """
    codes = torch.bincount(solution.codes.flatten(), minlength=2**bits).tolist()
    magnitudes = solution.scales.float().abs()
    octaves = torch.log2(magnitudes[magnitudes > 0]).floor().int()
    if not octaves.numel():
        return {"codes": codes, "scales": {"first_octave": 0, "counts": []}}
    first = int(octaves.min())
    return {"codes": codes, "scales": {"first_octave": first, "counts": torch.bincount(octaves - first).tolist()}}
