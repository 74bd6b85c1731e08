import pytest
import torch

from gptq_core.kernels import processor


@pytest.mark.parametrize("found", ["avx512_bf16", "amx_bf16", "bf16", "avx512"])
def test_the_processor_is_asked(found, monkeypatch):
    processor._capabilities.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {found: True, "avx2": True})
    assert processor.multiplies_in_bfloat16() is (found != "avx512") and processor.has_avx512_bf16() is (found == "avx512_bf16")
    processor._capabilities.cache_clear()
