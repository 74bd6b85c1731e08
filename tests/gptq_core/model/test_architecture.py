"""In which dtype a model runs: what `auto` makes of the checkpoint's own and of the machine."""

import pytest
import torch
from transformers import LlamaConfig

from gptq_core.model import architecture
from gptq_core.model.architecture import choose_dtype, judging_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[True, False], ids=["multiplies in bfloat16", "does not"])
def fast(request, monkeypatch):
    monkeypatch.setattr(architecture, "multiplies_in_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, None])
def test_auto_is_bfloat16_on_a_cpu_only_where_model_and_processor_have_it(stored, fast):
    config = LlamaConfig(dtype=stored)
    is_bfloat16 = stored in (torch.bfloat16, None)  # what does not say is taken for bfloat16
    assert choose_dtype("auto", config, CPU) == (torch.bfloat16 if fast and is_bfloat16 else torch.float32)
    assert choose_dtype("auto", config, GPU) == (stored or torch.bfloat16)
    assert judging_dtype(config, CPU) == torch.float32 and judging_dtype(config, GPU) == (stored or torch.bfloat16)


def test_a_dtype_that_is_named_is_taken(fast):
    assert choose_dtype("float32", LlamaConfig(dtype=torch.bfloat16), CPU) == torch.float32
    assert choose_dtype("bfloat16", LlamaConfig(dtype=torch.float32), CPU) == torch.bfloat16
