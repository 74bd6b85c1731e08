"""Optimum's class: its documented ways of use with only the import changed."""

import json

import pytest
import torch
import transformers
from tiny import logits, save_model, windows

from gptq_core import GPTQQuantizer, QuantizedLinear, load_quantized, load_quantized_model
from gptq_core.errors import InputError


def letters(texts, verbose=True):
    texts = [texts] if isinstance(texts, str) else texts
    return {"input_ids": [[ord(c) % 96 for c in text] for text in texts]}


@pytest.fixture
def model(tmp_path):
    folder = save_model("llama", tmp_path / "model")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


TEXTS = ["gptq_core quantizes a causal language model, block by block.", "Every linear becomes a packed one, and the rest stays."]


@pytest.mark.parametrize("fields", [{"group_size": 32}, {"group_size": -1}, {"group_size": 32, "desc_act": True}], ids=str)
def test_quantize_and_save(fields, model, tmp_path):
    """With everything else at its default; group_size -1 and desc_act=True are where Optimum raises."""
    before = logits(model, windows().tokens)
    quantizer = GPTQQuantizer(bits=4, dataset=TEXTS, **fields)
    quantized = quantizer.quantize_model(model, letters)
    assert quantized is model
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
    after = logits(model, windows().tokens)
    assert not torch.equal(after, before)
    quantizer.save(quantized, str(tmp_path / "saved"))
    torch.testing.assert_close(logits(load_quantized(tmp_path / "saved"), windows().tokens), after)
    torch.testing.assert_close(logits(load_quantized_model(None, str(tmp_path / "saved")), windows().tokens), after)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "saved" / "quantize_config.json").read_text())
    assert config["desc_act"] == fields.get("desc_act", False)
    record = json.loads((tmp_path / "saved" / "manifest.jsonl").read_text().splitlines()[0])
    assert record["tokens"] == {"source": "2 texts", "windows": 1, "of": 1, "seqlen": 64}


def test_tokenized_examples_lose_their_padding(model):
    examples = [
        {"input_ids": [[1, 2, 3, 0]], "attention_mask": [[1, 1, 1, 0]]},
        {"input_ids": torch.tensor([4, 5, 6]), "attention_mask": torch.ones(3)},
    ]
    found = GPTQQuantizer(bits=4, dataset=examples)._windows(model, None)
    assert found.tokens.tolist() == [[1, 2, 3, 4, 5, 6]]


def test_model_seqlen_sets_the_windows(model):
    assert GPTQQuantizer(bits=4, dataset=TEXTS, model_seqlen=16)._windows(model, letters).seqlen == 16


def test_only_the_named_modules(model, tmp_path):
    names = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"]]
    quantizer = GPTQQuantizer(bits=4, dataset=TEXTS, group_size=32, modules_in_block_to_quantize=names)
    quantizer.quantize_model(model, letters)
    packed = {name.split(".", 3)[3] for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert packed == {"self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"}
    assert {n for g in model.config.quantization_config["modules_in_block_to_quantize"] for n in g} == packed
    with pytest.raises(InputError, match="already quantized"):
        quantizer.quantize_model(model, letters)


def test_an_unknown_module_is_named(model):
    quantizer = GPTQQuantizer(bits=4, dataset=TEXTS, group_size=32, modules_in_block_to_quantize=[["mlp.gate"]])
    with pytest.raises(InputError, match=r"no linear 'mlp.gate'.*mlp\.gate_proj"):
        quantizer.quantize_model(model, letters)


def test_dict_round_trip():
    quantizer = GPTQQuantizer(bits=3, group_size=-1, sym=False, format="gptq_v2", dataset="wikitext2", desc_act=True)
    again = GPTQQuantizer.from_dict(quantizer.to_dict())
    assert again.config == quantizer.config
    assert again.to_dict() == quantizer.to_dict()
    with pytest.raises(TypeError, match="bitz"):
        GPTQQuantizer.from_dict({"bits": 4, "bitz": 4})


@pytest.mark.parametrize(
    "fields", [{"bits": 5}, {"bits": 4, "group_size": 0}, {"bits": 4, "damp_percent": 1.0}, {"bits": 4, "model_seqlen": 0}]
)
def test_refused_when_made(fields):
    with pytest.raises(InputError, match=list(fields)[-1]):
        GPTQQuantizer(**fields)


def test_save_refusals(model, tmp_path):
    with pytest.raises(InputError, match="nothing to save"):
        GPTQQuantizer(bits=4).save(model, str(tmp_path / "saved"))
    with pytest.raises(InputError, match="tokenizer"):
        GPTQQuantizer(bits=4, dataset=TEXTS).quantize_model(model)
