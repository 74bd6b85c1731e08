"""Model folders that are damaged or make no sense: one line with file and remedy, and never a traceback."""

import json
import shutil

import pytest
from tiny import save_model

from gptq_core import QuantizeConfig
from gptq_core.data.tokenizer import load_tokenizer, model_limits
from gptq_core.errors import InputError
from gptq_core.planning.plan import plan

CONFIGS = {
    "no heads": {"num_attention_heads": 0},
    "no layers": {"num_hidden_layers": 0},
    "fewer than no layers": {"num_hidden_layers": -1},
    "half a layer": {"num_hidden_layers": 2.5},
    "layers that are null": {"num_hidden_layers": None},
    "a million layers": {"num_hidden_layers": 1_000_000},
    "no hidden size": {"hidden_size": 0},
    "a hidden size beyond memory": {"hidden_size": 10**12},
    "a negative head": {"head_dim": -4},
    "an intermediate size in words": {"intermediate_size": "many"},
    "an empty vocabulary": {"vocab_size": 0},
    "a vocabulary in words": {"vocab_size": "many"},
    "an unknown activation": {"hidden_act": "nope"},
    "an unknown rope": {"rope_parameters": {"rope_type": "nope", "rope_theta": 1.0}},
    "junk for rope": {"rope_parameters": [[[]]]},
    "heads that do not divide": {"num_key_value_heads": 3},
    "an unknown dtype": {"dtype": "nope"},
    "an unknown type": {"model_type": "nope"},
    "a type that is a number": {"model_type": 3},
    "a type that is a list": {"model_type": ["llama"]},
    "a type that is no language model": {"model_type": "vit"},
    "a quantization that is a number": {"quantization_config": 3},
    "remote code": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}},
    "an epsilon in words": {"rms_norm_eps": "small"},
    "a list": [],
    "words": "config",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("malformed") / "model")


@pytest.fixture
def copy(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_makes_no_sense_is_refused_in_one_line(change, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change if isinstance(change, dict) else change))
    with pytest.raises(InputError) as refused:
        plan(str(copy), QuantizeConfig(bits=4, group_size=32))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "\x00", "{}", "null"])
def test_a_config_that_cannot_be_read_is_refused(text, copy):
    (copy / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        plan(str(copy), QuantizeConfig(bits=4, group_size=32))


@pytest.mark.slow
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("value", ["somebody/a-kernel", 3, "nope"])
def test_a_config_names_no_code_to_fetch(key, value, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: value}))
    plan(str(copy), QuantizeConfig(bits=4, group_size=32))


@pytest.mark.parametrize("limit", [-5, "many", [64]])
def test_a_window_limit_that_is_no_number_of_tokens_is_refused(limit, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": limit}))
    with pytest.raises(InputError, match=r"config\.json: .*max_position_embeddings"):
        model_limits(str(copy))


@pytest.mark.parametrize(
    "text", ["", "{", "{}", '{"model": {"type": "BPE"}}', '{"model": {"type": "nope"}, "added_tokens": 3}', "\x00", "[]"]
)
def test_a_tokenizer_that_cannot_be_read_is_refused(text, copy):
    (copy / "tokenizer.json").write_text(text)
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(InputError, match="no tokenizer that transformers can load") as refused:
        load_tokenizer(str(copy))
    assert "\n" not in str(refused.value)
