import json

import pytest
import torch
import transformers
from tiny import logits, quantize, save_model, windows

from gptq_core import QuantizeConfig, load_quantized
from gptq_core.errors import InputError
from gptq_core.inference.dequantize import dequantize_checkpoint


@pytest.mark.grid
@pytest.mark.parametrize(
    "config", [QuantizeConfig(bits=3, group_size=32, sym=False, format="gptq_v2"), QuantizeConfig(bits=4, group_size=-1, desc_act=True)]
)
@pytest.mark.parametrize("architecture", ["opt", "qwen2_tied_with_bias"])
def test_the_dense_twin_has_the_same_logits_in_transformers(architecture, config, tmp_path):
    quantize(save_model(architecture, tmp_path / "model"), tmp_path / "out", config)
    dequantize_checkpoint(tmp_path / "out", tmp_path / "dense")
    dense, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = logits(load_quantized(tmp_path / "out"), windows().tokens)
    torch.testing.assert_close(logits(dense.eval(), windows().tokens), expected, rtol=1e-5, atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_refusals(tmp_path):
    model = save_model("llama", tmp_path / "model")
    with pytest.raises(InputError, match="not a GPTQ checkpoint"):
        dequantize_checkpoint(model, tmp_path / "dense")
    quantize(model, tmp_path / "out", QuantizeConfig(bits=4, group_size=32))
    with pytest.raises(InputError, match="exists already"):
        dequantize_checkpoint(tmp_path / "out", model)
    for out in (tmp_path / "out" / "config.json" / "x", tmp_path / ("x" * 300), "/proc/x"):
        with pytest.raises(InputError, match="no folder can be made there .*; name another"):
            dequantize_checkpoint(tmp_path / "out", out)
