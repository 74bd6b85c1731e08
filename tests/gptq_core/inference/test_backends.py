"""GPTQModel's kernels as far as they need no GPTQModel: names, refusals, and who is asked. tests/consumers runs the real ones."""

import sys
from types import ModuleType

import pytest
import torch
from tiny import quantize, save_model, windows

from gptq_core import GPTQQuantizer, QuantizeConfig, load_quantized, load_quantized_model
from gptq_core.checkpoint.reader import Checkpoint
from gptq_core.config import KERNELS, kernel_name
from gptq_core.errors import InputError
from gptq_core.inference import backends, evaluation
from gptq_core.inference.backends import Layer, stored
from gptq_core.model.opened import open_model

CPU = torch.device("cpu")


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "gptqmodel", None)  # what import finds where the package is not installed


@pytest.fixture
def fake(monkeypatch):
    """A gptqmodel with one class for all kernels, which takes 4 bits in float16."""

    class Linear(torch.nn.Module):
        SUPPORTS_DTYPES = [torch.float16]

        @classmethod
        def _validate(cls, bits, dtype, **_rest):
            return bits == 4, None if bits == 4 else NotImplementedError(f"{cls} only supports `[4]` bits: actual `{bits}`. Try another.")

    monkeypatch.setattr(backends, "_kernel", lambda name, backend=None: Linear)
    importer = ModuleType("importer")
    importer.validate_quant_linear = lambda linear, **asked: linear._validate(**asked)
    for name in ("gptqmodel", "gptqmodel.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "gptqmodel.utils.importer", importer)
    return Linear


@pytest.fixture
def out(tmp_path):
    quantize(save_model("llama", tmp_path / "model"), tmp_path / "out", QuantizeConfig(bits=4, group_size=32))
    return tmp_path / "out"


def test_names_with_and_without_prefix():
    assert kernel_name(None) is None
    assert kernel_name("torch") is None
    assert {kernel_name(name) for name in KERNELS} == set(KERNELS)
    assert kernel_name("marlin") == "gptq_marlin"
    assert QuantizeConfig(bits=4, backend="marlin").backend == "marlin"


@pytest.mark.parametrize("load", [load_quantized, lambda path, backend: load_quantized_model(None, str(path), backend)])
def test_a_backend_that_is_none(load, out):
    with pytest.raises(InputError, match=r"backend = 'marlyn': did you mean 'gptq_marlin'\?"):
        load(out, backend="marlyn")


def test_without_the_package(absent, out):
    assert load_quantized(out, backend="torch").training is False
    for use in (
        lambda: load_quantized(out, backend="marlin"),
        lambda: load_quantized_model(None, str(out), "gptq_torch"),
        lambda: evaluation.evaluate_one(str(out), windows(), device="cpu", backend="gptq_torch"),
    ):
        with pytest.raises(InputError, match=r"needs the package gptqmodel.*pip install 'gptq-pipeline\[kernels\]'"):
            use()


def test_the_quantizer_refuses_before_it_works(absent, tmp_path, monkeypatch):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(save_model("llama", tmp_path / "model"), dtype=torch.float16)
    monkeypatch.setattr("gptq_core.run.engine.Quantization.capture", lambda self: pytest.fail("it began"))
    with pytest.raises(InputError, match="gptqmodel"):
        GPTQQuantizer(bits=4, group_size=32, dataset=[[1, 2, 3]], backend="gptq_torch").quantize_model(model)


def test_layers_are_told_by_their_tensors(tmp_path):
    config = QuantizeConfig(bits=3, group_size=32, desc_act=True, sym=False, format="gptq_v2")
    quantize(save_model("llama", tmp_path / "model"), tmp_path / "out", config)
    found = set(stored(Checkpoint(tmp_path / "out"), "gptq_v2"))
    assert found == {Layer.planned(config, *size) for size in [(64, 64), (64, 32), (64, 128), (128, 64)]}
    row = QuantizeConfig(bits=4, group_size=-1, desc_act=True)
    assert Layer.planned(row, 64, 32) == Layer(4, -1, False, True, 64, 32)  # in one group every order is in order
    assert Layer.planned(QuantizeConfig(bits=4, group_size=64), 64, 32).group_size == -1


def test_an_impossible_kernel_names_the_possible_ones(fake):
    three = Layer(3, 32, False, True, 64, 128)
    with pytest.raises(InputError) as caught:
        backends.choose("marlin", [Layer(4, 32, False, True, 64, 64), three], CPU)
    assert str(caught.value) == (
        "backend = 'marlin': only supports `[4]` bits: actual `3` (a layer of 3 bits, group_size 32, desc_act False, sym True, "
        "64 x 128; float16 on cpu); the checkpoint and the device allow torch"
    )
    with pytest.raises(InputError, match=r"every zero point as the middle one.*allow torch, gptq_torch, gptq_torch_int8, "):
        backends.choose("gptq_torch_fused", [Layer(4, 32, False, False, 64, 64)], CPU)


def test_dtype_is_asked_for_or_one_that_the_kernel_takes(fake):
    fake.SUPPORTS_DTYPES = [torch.float16, torch.bfloat16]
    assert backends.choose("marlin", [], CPU).dtype == torch.float16
    assert backends.choose("marlin", [], CPU, None, torch.bfloat16).dtype == torch.bfloat16
    assert backends.choose("marlin", [], CPU, torch.float16, torch.bfloat16).dtype == torch.float16
    fake.SUPPORTS_DTYPES = [torch.float32, torch.float16]
    assert backends.choose("marlin", [], CPU, None, torch.float16).dtype == torch.float32


def test_load_quantized_hands_over_every_packed_linear(fake, out, monkeypatch):
    seen = {}
    monkeypatch.setattr(backends, "put_in", lambda model, names, kernel: seen.update(names=names, kernel=kernel))
    model = load_quantized(out, backend="marlin")
    assert len(seen["names"]) == 14
    assert seen["kernel"].name == "gptq_marlin"
    assert model.dtype == seen["kernel"].dtype == torch.float16


def test_evaluation_runs_the_checkpoint_by_the_backend_and_the_original_not(out, tmp_path, monkeypatch):
    asked = []

    original, checkpoint = save_model("llama", tmp_path / "original"), str(out)

    def load(model, device="auto", revision=None, backend=None):
        asked.append((open_model(model).folder, backend))
        return load_quantized(out)

    monkeypatch.setattr(evaluation, "load_for_evaluation", load)
    evaluation.evaluate_pair(str(original), checkpoint, windows(), device="cpu", backend="marlin")
    evaluation.evaluate_one(checkpoint, windows(), device="cpu", backend="marlin")
    assert asked == [(out, "marlin"), (original, None), (out, "marlin")]


def test_a_dense_model_has_no_use_for_a_kernel(fake, tmp_path):
    with pytest.raises(InputError, match="not a GPTQ checkpoint"):
        evaluation.evaluate_one(str(save_model("llama", tmp_path / "model")), windows(), device="cpu", backend="marlin")
