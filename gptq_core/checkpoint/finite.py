"""Numbers that are none never pass a file: every tensor is looked at when it is read, and again when it is written."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptq_core.errors import CorruptCheckpointError, InputError

LARGEST = torch.finfo(torch.float16).max


def check_finite(tensor: Tensor, name: str, place: object) -> Tensor:
    """The tensor. Raises CorruptCheckpointError, which names it, its place and where in it the first such number stands."""
    if tensor.is_floating_point() and tensor.numel():
        low, high = tensor.aminmax()  # in one pass without a copy; what is not a number passes into both
        if not (math.isfinite(low) and math.isfinite(high)):
            first = [int(index) for index in torch.unravel_index((~tensor.isfinite()).flatten().int().argmax(), tensor.shape)]
            raise CorruptCheckpointError(
                f"{place}: {name} holds {float(tensor[tuple(first)])} at {first}; all numbers must be finite: mend the model, or "
                "download it again"
            )
    return tensor


def half(bias: Tensor, name: str) -> Tensor:
    """A quantized linear's bias in float16, as files hold it. Raises InputError where it does not fit."""
    found = bias.half()
    if not found.isfinite().all():
        raise InputError(
            f"{name}: reaches {float(bias.abs().max()):.4g}, and a checkpoint holds the bias of a quantized linear in float16, up to "
            f"{LARGEST:g}; leave this linear out by a rule of quantization.dynamic"
        )
    return found
