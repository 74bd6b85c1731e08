"""Choose the implementation of an innermost loop: a fused Triton kernel (triton_loops.py), a C loop (c_loops.py), or their twin, the
plain torch of rounding.py, descent.py and scale_search.py.

The tensors decide, there is no setting: float32 goes to Triton on a GPU for which it can compile here, to C on a CPU for which this machine
has a C compiler, all else to the twin. CUDA builds of torch for Linux bring Triton along; it builds a helper of its own with the
machine's C compiler when it is first used. The run record and MLflow name the implementation. Products of bfloat16 inputs, which torch's
own operations would round, go to C where the processor has instructions for them.
"""

from __future__ import annotations

import functools
import logging
import subprocess
import threading
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from gptq_core.kernels.processor import has_avx512_bf16

log = logging.getLogger(__name__)

small_operations = threading.Lock()
"""Serializes the twins that walk columns: two threads issuing many small operations only contend for the GIL."""
OLDEST_GPU = (7, 0)
"""Compute capability from which on Triton compiles."""


@runtime_checkable
class Kernels(Protocol):
    """What c_loops and triton_loops have in common. c_loops also has `write_back`."""

    NAME: str

    def round_columns(
        self,
        now: Float[Tensor, "block out"],
        feedback: Float[Tensor, "block block"],
        scales: Float[Tensor, "groups out"],
        zeros: Float[Tensor, "groups out"],
        group: Int[Tensor, " block"],
        max_code: int,
    ) -> UInt8[Tensor, "block out"]: ...

    def descend_columns(
        self,
        codes: UInt8[Tensor, "block out"],
        slope: Float[Tensor, "block out"],
        scale: Float[Tensor, " out"],
        zero: Float[Tensor, " out"],
        max_code: int,
        damped: Float[Tensor, "block block"],
    ) -> Float[Tensor, "block out"]: ...

    def search(
        self,
        weights: Float[Tensor, "groups columns out"],
        importance: Float[Tensor, "groups columns"],
        max_code: int,
        smallest_zero: int | None,
    ) -> tuple[Float[Tensor, "groups out"], Float[Tensor, "groups out"]]: ...


def kernels(*tensors: Tensor) -> Kernels | None:
    """The module whose kernels take these tensors, all on one device; None where the twin does."""
    if any(t.dtype != torch.float32 for t in tensors if t.is_floating_point()):
        return None
    device = tensors[0].device
    if runs_on(device):
        from gptq_core.kernels import triton_loops  # only here is Triton imported

        return triton_loops
    if device.type == "cpu" and compiles():
        from gptq_core.kernels import c_loops

        return c_loops
    return None


def implementation(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation that runs the loops in float32 on a device: triton, c, or torch for the twins; it also says where
    products of bfloat16 inputs go to C, for a run whose forward is in `dtype`."""
    found = kernels(torch.empty(0, device=device, dtype=torch.float32))
    name = found.NAME if found else "torch"
    return f"{name} with bfloat16 products" if name == "c" and dtype == torch.bfloat16 and compiles_products() else name


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device. For a GPU where they do not, the reason is logged once."""
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


@functools.cache
def compiles() -> bool:
    """Whether the C loops can be built, or were built before. Where they cannot, the reason is logged once."""
    from gptq_core.kernels import c_loops

    try:
        c_loops.library()
    except OSError as error:
        obstacle = str(error)
    except subprocess.CalledProcessError as error:
        obstacle = f"{error.cmd[0]} ended with {error.returncode}: {error.stderr.strip()[-500:]}"
    else:
        return True
    log.warning(
        "the loops in C could not be compiled (%s); until then the solver runs as many small operations, and bfloat16 inputs are summed up "
        "in float32, both slower: install a C compiler (cc, gcc or clang, or CC=...), and see that XDG_CACHE_HOME or ~/.cache can be "
        "written",
        obstacle,
    )
    return False


@functools.cache
def compiles_products() -> bool:
    """Whether products of bfloat16 inputs can be given to C: this processor has the instructions, and the compiler knew them. Where the
    compiler did not, that is logged once."""
    from gptq_core.kernels import c_loops

    if not has_avx512_bf16() or not compiles():
        return False
    known = c_loops.has_products()
    if not known:
        log.warning(
            "the C compiler that made %s does not know this processor's instructions for bfloat16; bfloat16 inputs are summed up in "
            "float32, which is slower: install gcc 10 or clang 9, or newer ones, and remove that file",
            c_loops.library()._name,
        )
    return known
