"""Who runs an innermost loop: the fused Triton kernel of fused.py, or its twin, the plain torch of columns.py, descent.py and scales.py.

The tensors decide, nothing is set: float32 on a GPU for which Triton can compile here goes to the kernel, all else to the twin. CUDA
builds of torch for Linux bring Triton along; it builds a helper of its own with the machine's C compiler when it is first used.
"""

from __future__ import annotations

import functools
import logging
import subprocess
import threading

import torch
from torch import Tensor

log = logging.getLogger(__name__)

LARGEST_BLOCK = 128
"""Columns that a program of the sweep or of the descent holds at once."""
small_operations = threading.Lock()
"""Held by a twin that walks columns: two threads that do so at once would do little but hand Python's own lock to and fro."""
OLDEST_GPU = (7, 0)
"""Compute capability from which on Triton compiles."""


def takes(*tensors: Tensor) -> bool:
    """Whether the fused kernels take these tensors, which lie on one device."""
    return all(t.dtype == torch.float32 for t in tensors if t.is_floating_point()) and runs_on(tensors[0].device)


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device. Of a GPU where they do not, the log tells once why."""
    if device.type != "cuda":
        return False
    obstacle = _obstacle(torch.cuda.get_device_capability(device))
    if obstacle:
        log.warning("%s; until then the solver's loops run on %s as many small operations", obstacle, device)
    return obstacle is None


def _obstacle(capability: tuple[int, int]) -> str | None:
    if capability < OLDEST_GPU:
        return f"Triton wants a GPU of compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]}, this one has {capability[0]}.{capability[1]}"
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except ImportError as error:
        return f"Triton is not installed ({error}): pip install triton"
    except (RuntimeError, AssertionError, OSError, subprocess.CalledProcessError) as error:
        return f"Triton does not start ({error}): it wants a C compiler (gcc, or CC), Python.h (python3-dev) and libcuda"
    return None
