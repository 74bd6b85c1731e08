"""Codes to int32 words and back: the pure pair of the `gptq` formats.

Along the packed axis the codes form a little-endian bit stream, lowest bits first, cut into 32-bit words. 32 codes of b bits
fill exactly b words, so one loop over the 32 codes serves all widths; at 3 bits codes 10 and 21 straddle a word boundary.
`qweight` packs along the input axis; `qzeros` is packed along the output axis, and in format `gptq` (v1) holds zero - 1.
"""

from __future__ import annotations

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from gptq_core.kernels import c_loops, dispatch

CODES_PER_UNIT = 32
"""Codes that fill a whole number of words at any width; the packed axis must be a multiple of it."""


def pack(codes: UInt8[Tensor, "n m"], bits: int) -> Int32[Tensor, "words m"]:
    """Pack along the first axis: (n, m) codes in 0 … 2^bits-1 to (n·bits/32, m) words. n must be a multiple of 32."""
    n, m = codes.shape
    assert n % CODES_PER_UNIT == 0, f"packed axis of {n} is not a multiple of {CODES_PER_UNIT}"
    if codes.is_cpu and dispatch.compiles():
        return c_loops.pack(codes, bits)
    units = codes.view(n // CODES_PER_UNIT, CODES_PER_UNIT, m)
    words = torch.zeros(n // CODES_PER_UNIT, bits, m, dtype=torch.int32, device=codes.device)
    for i in range(CODES_PER_UNIT):
        word, shift = divmod(i * bits, 32)
        code = units[:, i].to(torch.int32)
        words[:, word] |= code << shift
        if shift + bits > 32:
            words[:, word + 1] |= code >> (32 - shift)
    return words.view(-1, m)


def unpack(words: Int32[Tensor, "words m"], bits: int) -> UInt8[Tensor, "n m"]:
    """The inverse of `pack`: (words, m) to (words·32/bits, m) codes."""
    rows, m = words.shape
    assert rows % bits == 0, f"{rows} words do not hold whole units of {bits} words"
    streams = words.view(-1, bits, m)
    codes = torch.empty(rows // bits, CODES_PER_UNIT, m, dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for i in range(CODES_PER_UNIT):
        word, shift = divmod(i * bits, 32)
        code = streams[:, word] >> shift  # arithmetic shift: the sign fills the upper bits, so mask before joining
        if shift + bits > 32:
            held = 32 - shift
            code = (code & ((1 << held) - 1)) | (streams[:, word + 1] << held)
        codes[:, i] = (code & mask).to(torch.uint8)
    return codes.view(-1, m)


def pack_zeros(zeros: UInt8[Tensor, "groups out"], bits: int, format: str) -> Int32[Tensor, "groups words"]:
    """Zero points to `qzeros`. In v1 every zero must be at least 1: 0 - 1 would borrow from the neighbour."""
    if format == "gptq":
        assert bool((zeros > 0).all()), "format 'gptq' cannot hold a zero point of 0"
        zeros = zeros - 1
    return pack(zeros.T.contiguous(), bits).T.contiguous()


def unpack_zeros(qzeros: Int32[Tensor, "groups words"], bits: int, format: str) -> UInt8[Tensor, "groups out"]:
    """`qzeros` to zero points, in v1 also where a writer took 1 from every code although some were 0.

    GPTQModel subtracts it from the whole word, so that such a code borrows from its neighbour, and adds it to the whole word again;
    at 3 bits, where codes straddle words, it wraps each code by itself. Where no zero point is 0 all ways are the same.
    """
    if format == "gptq" and bits != 3:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        qzeros = qzeros + (ones - 2**32 if ones >= 2**31 else ones)  # int32 wraps as the writer's subtraction did
    stored = unpack(qzeros.T.contiguous(), bits).T
    return ((stored + 1) & 7 if format == "gptq" and bits == 3 else stored).contiguous()
