import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import logits, quantize, save_model, windows

from gptq_core import QuantizeConfig, QuantizedLinear, load_quantized
from gptq_core.errors import InputError
from gptq_core.inference.linear import to_dense
from gptq_core.model.architecture import choose_device


def test_scales_stay_float16_whatever_the_model_is_cast_to(tmp_path):
    quantize(save_model("llama", tmp_path / "model"), tmp_path / "out", QuantizeConfig(bits=4, group_size=32))
    model = load_quantized(tmp_path / "out")
    before = logits(model, windows().tokens)
    assert torch.equal(logits(model.to(torch.bfloat16).to(torch.float32), windows().tokens), before) is False  # norms did round
    fresh = load_quantized(tmp_path / "out")
    layer, recast = fresh.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantizedLinear)
    assert recast.scales.dtype == torch.float16
    assert torch.equal(recast.weight_in(torch.float32), layer.weight_in(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_the_arithmetic(dtype, tmp_path):
    quantize(save_model("llama", tmp_path / "model"), tmp_path / "out", QuantizeConfig(bits=4, group_size=32))
    model = load_quantized(tmp_path / "out", dtype=dtype)
    found = logits(model, windows().tokens)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), logits(load_quantized(tmp_path / "out"), windows().tokens), rtol=0.05, atol=0.02)


def test_a_dense_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a GPTQ checkpoint"):
        load_quantized(save_model("llama", tmp_path / "model"))


def test_dense_twin_has_the_same_logits_and_no_packed_parts(tmp_path):
    quantize(save_model("opt", tmp_path / "model"), tmp_path / "out", QuantizeConfig(bits=3, group_size=32, desc_act=True))
    model = load_quantized(tmp_path / "out")
    before = logits(model, windows().tokens)
    dense = to_dense(model)
    assert not any(isinstance(module, QuantizedLinear) for module in dense.modules())
    assert torch.equal(logits(dense, windows().tokens), before)


def test_groups_counted_from_the_end_and_a_missing_g_idx(tmp_path):
    """Other writers store negative group indices, or none where they are trivial."""
    quantize(save_model("llama", tmp_path / "model"), tmp_path / "out", QuantizeConfig(bits=4, group_size=32))
    before = logits(load_quantized(tmp_path / "out"), windows().tokens)
    for number, shard in enumerate(sorted((tmp_path / "out").glob("*.safetensors"))):
        tensors = load_file(shard)
        for name in [name for name in tensors if name.endswith("g_idx")]:
            if number == 0:
                tensors[name] = tensors[name] - (tensors[name].max() + 1)
            else:
                del tensors[name]
        save_file(tensors, shard, {"format": "pt"})
    assert torch.equal(logits(load_quantized(tmp_path / "out"), windows().tokens), before)


@pytest.fixture
def gpus(monkeypatch):
    """Sets how many GPUs torch sees."""

    def see(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda") if count else None)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)

    return see


def test_devices(gpus):
    gpus(2)
    for device, expected in {
        "auto": "cuda",
        "cuda": "cuda",
        0: "cuda:0",
        1: "cuda:1",
        "cpu": "cpu",
        torch.device("cuda:1"): "cuda:1",
    }.items():
        assert choose_device(device) == torch.device(expected)
    gpus(0)
    assert choose_device("auto") == choose_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("count", "device", "message"),
    [
        *((0, device, "sees no GPU; use 'cpu' or 'auto'") for device in (0, "cuda", "cuda:1", torch.device("cuda"))),
        (2, 2, "sees 2 of type cuda, counted from 0"),
        (2, "xpu", "sees no xpu"),
        *((2, device, "not a device; use 'cpu', 'cuda'") for device in ("gpu", "", "0", -1, True)),
    ],
    ids=str,
)
def test_devices_that_are_not_there(count, device, message, gpus, tmp_path):
    gpus(count)
    (tmp_path / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    with pytest.raises(InputError, match=f"device = .*{message}"):
        load_quantized(tmp_path, device=device)
