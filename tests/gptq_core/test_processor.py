import pytest
import torch

from gptq_core.processor import multiplies_in_bfloat16


@pytest.mark.parametrize("found", ["avx512_bf16", "amx_bf16", "bf16", "avx512"])
def test_the_processor_is_asked(found, monkeypatch):
    multiplies_in_bfloat16.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {found: True, "avx2": True})
    assert multiplies_in_bfloat16() is (found != "avx512")
    multiplies_in_bfloat16.cache_clear()
