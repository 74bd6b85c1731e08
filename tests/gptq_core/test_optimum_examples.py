"""The examples of Optimum's documentation and docstrings, with the import changed and nothing else.

There is no hub here: tiny models stand for facebook/opt-125m, and the hub's texts are answered with a local one.
"""

import json

import pytest
import torch
from tiny import logits, save_model, windows
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

from gptq_core import GPTQQuantizer, QuantizedLinear, load_quantized, load_quantized_model

pytestmark = pytest.mark.slow

WIDE = {"hidden_size": 128, "ffn_dim": 256, "word_embed_proj_dim": 128, "vocab_size": 384, "max_position_embeddings": 2048}
TEXT = "auto-gptq is an easy-to-use model quantization library with user-friendly apis, based on the GPTQ algorithm."


@pytest.fixture(scope="module")
def model_name(tmp_path_factory, tiny_llama):
    """An OPT with a tokenizer."""
    folder = save_model("opt", tmp_path_factory.mktemp("optimum") / "opt", **WIDE)
    for path in tiny_llama.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return str(folder)


@pytest.fixture
def model(model_name):
    return AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)


@pytest.fixture
def tokenizer(model_name):
    return AutoTokenizer.from_pretrained(model_name)


@pytest.fixture
def hub(monkeypatch, corpus):
    """Every dataset of the hub is the local text; what was asked for is kept."""
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or [{"text": corpus.read_text()}])
    return asked


def empty(model_name):
    from accelerate import init_empty_weights

    with init_empty_weights():
        empty_model = AutoModelForCausalLM.from_pretrained(model_name, torch_dtype=torch.float16)
    empty_model.tie_weights()
    return empty_model


def packed(model):
    return sum(isinstance(module, QuantizedLinear) for module in model.modules())


def test_quantize_save_and_load(model_name, tokenizer, hub, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_name, torch_dtype=torch.float16)
    quantizer = GPTQQuantizer(bits=4, dataset="c4", block_name_to_quantize="model.decoder.layers", model_seqlen=2048)
    quantized_model = quantizer.quantize_model(model, tokenizer)
    assert hub[0][0][0] == "allenai/c4"
    assert packed(quantized_model) == 12
    save_folder = str(tmp_path / "save_folder") + "/"
    quantizer.save(model, save_folder)
    loaded = load_quantized_model(empty(model_name), save_folder=save_folder, device_map="auto")
    assert packed(loaded) == 12
    expected = logits(quantized_model, windows().tokens).float()
    # the model itself stayed in float16
    torch.testing.assert_close(logits(loaded, windows().tokens).float(), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


@pytest.mark.grid
@pytest.mark.parametrize("name", ["wikitext2", "c4", "c4-new"])
def test_the_datasets_of_the_paper(name, model, tokenizer, hub):
    assert packed(GPTQQuantizer(bits=4, dataset=name, model_seqlen=64).quantize_model(model, tokenizer)) == 12
    assert hub


def test_texts_of_ones_own(model, tokenizer):
    assert packed(GPTQQuantizer(bits=4, dataset=[TEXT]).quantize_model(model, tokenizer)) == 12


def test_a_tokenizer_by_name(model, model_name):
    assert packed(GPTQQuantizer(bits=4, dataset=[TEXT]).quantize_model(model, model_name)) == 12


TOKENIZED = {
    "lists": lambda tokenizer: [{"input_ids": [1, 100, 15, 8], "attention_mask": [1, 1, 1, 1]}, {"input_ids": [7], "attention_mask": [1]}],
    "batched lists": lambda tokenizer: [{"input_ids": [[1, 100, 15, 8]], "attention_mask": [[1, 1, 1, 1]]}],
    "tensors": lambda tokenizer: [{"input_ids": torch.tensor([[1, 100, 15]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}],
    "without a mask": lambda tokenizer: [{"input_ids": [1, 100, 15, 8]}],
    "a tokenizer's output": lambda tokenizer: [tokenizer(TEXT)],
    "a tokenizer's tensors": lambda tokenizer: [tokenizer(TEXT, return_tensors="pt")],
}


@pytest.mark.grid
@pytest.mark.parametrize("kind", TOKENIZED)
def test_tokenized_data(kind, model, tokenizer):
    examples = TOKENIZED[kind](tokenizer)
    assert packed(GPTQQuantizer(bits=4, dataset=examples).quantize_model(model)) == 12
    ids = [torch.as_tensor(example["input_ids"]).flatten().tolist() for example in examples]
    seen = GPTQQuantizer(bits=4, dataset=examples)._windows(model, None)
    assert seen.tokens.flatten().tolist() == sum(ids, [])


def test_padded_batches(model):
    """batch_size and pad_token_id, which Optimum needs for batches, change nothing here: nothing is padded."""
    examples = [{"input_ids": [1, 2, 3, 4], "attention_mask": [1, 1, 1, 1]}, {"input_ids": [5, 6], "attention_mask": [1, 1]}]
    assert packed(GPTQQuantizer(bits=4, dataset=examples, batch_size=2, pad_token_id=1).quantize_model(model)) == 12


@pytest.mark.grid
@pytest.mark.parametrize("fields", [{"desc_act": True}, {"group_size": -1}, {"sym": False}, {"true_sequential": False}], ids=str)
def test_one_option_alone(fields, model, tokenizer, tmp_path):
    """desc_act=True and group_size=-1 raise in Optimum when everything else is left at its default."""
    quantizer = GPTQQuantizer(bits=4, dataset=[TEXT], **fields)
    quantizer.quantize_model(model, tokenizer)
    quantizer.save(model, str(tmp_path / "saved"))
    written = json.loads((tmp_path / "saved" / "quantize_config.json").read_text())
    assert fields.items() <= written.items()
    torch.testing.assert_close(logits(load_quantized(tmp_path / "saved"), windows().tokens), logits(model, windows().tokens))


def test_modules_of_the_docstring(model, tokenizer):
    modules = [["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"], ["self_attn.out_proj"]]
    quantizer = GPTQQuantizer(bits=4, dataset=[TEXT], modules_in_block_to_quantize=modules)
    assert packed(quantizer.quantize_model(model, tokenizer)) == 8


def test_from_the_dict_of_a_gptq_config(model, tokenizer):
    """What transformers hands to Optimum: GPTQConfig's dict, with its tokenizer and the fields that are about loading."""
    config = GPTQConfig(bits=3, dataset=[TEXT], tokenizer=tokenizer, group_size=64, desc_act=True)
    quantizer = GPTQQuantizer.from_dict(config.to_dict())
    assert (quantizer.config.bits, quantizer.config.group_size, quantizer.config.desc_act) == (3, 64, True)
    assert packed(quantizer.quantize_model(model, tokenizer)) == 12


def test_from_the_dict_in_a_saved_folder(model, tokenizer, tmp_path):
    quantizer = GPTQQuantizer(bits=8, dataset=[TEXT], sym=False, format="gptq_v2")
    quantizer.quantize_model(model, tokenizer)
    quantizer.save(model, str(tmp_path / "saved"))
    for name, key in (("quantize_config.json", None), ("config.json", "quantization_config")):
        found = json.loads((tmp_path / "saved" / name).read_text())
        assert GPTQQuantizer.from_dict(found[key] if key else found).config == quantizer.config


@pytest.mark.parametrize("backend", ["auto", "AUTO"])
def test_the_default_backend_of_optimum(backend, model, tokenizer):
    assert packed(GPTQQuantizer(bits=4, dataset=[TEXT], backend=backend).quantize_model(model, tokenizer)) == 12


@pytest.fixture(scope="module")
def save_folder(model_name, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("optimum") / "saved")
    quantizer = GPTQQuantizer(bits=4, dataset=[TEXT])
    quantizer.save(quantizer.quantize_model(AutoModelForCausalLM.from_pretrained(model_name), model_name), folder)
    return folder


@pytest.mark.grid
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"backend": "auto"},
        {"device_map": "auto", "max_memory": {"cpu": "10GB"}},
        {"device_map": {"": "cpu"}, "no_split_module_classes": ["OPTDecoderLayer"]},
        {"quant_config_name": "quantize_config.json", "state_dict_name": None},
        {"offload_folder": None, "offload_buffers": None, "offload_state_dict": False},
    ],
    ids=str,
)
def test_the_arguments_of_the_loader(arguments, save_folder, model_name):
    assert packed(load_quantized_model(empty(model_name), save_folder=save_folder, **arguments)) == 12
