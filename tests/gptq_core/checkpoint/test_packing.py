"""The golden words of the format, and round trips against a bit-by-bit oracle."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import slow_pack

from gptq_core.checkpoint.packing import pack, pack_zeros, unpack, unpack_zeros
from gptq_core.kernels import dispatch

GOLDEN_COUNTING = {
    2: "E4E4E4E4 E4E4E4E4",
    3: "88FAC688 C688FAC6 FAC688FA",
    4: "76543210 FEDCBA98 76543210 FEDCBA98",
    8: "03020100 07060504 0B0A0908 0F0E0D0C 13121110 17161514 1B1A1918 1F1E1D1C",
}
GOLDEN_SYMMETRIC = {
    ("gptq_v2", 2): "AAAAAAAA",
    ("gptq_v2", 3): "24924924 49249249 92492492",
    ("gptq_v2", 4): "88888888",
    ("gptq_v2", 8): "80808080",
    ("gptq", 2): "55555555",
    ("gptq", 3): "DB6DB6DB B6DB6DB6 6DB6DB6D",
    ("gptq", 4): "77777777",
    ("gptq", 8): "7F7F7F7F",
}


def hexadecimal(words: torch.Tensor) -> str:
    return " ".join(f"{w & 0xFFFFFFFF:08X}" for w in words.tolist())


@pytest.mark.parametrize("bits", GOLDEN_COUNTING)
def test_golden_counting_codes(bits):
    codes = (torch.arange(32) % 2**bits).to(torch.uint8).unsqueeze(1)
    assert hexadecimal(pack(codes, bits)[:, 0]) == GOLDEN_COUNTING[bits]


@pytest.mark.parametrize(("format", "bits"), GOLDEN_SYMMETRIC)
def test_golden_symmetric_zeros(format, bits):
    zeros = torch.full((1, 32), 2 ** (bits - 1), dtype=torch.uint8)
    words = pack_zeros(zeros, bits, format)[0]
    pattern = GOLDEN_SYMMETRIC[format, bits].split()
    assert hexadecimal(words) == " ".join(pattern * (len(words) // len(pattern)))
    assert torch.equal(unpack_zeros(words.unsqueeze(0), bits, format), zeros)


@pytest.mark.grid
@pytest.mark.parametrize("in_c", [True, False])
@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    units=st.integers(1, 4),
    columns=st.sampled_from([1, 2, 5, 63, 64, 130]),
    apart=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_round_trip_and_oracle(in_c, bits, units, columns, apart, seed):
    if in_c and not dispatch.compiles():
        pytest.skip("no C compiler")
    codes = torch.randint(0, 2**bits, (32 * units, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    if apart:  # a row does not lie together
        codes = codes.T.contiguous().T
    with patch.object(dispatch, "compiles", lambda: in_c):
        words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (units * bits, columns)
    assert torch.equal(words, slow_pack(codes, bits))
    assert torch.equal(unpack(words, bits), codes)


def test_v1_refuses_a_zero_point_of_zero():
    with pytest.raises(AssertionError, match="zero point of 0"):
        pack_zeros(torch.zeros(1, 32, dtype=torch.uint8), 4, "gptq")


@pytest.mark.parametrize("bits", GOLDEN_COUNTING)
def test_v1_of_another_writer_with_zero_points_of_zero_is_read_as_it_was_meant(bits):
    """GPTQModel takes 1 from every code of a word at once, so that zeros borrow from their neighbours; at 3 bits, from each code."""
    zeros = torch.randint(0, 2**bits, (3, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert bool((zeros == 0).any())
    if bits == 3:
        stored = pack(((zeros.int() - 1) % 8).to(torch.uint8).T.contiguous(), bits).T
    else:
        true = pack(zeros.T.contiguous(), bits).T.to(torch.int64) & 0xFFFFFFFF
        stored = ((true - sum(1 << shift for shift in range(0, 32, bits))) & 0xFFFFFFFF).to(torch.int32)
    assert torch.equal(unpack_zeros(stored.contiguous(), bits, "gptq"), zeros)
