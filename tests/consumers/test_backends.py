"""GPTQModel's kernels under our checkpoints: by their names, on the CPU, against our own logits.

Needs gptqmodel 7.7, which nothing here installs (the extra `kernels` does); without it these tests are left out, with the reason:

    HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= python -m pytest tests/consumers/test_backends.py

A kernel that must be compiled needs a C++ compiler; one that the processor cannot run must say so.
"""

import pytest
import torch
from tiny import bytes_of, logits, quantize, save_model, windows

from gptq_core import GPTQQuantizer, QuantizeConfig, QuantizedLinear, evaluate_pair, load_quantized
from gptq_core.config import KERNELS
from gptq_core.errors import InputError
from gptq_core.inference.backends import REMEDY

gptqmodel = pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
pytestmark = pytest.mark.consumers

ON_CPU = {
    "gptq_torch": [
        {"bits": 4, "group_size": 32},
        {"bits": 4, "group_size": 32, "sym": False},
        {"bits": 3, "group_size": -1, "format": "gptq_v2"},
        {"bits": 2, "group_size": 32, "sym": False, "format": "gptq_v2", "desc_act": True},
        {"bits": 8, "group_size": 64, "desc_act": True},
        {"bits": 4, "group_size": 32, "dynamic": {r".*down_proj": {"bits": 8, "group_size": 64}}},
    ],
    "gptq_torch_fused": [{"bits": 4, "group_size": -1}, {"bits": 4, "group_size": 32, "desc_act": True, "format": "gptq_v2"}],
    "gptq_torch_aten": [{"bits": 4, "group_size": 32}, {"bits": 4, "group_size": 32, "desc_act": True, "sym": False}],
    "gptq_torch_cpu_avx512": [{"bits": 4, "group_size": 32}, {"bits": 4, "group_size": 16, "desc_act": True, "sym": False}],
    "gptq_torch_int8": [{"bits": 8, "group_size": 32}, {"bits": 8, "group_size": 32, "sym": False, "format": "gptq_v2", "desc_act": True}],
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2_tied_with_bias"])
@pytest.mark.parametrize(("name", "fields"), [(name, fields) for name, some in ON_CPU.items() for fields in some], ids=str)
def test_a_kernel_gives_our_logits(name, fields, architecture, tmp_path):
    quantize(save_model(architecture, tmp_path / "model"), tmp_path / "out", QuantizeConfig(**fields))
    expected = logits(load_quantized(tmp_path / "out"), windows().tokens)
    try:
        model = load_quantized(tmp_path / "out", backend=name)
    except InputError as error:
        if "requires Linux on x86-64 with" in str(error):  # a processor without AVX512-BF16
            pytest.skip(str(error))
        raise
    assert not model.training
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    found = logits(model, windows().tokens).float()
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in ON_CPU])
def test_a_kernel_for_gpus_on_the_cpu(name, tmp_path):
    quantize(save_model("llama", tmp_path / "model"), tmp_path / "out", QuantizeConfig(bits=4, group_size=32))
    with pytest.raises(InputError) as caught:
        load_quantized(tmp_path / "out", backend=name)
    assert str(caught.value).startswith(f"backend = {name!r}: ")
    assert str(caught.value).endswith("allow torch, gptq_torch, gptq_torch_fused, gptq_torch_aten, gptq_torch_cpu_avx512")
    assert REMEDY not in str(caught.value)  # it is installed


@pytest.mark.parametrize(
    ("name", "fields", "allowed"),
    [
        ("gptq_torch_aten", {"bits": 3, "group_size": 32}, "torch, gptq_torch"),
        ("gptq_torch_fused", {"bits": 8, "group_size": 32}, "torch, gptq_torch, gptq_torch_int8"),
        ("gptq_torch_fused", {"bits": 4, "group_size": 32, "sym": False}, "torch, gptq_torch, gptq_torch_aten, gptq_torch_cpu_avx512"),
        ("gptq_torch_cpu_avx512", {"bits": 4, "group_size": -1}, "torch, gptq_torch, gptq_torch_fused"),
    ],
    ids=str,
)
def test_an_impossible_kernel_names_the_possible_ones(name, fields, allowed, tmp_path):
    quantize(save_model("llama", tmp_path / "model"), tmp_path / "out", QuantizeConfig(**fields))
    with pytest.raises(InputError) as caught:
        load_quantized(tmp_path / "out", backend=name)
    assert str(caught.value).endswith(f"; the checkpoint and the device allow {allowed}")
    assert f"{fields['bits']} bits, group_size {fields['group_size']}, " in str(caught.value)


def test_a_dtype_that_the_kernel_does_not_take(tmp_path):
    quantize(save_model("llama", tmp_path / "model"), tmp_path / "out", QuantizeConfig(bits=4, group_size=32))
    with pytest.raises(InputError, match=r"float32.*allow torch, gptq_torch_fused$"):
        load_quantized(tmp_path / "out", backend="gptq_torch", dtype=torch.float32)


def test_the_quantizer_puts_the_kernel_into_the_model(tmp_path, capsys):
    import transformers

    folder = save_model("llama", tmp_path / "model")
    made = {}
    for backend in (None, "gptq_torch"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
        quantizer = GPTQQuantizer(bits=4, group_size=32, dataset=[windows().tokens.flatten().tolist()], backend=backend)
        made[backend] = logits(quantizer.quantize_model(model, None), windows().tokens).float()
        assert any(isinstance(module, QuantizedLinear) for module in model.modules()) == (backend is None)
        quantizer.save(model, str(tmp_path / str(backend)))
    assert float((made[None] - made["gptq_torch"]).abs().max()) < 0.02 * float(made[None].abs().max())
    assert bytes_of(tmp_path / "None") == bytes_of(tmp_path / "gptq_torch")  # who runs it changes nothing of what is written
    assert "GPT-QModel" not in capsys.readouterr().out


def test_evaluation_by_a_kernel_agrees_with_our_own(tmp_path):
    folder = save_model("llama", tmp_path / "model")
    quantize(folder, tmp_path / "out", QuantizeConfig(bits=3, group_size=32))
    ours, theirs = (evaluate_pair(str(folder), str(tmp_path / "out"), windows(), device="cpu", backend=b) for b in (None, "gptq_torch"))
    assert theirs["original_perplexity"] == ours["original_perplexity"]
    assert theirs["quantized_perplexity"] == pytest.approx(ours["quantized_perplexity"], rel=2e-3)
    assert theirs["quantized_perplexity"] != ours["quantized_perplexity"]  # it was another that ran it
