"""Which linears are quantized and how: `dynamic`, `lm_head`, what is left, and what the files say about it."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import dense_twin, logits, quantize, save_model, windows

from gptq_core import Quantization, QuantizeConfig, inspect_checkpoint, load_quantized
from gptq_core.errors import InputError
from gptq_core.planning.plan import plan

W4 = {"bits": 4, "group_size": 32}


def select(model, tmp_path, **fields):
    with Quantization.open(str(model), QuantizeConfig(**W4 | fields), windows(), tmp_path / "probe", device="cpu") as run:
        return run.selection


def on_disk(rules, name, base):
    """vLLM's reading of `dynamic`: the first rule that matches from the start of the name."""
    for rule, changes in rules.items():
        if re.match(rule.removeprefix("-:").removeprefix("+:"), name):
            return None if rule.startswith("-:") else base | changes
    return base


@pytest.fixture
def llama(tmp_path):
    return save_model("llama", tmp_path / "model")


def test_the_first_rule_that_matches_decides(llama, tmp_path):
    rules = {r".*down_proj": {"bits": 8}, r"+:.*\.1\.mlp": {"bits": 2, "group_size": 16}, r"-:.*\.1\.self_attn.*": {}}
    found = quantize(llama, tmp_path / "out", QuantizeConfig(**W4, dynamic=rules))
    layers = {
        layer["name"]: (layer["bits"], layer["in_features"] // layer["groups"]) for layer in inspect_checkpoint(tmp_path / "out")["layers"]
    }
    assert layers == {
        "model.layers.0.mlp.down_proj": (8, 32),
        "model.layers.1.mlp.down_proj": (8, 32),
        "model.layers.1.mlp.gate_proj": (2, 16),
        "model.layers.1.mlp.up_proj": (2, 16),
        **{
            f"model.layers.0.{name}": (4, 32)
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
        },
    }
    left = {item["name"]: item["reason"] for item in found["skipped"]}
    assert left == {f"model.layers.1.self_attn.{n}_proj": r"dynamic: -:.*\.1\.self_attn.*" for n in "qkvo"}
    model = load_quantized(tmp_path / "out")
    torch.testing.assert_close(logits(model, windows().tokens), logits(dense_twin(llama, model), windows().tokens))


def test_a_rule_of_the_solver_alone_changes_codes_and_not_the_files_keys(llama, tmp_path):
    quantize(llama, tmp_path / "a", QuantizeConfig(**W4))
    quantize(llama, tmp_path / "b", QuantizeConfig(**W4, dynamic={r".*\.0\.mlp\.down_proj": {"damp_percent": 0.9}}))
    a, b = (load_quantized(tmp_path / name) for name in "ab")
    assert not torch.equal(a.model.layers[0].mlp.down_proj.qweight, b.model.layers[0].mlp.down_proj.qweight)
    torch.testing.assert_close(a.model.layers[0].self_attn.q_proj.qweight, b.model.layers[0].self_attn.q_proj.qweight)
    written = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert written["dynamic"] == {r".*\.0\.mlp\.down_proj": {}}


def test_a_mixed_run_resumes_from_its_blocks(llama, tmp_path):
    config = QuantizeConfig(**W4, dynamic={r".*(gate|up)_proj": {"bits": 3}}, lm_head=False)
    quantize(llama, tmp_path / "whole", config)
    with Quantization.open(str(llama), config, windows(), tmp_path / "cut", device="cpu") as run:
        run.quantize_block(0)
    quantize(llama, tmp_path / "cut", config)
    for name in ("whole", "cut"):
        assert {layer["bits"] for layer in inspect_checkpoint(tmp_path / name)["layers"]} == {3, 4}
    torch.testing.assert_close(*(logits(load_quantized(tmp_path / name), windows().tokens) for name in ("whole", "cut")), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rules", "modules"),
    [
        ({r".*\.q_proj": {"bits": 8}, r".*\.(k|v)_proj": {"bits": 8}}, None),
        (
            {r"-:.*mlp\.(gate|up)_proj": {}},
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"],
        ),
        ({r"-:model\.layers\.0\.": {}}, None),
        ({r"model\.layers\.0": {"bits": 8}}, None),
        ({r".*\.(gate|up)_proj": {"bits": 8}, ".*mlp": {"bits": 2}}, None),  # the second alone matches gate_up_proj
    ],
)
def test_rules_on_disk_answer_for_every_linear_and_every_fused_one(rules, modules, llama, tmp_path):
    selection = select(llama, tmp_path, dynamic=rules)
    base = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    for block in (0, 1):
        path = f"model.layers.{block}"
        for fused, members in {"self_attn.qkv_proj": "qkv", "mlp.gate_up_proj": ("gate", "up")}.items():
            room = fused.partition(".")[0]
            answers = {name: on_disk(selection.rules, f"{path}.{room}.{name}_proj", base) for name in members}
            assert len({str(answer) for answer in answers.values()}) == 1
            assert on_disk(selection.rules, f"{path}.{fused}", base) == answers[members[0]]
            for name, answer in answers.items():
                layer = selection.layers.get(f"{path}.{room}.{name}_proj")
                assert answer == (layer and {key: getattr(layer.config, key) for key in base})
    assert selection.modules == modules
    # GPTQModel compares plain text to whole names, so none of the rules may be plain
    assert not any(re.fullmatch(r"(\\\W|\w)*", rule.removeprefix("-:").removeprefix("+:")) for rule in selection.rules)


def test_what_cannot_be_packed_is_left_by_rules_too(tmp_path):
    model = save_model("llama", tmp_path / "model", intermediate_size=96)
    selection = select(model, tmp_path, group_size=64, strict=False, dynamic={r".*\.1\.self_attn": {"bits": 8}})
    assert set(selection.left) == {f"model.layers.{block}.mlp.down_proj" for block in (0, 1)}
    assert on_disk(selection.rules, "model.layers.1.mlp.down_proj", {}) is None
    assert selection.modules is not None and "mlp.down_proj" not in selection.modules


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dynamic": {r".*\.q_proj": {"bits": 8}}}, r"q_proj.*one linear in vLLM.*\(k_proj\|q_proj\|v_proj\)"),
        ({"dynamic": {r"-:.*up_proj": {}}}, r"gate_proj.*up_proj.*left"),
        ({"dynamic": {r"layers\.0\.mlp": {"bits": 8}}}, r"'layers\\\\.0\\\\.mlp' matches no linear.*model\.layers\.0\."),
        ({"dynamic": {r"lm_head": {"bits": 8}}}, r"lm_head takes part only with lm_head: true"),
        ({"dynamic": {r".*down_proj": {"group_size": 96}}}, r"down_proj: group_size 96 does not divide in 128"),
        ({"dynamic": {r"-:.*": {}}}, r"no linear of any decoder block is quantized: dynamic '-:\.\*' left them out"),
        ({"modules_in_block_to_quantize": []}, "no linear of any decoder block is quantized: modules_in_block_to_quantize left them out"),
        (
            {"dynamic": {".*": {"bits": 8}, ".*down_proj": {"bits": 3}}},
            r"'\.\*down_proj' decides about no linear: '\.\*' comes before it at ",
        ),
        ({"dynamic": {".*": {"bits": 8}, "-:.*down_proj": {}}}, r"'-:\.\*down_proj' decides about no linear: .*move it up or drop it"),
        (
            {"dynamic": {".*down_proj": {"bits": 8}}, "modules_in_block_to_quantize": [["self_attn.o_proj"]]},
            r"decides about no linear: .*down_proj is left \(not in modules_in_block_to_quantize\); name it there or drop the rule",
        ),
        (
            {"dynamic": {".*o_proj": {}, ".*self_attn": {"bits": 8}}, "modules_in_block_to_quantize": [["self_attn.q_proj"]]},
            r"o_proj is left \(not in modules_in_block_to_quantize\); name it there or drop",
        ),
        (
            {"dynamic": {".*self_attn": {"bits": 8}}, "modules_in_block_to_quantize": [["self_attn.q_proj"]]},
            r"one linear in vLLM.*name all of \(k_proj\|q_proj\|v_proj\) in modules_in_block_to_quantize, or none",
        ),
    ],
)
def test_rules_that_cannot_be_kept_are_refused_before_any_work(fields, message, llama, tmp_path):
    with pytest.raises(InputError, match=message):
        select(llama, tmp_path, **fields)


def test_rules_over_members_that_cannot_be_packed_name_them(tmp_path):
    model = save_model("llama", tmp_path / "model", num_key_value_heads=1)  # k and v have 16 rows
    rules = {".*(q|k|v)_proj": {"bits": 8}}
    with pytest.raises(InputError, match=r"k_proj: in 64 and out 16 must be multiples of 32.*'-:\.\*\\\.\(k_proj\|q_proj\|v_proj\)'"):
        select(model, tmp_path, strict=False, dynamic=rules)
    remedy = {r"-:.*\.(k_proj|q_proj|v_proj)": {}, ".*self_attn": {"bits": 8}}
    assert {name.rpartition(".")[2] for name in select(model, tmp_path, dynamic=remedy).left} == {"q_proj", "k_proj", "v_proj"}
    with pytest.raises(InputError, match=r"'\.\*k_proj' decides about no linear: .*k_proj is left \(in 64 and out 16 .*\); drop the rule"):
        select(model, tmp_path, strict=False, dynamic={".*k_proj": {"bits": 8}})


BASES = [
    *({"recipe": recipe} for recipe in ("classic", "tuned", "best", "max")),
    {"desc_act": True},
    {"static_groups": False},
    {"recipe": "max", "target_shift": 0},
    {"recipe": "classic", "act_group_aware": False},
]
CHANGES = [
    {"bits": 8, "desc_act": True},
    {"desc_act": False},
    {"static_groups": False},
    {"act_group_aware": False},
    {"refit": False},
    {"group_size": -1, "damp_percent": "auto"},
]


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_what_a_rule_means_depends_on_values_alone(base, changes):
    config = QuantizeConfig(bits=4, **base, dynamic={".*down_proj": changes, "-:.*up_proj": {}})
    for again in (QuantizeConfig.model_validate(config.model_dump()), QuantizeConfig.model_validate_json(config.model_dump_json())):
        assert again == config
        for name in ("mlp.down_proj", "mlp.up_proj", "mlp.gate_proj"):
            assert again.for_linear(name) == config.for_linear(name)
    found = config.for_linear("mlp.down_proj")
    assert {key: getattr(found, key) for key in changes} == changes
    if "desc_act" not in changes and "act_group_aware" not in changes:
        assert found.act_group_aware == config.act_group_aware


def test_what_gave_way_to_desc_act_comes_back_where_a_rule_takes_it_away():
    config = QuantizeConfig(bits=4, desc_act=True, dynamic={".*down_proj": {"desc_act": False}})
    assert config.for_linear("mlp.down_proj") == QuantizeConfig(bits=4)


def test_values_of_rules_are_kept_as_validated(llama, tmp_path):
    rules = {".*down_proj": {"bits": 8.0, "sym": "false", "desc_act": "true"}, ".*o_proj": {"damp_percent": "0.5"}}
    config = QuantizeConfig(**W4, dynamic=rules)
    assert repr(config.dynamic) == repr({".*down_proj": {"bits": 8, "sym": False, "desc_act": True}, ".*o_proj": {"damp_percent": 0.5}})
    assert rules[".*down_proj"]["sym"] == "false", "the caller's dict stays"
    assert '"bits": 8, "sym": false, "desc_act": true' in json.dumps(select(llama, tmp_path, dynamic=rules).rules)


def test_the_order_of_rules_belongs_to_the_run(llama, tmp_path):
    rules = {r".*\.1\.mlp": {"bits": 2}, r".*(down|o)_proj": {"bits": 8}}
    config, other = (QuantizeConfig(**W4, dynamic=dict(order)) for order in (rules.items(), reversed(rules.items())))
    assert config == other, "dicts have no order, so equal configs may be different runs"
    quantize(llama, tmp_path / "out", config)
    with pytest.raises(InputError, match=r"already holds something else \(dynamic \[.*\] there, \[.*\] asked for\)"):
        Quantization.open(str(llama), other, windows(), tmp_path / "out", device="cpu")
    with Quantization.open(str(llama), config, windows(), tmp_path / "out", device="cpu") as run:
        assert run.finished
    with Quantization.open(str(llama), config, windows(), tmp_path / "cut", device="cpu") as run:
        run.quantize_block(0)
    with pytest.raises(InputError, match="holds 1 finished blocks of another run"):
        Quantization.open(str(llama), other, windows(), tmp_path / "cut", device="cpu")
    row = next(line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if line.startswith("| dynamic "))
    assert row.replace(r"\|", "").count("|") == 3 and r"(down\|o)_proj" in row, "a bar in a rule ends no cell of the card"


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"(": {"bits": 8}}, r"'\(' is not a regular expression"),
        ({".*": {"bits": 5}}, r"'\.\*': bits = 5"),
        ({".*": {"format": "gptq_v2"}}, r"cannot set 'format'; it can set bits, group_size"),
        ({"-:.*": {"bits": 8}}, r"leaves layers unquantized, so it takes no keys"),
        ({".*": {"desc_act": True, "act_group_aware": True}}, r"act_group_aware"),
    ],
)
def test_wrong_rules_are_refused_when_the_config_is_made(dynamic, message):
    with pytest.raises(ValueError, match=message):
        QuantizeConfig(bits=4, dynamic=dynamic)


# -- the output head ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_the_head_is_solved_on_the_outputs_of_the_quantized_blocks(architecture, tmp_path):
    model = save_model(architecture, tmp_path / "model", tie_word_embeddings=False)
    found = quantize(model, tmp_path / "out", QuantizeConfig(**W4, lm_head=True, dynamic={"lm_head": {"bits": 8}}))
    assert found["lm_head"]["bits"] == 8 and found["lm_head"]["tokens"] == windows().tokens.numel()
    quantized = load_quantized(tmp_path / "out")
    twin = dense_twin(model, quantized)
    torch.testing.assert_close(logits(quantized, windows().tokens), logits(twin, windows().tokens))
    # the loss that the solver reports is that of the head's real inputs: those that the finished model gives
    seen = []
    twin.get_output_embeddings().register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, 1)))
    logits(twin, windows().tokens)
    x = torch.cat(seen).double()
    original = load_original(model).get_output_embeddings().weight.detach().double()
    difference = original - twin.get_output_embeddings().weight.detach().double()
    h = x.T @ x / len(x)
    h += 0.1 * h.diagonal().mean() * torch.eye(len(h))
    assert found["lm_head"]["loss"] == pytest.approx(float(((difference @ h) * difference).sum()), rel=1e-3)
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text())["lm_head"] is True


def load_original(model):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def test_a_run_cut_before_its_head_finishes_with_the_same_bytes(llama, tmp_path):
    config = QuantizeConfig(**W4, lm_head=True)
    quantize(llama, tmp_path / "whole", config)
    with Quantization.open(str(llama), config, windows(), tmp_path / "cut", device="cpu") as run:
        for index in (0, 1):
            run.quantize_block(index)
    with Quantization.open(str(llama), config, windows(), tmp_path / "cut", device="cpu") as run:
        assert [run.quantize_block(index)["resumed"] for index in (0, 1)] == [True, True]
        run.assemble()
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes()


def test_a_tied_head_is_refused(tmp_path):
    model = save_model("qwen2_tied_with_bias", tmp_path / "model")
    with pytest.raises(InputError, match=r"lm_head = true: the head of this qwen2 model is tied.*leave lm_head out"):
        select(model, tmp_path, lm_head=True)


def test_a_head_that_a_rule_leaves_out_stays_dense(llama, tmp_path):
    found = quantize(llama, tmp_path / "out", QuantizeConfig(**W4, lm_head=True, dynamic={"-:lm_head": {}}))
    assert found["lm_head"] is None
    assert {"name": "lm_head", "reason": "dynamic: -:lm_head"} in found["skipped"]
    assert isinstance(load_quantized(tmp_path / "out").lm_head, torch.nn.Linear)


# -- what the source holds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_weights_of_a_dtype_that_means_nothing_alone_are_refused_by_name(dtype, tmp_path):
    model = save_model("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(dtype)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for look in (
        lambda: plan(str(model), QuantizeConfig(bits=4, group_size=32)),
        lambda: Quantization.open(str(model), QuantizeConfig(bits=4, group_size=32), windows(), tmp_path / "out", device="cpu"),
    ):
        with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj.weight: stored as \w+, .*must be F64, F32, F16, BF16"):
            look()


def test_tensors_without_a_place_in_the_model_are_named_and_no_longer_promised(tmp_path):
    model = save_model("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    extra = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in tensors.items() if "layers.1." in name}
    save_file(tensors | extra | {"mtp.norm.weight": torch.ones(64)}, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    wanted = QuantizeConfig(bits=4, group_size=32)
    [note] = plan(str(model), wanted).notes
    assert note.endswith(f"tensors of model.layers.2 ({len(extra)}), mtp.norm.weight")
    summary = quantize(model, tmp_path / "out", wanted)
    assert summary["unused_source_tensors"] == sorted([*extra, "mtp.norm.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
