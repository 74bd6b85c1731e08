"""Rates of this machine for the estimate, measured in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from gptq_core.config import QuantizeConfig
from gptq_core.method import solver
from gptq_core.method.factor import factorize
from gptq_core.method.hessian import Hessian

FLOAT = 4


@dataclass(frozen=True)
class Rates:
    """Measured rates of this machine."""

    product: float
    """Floating-point operations a second in a matrix product, in the dtype of the forward."""
    exact: float
    """The same in float32."""
    elementwise: float
    """Bytes a second, read and written, of an elementwise operation."""
    digest: float
    """Bytes a second of sha256."""
    column: float
    """Seconds a column of a layer that is solved, whatever its rows."""
    weight: float
    """Seconds a weight of it, on top; of one thread."""


PROBED = 256
"""Columns of the layer whose solving is measured."""


PROBED_ROWS = (64, 1024)


def measure(config: QuantizeConfig, device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of this machine, in about a second."""
    side = 1024 if device.type == "cpu" else 8192

    def product(kind: torch.dtype) -> float:
        square = torch.ones(side, side, device=device, dtype=kind)
        return 2 * side**3 / least(lambda: square @ square, device)

    exact = product(torch.float32)
    fast = exact if dtype == torch.float32 else product(dtype)
    line = torch.ones(side, 8192, device=device)
    elementwise = 2 * FLOAT * line.numel() / least(lambda: line * 1.5, device)
    data = bytes(16 << 20)
    digest = len(data) / least(lambda: sha256(data).digest(), device)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as parts of a layer are solved
        fewer, more = (least(_probe(config, rows, device, dtype), device, times=2) / PROBED for rows in PROBED_ROWS)
    finally:
        torch.set_num_threads(threads)
    weight = max(more - fewer, 0.0) / (PROBED_ROWS[1] - PROBED_ROWS[0])
    return Rates(fast, exact, elementwise, digest, max(fewer - weight * PROBED_ROWS[0], 0.0), weight)


def _probe(config: QuantizeConfig, rows: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    chance = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(size, PROBED, generator=chance).to(device) for size in (2 * PROBED, rows))
    hessian = Hessian(PROBED, device)
    hessian.add(inputs)
    fits = config.group_size != -1 and PROBED % config.group_size == 0
    plain = config.model_copy(update={"group_size": config.group_size if fits else -1, "dynamic": None, "allocate": None})
    factor = factorize(hessian.mean(), plain, "probe", inputs.shape[0])
    products = solver.products_dtype(dtype, device)
    return lambda: solver.solve(weight.to(dtype), factor, plain, products=products)


def least(work: Callable[[], Tensor | Any], device: torch.device, times: int = 3) -> float:
    """Seconds of the fastest run, after one that does not count."""
    found = []
    for _ in range(times + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found[1:])
