"""The innermost loops in C, for float32 on the CPU: loops.c (rounding, write-back, descent, the search for scales, packing), built once
per machine by its C compiler; and with it products.c, sums of products of bfloat16 inputs. See dispatch.py.

A twin starts hundreds of operations for a block, each of which reads and writes what the one before it wrote; here a tile of outputs
stays in registers and the nearest cache from its first column to its last, and the GIL is released, so that threads run side by
side. Divisions are true and halves are rounded to even, as in the twins; products and sums are contracted and summed in another
order, and the error of a candidate scale is that of its reciprocal. So where all sums are exact, sweep and descent are equal to the
bit; else a code may differ where its target is next to a tie, and a scale where two candidates are as good up to rounding.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int, Int32, UInt8
from torch import Tensor

from gptq_core.kernels import constants
from gptq_core.kernels.constants import LARGEST_BLOCK

NAME = "c"
"""As `dispatch.implementation` and run records call it."""
SOURCES = tuple(Path(__file__).with_name(name) for name in ("loops.c", "products.c"))
FLAGS = ("-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
INSTRUCTIONS = {"AVX512": _AVX512, "AVX2": _AVX2}
"""By what torch itself uses of a processor, so that a folder shared by machines holds a library for each kind of them."""

_pointer, _long, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
SIGNATURES = {
    "round_columns": (_pointer, _long, _pointer, _pointer, _pointer, _long, _pointer, _float, _pointer, _long, _long, _long),
    "write_back": (ctypes.c_int, *[_pointer] * 12, _long, _long),
    "descend_columns": (_pointer, _long, _pointer, _long, _pointer, _pointer, _float, _pointer, _long, _pointer, _long, _long, _long),
    "search": (
        _pointer,
        _long,
        _pointer,
        _long,
        _long,
        ctypes.c_int,
        _float,
        _float,
        _pointer,
        _pointer,
        _long,
        _pointer,
        _long,
        *[_pointer] * 2,
    ),
    "pack": (_pointer, _long, _long, ctypes.c_int, _pointer),
    "add_products": (_pointer, _long, _pointer, _long, ctypes.c_uint, _pointer),
}

SIDE, STRETCH = 48, 256
"""Columns of a packed panel of products.c, a multiple of 16, and pairs of tokens that it holds."""
PANEL = 4 * SIDE
"""Columns that are packed at once, to be multiplied with one packed panel after another: what a second cache holds."""
PIECES = 2
"""Pieces per thread, about: with more of them threads wait less for the last one, but operands are packed more often."""
WORTH_THREADS = 1e7
"""Multiplications from which it pays to share them among threads: about a tenth of a millisecond of one thread."""

Product = tuple[Tensor, Tensor, Tensor]
"""total (rows, columns) in float32, left (tokens, rows) and right (tokens, columns) in bfloat16; all row-contiguous."""
_ALL = -(1 << 40)
"""`above` of products.c where every entry is computed."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled loops, from the user's cache or built now.

    Raises OSError if there is no C compiler or the cache folder cannot be used, subprocess.CalledProcessError if building fails.
    """
    sizes = {"LARGEST_BLOCK": LARGEST_BLOCK, "SIDE": SIDE, "STRETCH": STRETCH}
    instructions = INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ())
    flags = (*FLAGS, *instructions, *(f"-D{name}={size}" for name, size in sizes.items()))
    sources = b"".join(source.read_bytes() for source in SOURCES)
    key = hashlib.sha256(sources + repr((flags, platform.system(), platform.machine())).encode()).hexdigest()[:16]
    path = _cache() / f"loops-{key}.so"
    if not path.exists():
        _build(path, flags)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:  # truncated, or built on a machine with the same home folder and another C library
        _build(path, flags)
        loaded = ctypes.CDLL(str(path))
    for name, signature in SIGNATURES.items():
        if function := getattr(loaded, name, None):
            function.argtypes, function.restype = signature, None
    return loaded


def has_products() -> bool:
    """Whether the compiler knew the instructions that products.c is written in."""
    return hasattr(library(), "add_products")


def _cache() -> Path:
    """The cache folder, made if it is missing. It must belong to this user alone, because its files are executed."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptq_core"
    except RuntimeError as error:
        raise FileNotFoundError("no home folder, and XDG_CACHE_HOME names none") from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to somebody else, or others may write to it: chmod go-w, or another XDG_CACHE_HOME")
    return folder


def _build(path: Path, flags: tuple[str, ...]) -> None:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no cc, gcc or clang on the PATH")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # others may build the same one at the same time
        made = Path(folder) / path.name
        subprocess.run([*compiler.split(), *flags, "-o", made, *SOURCES], check=True, capture_output=True, text=True)
        with made.open("rb") as built:
            os.fsync(built.fileno())
        made.replace(path)


def round_columns(
    now: Float[Tensor, "block out"],
    feedback: Float[Tensor, "block block"],
    scales: Float[Tensor, "groups out"],
    zeros: Float[Tensor, "groups out"],
    group: Int[Tensor, " block"],
    max_code: int,
) -> UInt8[Tensor, "block out"]:
    """rounding.round_columns, of at most LARGEST_BLOCK columns."""
    assert now.stride(1) == 1, now.stride()  # it is written to
    block, out = now.shape
    assert block <= LARGEST_BLOCK, block
    taken, scales, zeros, group = feedback.T.contiguous(), scales.contiguous(), zeros.contiguous(), group.contiguous()
    codes = now.new_empty(block, out, dtype=torch.uint8)
    library().round_columns(
        now.data_ptr(),
        now.stride(0),
        taken.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr(),
        out,
        group.data_ptr(),
        max_code,
        codes.data_ptr(),
        out,
        block,
        out,
    )
    return codes


def write_back(
    found: UInt8[Tensor, "block out"],
    left: Float[Tensor, "block out"],
    target: Float[Tensor, "columns out"],
    here: Int[Tensor, " block"],
    scales: Float[Tensor, "groups out"],
    zeros: Float[Tensor, "groups out"],
    group: Int[Tensor, " block"],
    diagonal: Float[Tensor, " block"],
    codes: UInt8[Tensor, "columns out"],
    delta: Float[Tensor, "block out"],
    errors: Float[Tensor, "block out"] | None,
    loss: Float[Tensor, " out"],
) -> None:
    """rounding.write_back; tensors as wide as the outputs are contiguous, delta and errors both float32 or both bfloat16."""
    wide = [t for t in (found, left, target, scales, zeros, codes, delta, errors) if t is not None]
    assert all(t.is_contiguous() for t in wide), [t.stride() for t in wide]
    here, group, diagonal = here.contiguous(), group.contiguous(), diagonal.contiguous()
    library().write_back(
        delta.dtype == torch.bfloat16,
        found.data_ptr(),
        left.data_ptr(),
        target.data_ptr(),
        here.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr(),
        group.data_ptr(),
        diagonal.data_ptr(),
        codes.data_ptr(),
        delta.data_ptr(),
        None if errors is None else errors.data_ptr(),
        loss.data_ptr(),
        *found.shape,
    )


def descend_columns(
    codes: UInt8[Tensor, "block out"],
    slope: Float[Tensor, "block out"],
    scale: Float[Tensor, " out"],
    zero: Float[Tensor, " out"],
    max_code: int,
    damped: Float[Tensor, "block block"],
) -> Float[Tensor, "block out"]:
    """descent.descend_columns, of at most LARGEST_BLOCK columns."""
    assert codes.stride(1) == slope.stride(1) == 1, (codes.stride(), slope.stride())  # they are written to
    block, out = codes.shape
    assert block <= LARGEST_BLOCK, block
    scale, zero, damped = scale.contiguous(), zero.contiguous(), damped.contiguous()
    change = torch.empty_like(slope, memory_format=torch.contiguous_format)
    library().descend_columns(
        codes.data_ptr(),
        codes.stride(0),
        slope.data_ptr(),
        slope.stride(0),
        scale.data_ptr(),
        zero.data_ptr(),
        max_code,
        damped.data_ptr(),
        block,
        change.data_ptr(),
        out,
        block,
        out,
    )
    return change


def search(
    weights: Float[Tensor, "groups columns out"], importance: Float[Tensor, "groups columns"], max_code: int, smallest_zero: int | None
) -> tuple[Float[Tensor, "groups out"], Float[Tensor, "groups out"]]:
    """scale_search.search."""
    weights = weights if weights.stride(2) == 1 else weights.contiguous()
    (groups, columns, out), importance = weights.shape, importance.contiguous()
    shares, shifts = (t.contiguous() for t in constants.coarse_candidates(smallest_zero is None).unbind(1))
    offsets = constants.fine_offsets()
    scales, zeros = weights.new_empty(2, groups, out)
    for g in range(groups):
        library().search(
            weights[g].data_ptr(),
            weights.stride(1),
            importance[g].data_ptr(),
            columns,
            out,
            smallest_zero is None,
            smallest_zero or 0,
            max_code,
            shares.data_ptr(),
            shifts.data_ptr(),
            len(shares),
            offsets.data_ptr(),
            len(offsets),
            scales[g].data_ptr(),
            zeros[g].data_ptr(),
        )
    return scales, zeros


def pack(codes: UInt8[Tensor, "n m"], bits: int) -> Int32[Tensor, "words m"]:
    """checkpoint.packing.pack."""
    assert codes.dtype == torch.uint8, codes.dtype
    codes = codes.contiguous()
    units, out = codes.shape[0] // 32, codes.shape[1]
    words = torch.empty(units * bits, out, dtype=torch.int32)
    library().pack(codes.data_ptr(), units, out, bits, words.data_ptr())
    return words


class _Product(ctypes.Structure):
    """As in products.c."""

    _fields_ = [(name, _pointer) for name in ("left", "right", "total")] + [
        (name, _long) for name in ("left_stride", "right_stride", "total_stride", "tokens", "rows", "columns", "above")
    ]


@functools.cache
def _team() -> ctypes.c_void_p | None:
    """OpenMP's GOMP_parallel, which GNU's, Intel's and LLVM's library have, in the one that torch is linked to; None without OpenMP."""
    found = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    return found and ctypes.cast(found, ctypes.c_void_p)


def add_products(products: Sequence[Product], lower: bool = False) -> None:
    """total += leftᵀ right of each product; with `lower`, entries above a total's diagonal may be left out. torch's threads share the
    work; each entry of a total is summed by one of them, in an order that does not depend on their number."""
    for total, left, right in products:
        assert total.shape == (left.shape[1], right.shape[1]) and len(left) == len(right), (total.shape, left.shape, right.shape)
        assert total.dtype == torch.float32 and left.dtype == right.dtype == torch.bfloat16, (total.dtype, left.dtype, right.dtype)
        assert all(t.stride(1) == 1 or t.shape[1] == 1 for t in (total, left, right)), (total.stride(), left.stride(), right.stride())
    entries = sum(total.numel() for total, _, _ in products)
    threads = torch.get_num_threads() if entries * len(products[0][1]) >= WORTH_THREADS else 1
    height = SIDE * max(1, entries // (PIECES * threads * PANEL * SIDE)) if threads > 1 else max(len(total) for total, _, _ in products)
    pieces = [piece for product in products for piece in _pieces(*product, height, lower)]
    packed = products[0][0].new_empty(threads, STRETCH * (PANEL + 2 * SIDE), dtype=torch.int32)
    library().add_products((_Product * len(pieces))(*pieces), len(pieces), packed.data_ptr(), packed.shape[1], threads, _team())


def _pieces(total: Tensor, left: Tensor, right: Tensor, height: int, lower: bool) -> Iterator[_Product]:
    """A product, cut into products of at most `height` rows and PANEL columns."""
    rows, columns = total.shape
    for i, j in itertools.product(range(0, rows, height), range(0, columns, PANEL)):
        yield _Product(
            left.data_ptr() + i * left.element_size(),
            right.data_ptr() + j * right.element_size(),
            total.data_ptr() + (i * total.stride(0) + j) * total.element_size(),
            left.stride(0),
            right.stride(0),
            total.stride(0),
            len(left),
            min(height, rows - i),
            min(PANEL, columns - j),
            j - i if lower else _ALL,
        )
