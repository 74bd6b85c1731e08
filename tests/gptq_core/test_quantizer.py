"""Optimum's class: its documented ways of use with only the import changed."""

import copy
import gc
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny import logits, save_model, windows

from gptq_core import GPTQQuantizer, QuantizeConfig, QuantizedLinear, load_quantized, load_quantized_model
from gptq_core.errors import InputError
from gptq_core.inference.linear import to_dense
from gptq_core.model import architecture


def letters(texts, verbose=True):
    texts = [texts] if isinstance(texts, str) else texts
    return {"input_ids": [[ord(c) % 96 for c in text] for text in texts]}


@pytest.fixture
def model(tmp_path):
    folder = save_model("llama", tmp_path / "model")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


TEXTS = ["gptq_core quantizes a causal language model, block by block.", "Every linear becomes a packed one, and the rest stays."]


@pytest.mark.grid
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
    again = GPTQQuantizer.from_dict(model.config.quantization_config)  # which names the others under dynamic too
    assert sorted(again.config.modules) == sorted(sum(names, []))
    packed = {name.split(".", 3)[3] for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert packed == {"self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"}
    assert {n for g in model.config.quantization_config["modules_in_block_to_quantize"] for n in g} == packed
    with pytest.raises(InputError, match="already quantized"):
        quantizer.quantize_model(model, letters)


def test_an_unknown_module_is_named(model):
    quantizer = GPTQQuantizer(bits=4, dataset=TEXTS, group_size=32, modules_in_block_to_quantize=[["mlp.gate"]])
    with pytest.raises(InputError, match=r"no linear 'mlp.gate'.*mlp\.gate_proj"):
        quantizer.quantize_model(model, letters)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 3, "group_size": -1, "sym": False, "format": "gptq_v2", "dataset": "wikitext2", "desc_act": True},
        {"bits": 4, "recipe": "tuned"},
        {"bits": 4, "recipe": "max", "act_group_aware": False},
        {"bits": 2, "damp_percent": "auto", "backend": "gptq_marlin"},
        {"bits": 8, "modules_in_block_to_quantize": [["mlp.up_proj", "mlp.gate_proj"], ["mlp.down_proj"]], "true_sequential": False},
        {"bits": 4, "recipe": "best", "meta": {"quantizer": ["mine:1"], "note": 1}},
    ],
    ids=str,
)
def test_dict_round_trip(fields):
    quantizer = GPTQQuantizer(**fields)
    again = GPTQQuantizer.from_dict(json.loads(json.dumps(quantizer.to_dict())))
    assert again.config == quantizer.config
    assert again.to_dict() == quantizer.to_dict()


GPTQMODEL = {  # QuantizeConfig(bits=4, format="gptq_v2", act_group_aware=False).to_dict() of GPTQModel 7.7, and what 5 wrote more
    "bits": 4,
    "dynamic": None,
    "group_size": 128,
    "desc_act": False,
    "lm_head": False,
    "method": "gptq",
    "quant_method": "gptq",
    "format": "gptq_v2",
    "checkpoint_format": "gptq_v2",
    "pack_dtype": "int32",
    "sym": True,
    "adapter": None,
    "rotation": None,
    "meta": {"quantizer": ["gptqmodel:7.7.0"], "offload_to_disk_path": "a folder", "mse": 0.0, "act_group_aware": False},
}


def test_the_dict_of_gptqmodel():
    found = GPTQQuantizer.from_dict(GPTQMODEL)
    assert found.config == QuantizeConfig(bits=4, format="gptq_v2", act_group_aware=False, recipe="classic")
    assert found.meta == {"mse": 0.0, "act_group_aware": False}, "neither who made that checkpoint, nor where"


def test_what_a_dict_says_is_not_lost():
    assert GPTQQuantizer.from_dict({"bits": 4, "checkpoint_format": "gptq_v2"}).config.format == "gptq_v2"
    config = GPTQQuantizer.from_dict({"bits": 4, "static_groups": True}).config
    assert config == QuantizeConfig(bits=4, static_groups=True, recipe="classic")
    assert not GPTQQuantizer.from_dict({"bits": 4, "static_groups": False, "recipe": "tuned"}).config.static_groups


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dynamic": {"-:lm_head": {}}}, r"dynamic = .*QuantizeConfig\(dynamic"),
        ({"dynamic": {r".*\.0\.": {"bits": 8}}, "modules_in_block_to_quantize": [["a"]]}, "dynamic = "),
        ({"lm_head": True}, r"lm_head.*QuantizeConfig\(lm_head=True\)"),
        ({"quant_method": "awq"}, "quant_method = 'awq'.*gptq"),
        ({"static_groups": True, "desc_act": True}, "static_groups: true excludes desc_act"),
        ({"meta": {"recipe": "tuned"}, "bits": 5}, "bits"),
    ],
    ids=str,
)
def test_dicts_that_the_class_cannot_follow(fields, message):
    with pytest.raises(InputError, match=message):
        GPTQQuantizer.from_dict({"bits": 4} | fields)


def test_an_unknown_key_with_a_value():
    with pytest.raises(TypeError, match="bitz"):
        GPTQQuantizer.from_dict({"bits": 4, "bitz": 4})


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 5},
        {"bits": 4, "group_size": 0},
        {"bits": 4, "damp_percent": 1.0},
        {"bits": 4, "model_seqlen": 0},
        {"bits": 4, "backend": "marlyn"},
        {"bits": 4, "meta": {"folder": Path("x")}},
    ],
    ids=str,
)
def test_refused_when_made(fields):
    with pytest.raises(InputError, match=list(fields)[-1]):
        GPTQQuantizer(**fields)


WRONG = """
import sys
from gptq_core import GPTQQuantizer, load_quantized
from gptq_core.errors import InputError
calls = {
    "model_seqlen = 'x': ": lambda: GPTQQuantizer(bits=4, model_seqlen="x"),
    "model_seqlen = 1.5: ": lambda: GPTQQuantizer(bits=4, model_seqlen=1.5),
    "backend = 3: ": lambda: GPTQQuantizer(bits=4, backend=3),
    "meta = 'mine': ": lambda: GPTQQuantizer(bits=4, meta="mine"),
    "backend = 3: must be a name": lambda: load_quantized(sys.argv[1], backend=3),
    "device = 1.5: not a device": lambda: load_quantized(sys.argv[1], device=1.5),
}
for message, call in calls.items():
    try:
        call()
    except InputError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
"""


@pytest.mark.slow
def test_values_of_a_wrong_type(tmp_path):
    """In a process of its own: in this one the signatures are checked, and would be the first to complain."""
    (tmp_path / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    process = subprocess.run([sys.executable, "-c", WRONG, str(tmp_path)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


ROWS = [[1, 2], [3]]


@pytest.mark.parametrize(
    "dataset",
    [
        ROWS,
        [torch.tensor(row) for row in ROWS],
        [torch.tensor([row]) for row in ROWS],
        [{"input_ids": ROWS[0]}, torch.tensor(ROWS[1])],
        [*ROWS, []],
    ],
    ids=["lists", "1-D tensors", "2-D tensors", "mixed", "an empty one"],
)
def test_token_ids(dataset, model):
    assert GPTQQuantizer(bits=4, dataset=dataset)._windows(model, None).tokens.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (None, "dataset = None: a calibration dataset is needed; give 'wikitext2'"),
        ([], r"dataset = \[\]: a calibration dataset is needed"),
        (3, "dataset = 3: "),
        ([{"foo": 1}], r"dataset\[0\] = {'foo': 1}: not a tokenized example \(no 'input_ids'\).*a dict with input_ids"),
        ([1, 2, 3], r"dataset\[0\] = 1: not a tokenized example"),
        ([[1, 2], "text"], r"dataset\[1\] = 'text': "),
        ([[0.5]], r"dataset\[0\] = \[0.5\]: "),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], r"dataset\[0\] = .*mask"),
        (TEXTS, "tokenizer = None: a tokenizer is needed"),
    ],
    ids=str,
)
def test_datasets_that_are_none(dataset, message, model):
    with pytest.raises(InputError, match=message):
        GPTQQuantizer(bits=4, dataset=dataset).quantize_model(model)


def test_meta_is_in_both_files_and_in_the_manifest(model, tmp_path):
    quantizer = GPTQQuantizer(bits=4, group_size=32, dataset=ROWS, meta={"note": {"by": "me"}, "recipe": "max"}, recipe="tuned")
    quantizer.save(quantizer.quantize_model(model), str(tmp_path / "saved"))
    written = json.loads((tmp_path / "saved" / "quantize_config.json").read_text())
    assert written == json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert written["meta"] == quantizer.to_dict()["meta"] == model.config.quantization_config["meta"]
    assert written["meta"]["note"] == {"by": "me"}
    assert written["meta"]["recipe"] == "tuned"
    assert written["meta"]["quantizer"][0].startswith("gptq-pipeline:")
    assert GPTQQuantizer.from_dict(written).config == quantizer.config
    record = json.loads((tmp_path / "saved" / "manifest.jsonl").read_text().splitlines()[-1])
    for name in ("config.json", "quantize_config.json"):
        data = (tmp_path / "saved" / name).read_bytes()
        assert (record["files"][name], record["sha256"][name]) == (len(data), hashlib.sha256(data).hexdigest())


def test_save_writes_the_model_that_it_is_given(tmp_path):
    quantizer = GPTQQuantizer(bits=4, group_size=32, dataset=ROWS)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(save_model("llama", tmp_path / f"model{seed}", seed), dtype=torch.float32).eval()
        for seed in (0, 1)
    ]
    for quantized in models:
        quantizer.quantize_model(quantized)
    for seed, quantized in enumerate(models):
        quantizer.save(quantized, str(tmp_path / f"saved{seed}"))
        found = logits(load_quantized(tmp_path / f"saved{seed}"), windows().tokens)
        torch.testing.assert_close(found, logits(quantized, windows().tokens))
    with pytest.raises(InputError, match="has not quantized this model"):
        quantizer.save(copy.deepcopy(quantized), str(tmp_path / "copy"))
    models[1].half()  # no packed tensor changes
    quantizer.save(models[1], str(tmp_path / "half"))
    models[0].model.layers[1].mlp.up_proj.qweight[0, 0] += 1
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj is not as quantize_model left it.*save before"):
        quantizer.save(models[0], str(tmp_path / "changed"))
    with pytest.raises(InputError, match=r"q_proj is not as quantize_model left it"):
        quantizer.save(to_dense(models[1]), str(tmp_path / "dense"))
    assert not any((tmp_path / name).exists() for name in ("copy", "changed", "dense"))


def test_the_work_goes_with_the_model(model):
    quantizer = GPTQQuantizer(bits=4, group_size=32, dataset=ROWS)
    again = transformers.AutoModelForCausalLM.from_pretrained(model.config._name_or_path, dtype=torch.float32)
    quantizer.quantize_model(again)
    folder = quantizer._work[again].checkpoint
    assert folder.is_dir()
    with pytest.warns(ResourceWarning):
        del again
        gc.collect()
    assert not folder.exists()


def test_save_refusals(model, tmp_path):
    quantizer = GPTQQuantizer(bits=4, group_size=32, dataset=ROWS)
    with pytest.raises(InputError, match="nothing to save.*quantize_model"):
        quantizer.save(model, str(tmp_path / "saved"))
    quantizer.quantize_model(model)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for name, message in (("file", "no folder can be made"), ("file/x", "no folder can be made"), ("full", "already holds something")):
        with pytest.raises(InputError, match=re.escape(str(tmp_path / name)) + f".*{message}.*choose another"):
            quantizer.save(model, str(tmp_path / name))
    with pytest.raises(InputError, match="safetensors"):
        quantizer.save(model, str(tmp_path / "saved"), safe_serialization=False)


@pytest.mark.parametrize(
    ("device_map", "asked"),
    [
        *((name, "auto") for name in (None, "auto", "balanced", "balanced_low_0", "sequential")),
        (0, 0),
        ({"": 0}, 0),
        ({"": "cuda"}, "cuda"),
        ("cpu", "cpu"),
    ],
    ids=str,
)
def test_device_map_is_the_device_that_is_asked_for(device_map, asked, monkeypatch, tmp_path):
    class Chosen(Exception):
        pass

    def choose(device):
        raise Chosen(device)

    monkeypatch.setattr(architecture, "choose_device", choose)
    (tmp_path / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    with pytest.raises(Chosen) as chosen:
        load_quantized_model(None, str(tmp_path), device_map=device_map)
    assert chosen.value.args == (asked,)


def test_a_map_over_several_devices(tmp_path):
    with pytest.raises(InputError, match="onto one device; name it"):
        load_quantized_model(None, str(tmp_path), device_map={"model": 0, "lm_head": 1})
