"""Who will load the result, told before any work, and held against the written files by a literal reading of the format notes."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import quantize, save_model, windows

from gptq_core import Quantization, QuantizeConfig, inspect_checkpoint
from gptq_core.errors import InputError
from gptq_core.planning.consumers import CONSUMERS, Verdict, loadability, objections
from gptq_core.planning.plan import plan

W4 = {"bits": 4, "group_size": 32}
SERVERS = {"vLLM", "SGLang"}
ALL = {consumer.name for consumer in CONSUMERS}
PARTED = "k_proj and 3 more unlike the rest of k_proj|q_proj|v_proj (one linear there, so quantized alike or not at all): "
LEFT_ALIKE, LEFT_IN_ONE = {r"-:.*mlp\.(gate|up)_proj": {}}, {r"-:model\.layers\.0\.mlp\.": {}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Sizes that Marlin's tiles fit, the same with a head of 128 rows, smaller ones that they do not, and k and v of 16 rows."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {
        "fits": {"hidden_size": 128},
        "head": {"hidden_size": 128, "vocab_size": 128},
        "small": {},
        "narrow": {"num_key_value_heads": 1},
    }
    return {name: save_model("llama", folder / name, **changes) for name, changes in sizes.items()}


def refusing(found):
    return {verdict.consumer for verdict in found if not verdict.loads}


# -- the table ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "who", "reason"),
    [
        ({}, set(), ""),
        ({"bits": 8}, set(), ""),
        ({"bits": 3}, SERVERS, "bits 3 (must be 4 or 8): set quantization.bits"),
        ({"bits": 2}, SERVERS, "bits 2 (must be 4 or 8): set quantization.bits"),
        ({"group_size": 64}, set(), ""),
        ({"group_size": -1}, set(), ""),
        ({"group_size": 16}, SERVERS, "group_size 16 (must be -1, 32, 64 or 128): set quantization.group_size"),
        ({"group_size": 8}, ALL, "group_size 8 (must be -1, 16, 32, 64, 128, 256, 512 or 1024): set quantization.group_size"),
        ({"format": "gptq_v2"}, set(), ""),
        ({"format": "gptq_v2", "sym": False}, SERVERS, "sym false (must be true): set quantization.sym"),
        ({"sym": False}, SERVERS | {"GPTQModel"}, "set quantization.format: gptq_v2"),
        ({"desc_act": True}, {"vLLM"}, "desc_act true (must be false, or group_size -1): set quantization.desc_act"),
        ({"desc_act": True, "group_size": -1}, set(), ""),
        ({"recipe": "tuned"}, set(), ""),
        ({"dynamic": {".*down": {"bits": 8}}}, {"transformers"}, "bits 8 at model.layers.0.mlp.down_proj and 1 more (rules are not read"),
        ({"dynamic": {".*down": {"bits": 3}}}, SERVERS | {"transformers"}, "bits 3 at model.layers.0.mlp.down_proj and 1 more (must be 4"),
        ({"dynamic": {".*0.mlp.down": {"group_size": 64}}}, {"transformers"}, "group_size 64 at model.layers.0.mlp.down_proj (rules"),
        ({"dynamic": {".*down": {"group_size": 16}}}, SERVERS | {"transformers"}, "change that in quantization.dynamic"),
        ({"dynamic": {".*down": {"desc_act": True}}}, {"vLLM", "transformers"}, "desc_act true at model.layers.0.mlp.down_proj"),
        ({"dynamic": {".*down": {"sym": False}}}, SERVERS | {"transformers"}, "sym false at model.layers.0.mlp.down_proj"),
        ({"dynamic": {".*down": {"damp_percent": 0.5}}}, set(), ""),
        ({"bits": 3, "dynamic": {".*": {"bits": 4}}}, SERVERS | {"transformers"}, "bits 3 (must be 4 or 8): set quantization.bits"),
        ({"dynamic": LEFT_ALIKE}, set(), ""),
        ({"modules_in_block_to_quantize": [["mlp.down_proj"]]}, set(), ""),
        ({"modules_in_block_to_quantize": [["self_attn.q_proj"]]}, SERVERS, PARTED + "name all of them in quantization.modules_in"),
        (
            {"model": "narrow", "strict": False},
            SERVERS,
            PARTED + r"leave all of them out by a rule in quantization.dynamic, '-:.*\.(k_proj",
        ),
        ({"dynamic": LEFT_IN_ONE}, {"transformers"}, "model.layers.0.mlp.gate_proj and 2 more unquantized (must be the same linears"),
        ({"model": "head", "lm_head": True}, {"transformers"}, "lm_head quantized (only linears of the decoder blocks are read)"),
        ({"lm_head": True}, SERVERS | {"transformers"}, "lm_head with 96 rows (must be a multiple of 64"),
        ({"model": "small"}, {"SGLang"}, "in 64 and out 64 at model.layers.0.self_attn.o_proj and 1 more (must be multiples of 64"),
        ({"model": "small", "dynamic": {r"-:.*o_proj": {}}}, set(), ""),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # the order of a set differs between processes
)
def test_each_cell_of_the_table_can_flip(fields, who, reason, models):
    model = models[fields.get("model", "fits")]
    config = QuantizeConfig(**W4 | {key: value for key, value in fields.items() if key != "model"})
    found = plan(str(model), config).verdicts
    assert [verdict.consumer for verdict in found] == ["vLLM", "SGLang", "transformers", "GPTQModel"]
    assert refusing(found) == who
    assert reason in " | ".join(reason for verdict in found for reason in verdict.reasons)


def test_equal_reasons_are_told_once_and_in_a_note_without_the_remedy():
    reasons = ("bits 3 (must be 4 or 8): set quantization.bits", "group_size 16 (must be 32): set quantization.group_size")
    found = [Verdict("A", "1", reasons), Verdict("B", "2", ()), Verdict("C", "3", reasons), Verdict("D", "4", reasons[:1])]
    assert objections(found) == [
        "A 1 and C 3 will not load this: bits 3 (must be 4 or 8); group_size 16 (must be 32)",
        "D 4 will not load this: bits 3 (must be 4 or 8)",
    ]
    assert objections(found, full=True)[1] == f"D 4 will not load this: {reasons[0]}"


def test_the_plan_writes_nothing_and_foretells_the_size(models, tmp_path):
    config = QuantizeConfig(**W4, dynamic={".*down": {"bits": 8}, r"-:model\.layers\.0\.self_attn": {}})
    before = sorted(tmp_path.rglob("*"))
    found = plan(str(models["fits"]), config)
    assert sorted(tmp_path.rglob("*")) == before
    made = quantize(models["fits"], tmp_path / "out", config)
    assert (len(found.selection.layers), len(found.selection.left)) == (made["quantized_layers"], len(made["skipped"]))
    assert found.bits_per_weight == made["bits_per_weight"]
    assert found.bytes == pytest.approx(made["bytes"], rel=0.05)  # of so small a model, headers are a few per cent
    # the verdicts travel with the checkpoint
    records = [verdict.record() for verdict in found.verdicts]
    assert made["loads"] == records == inspect_checkpoint(tmp_path / "out")["loads"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| vLLM 0.33 | yes |" in card and "| transformers 5.23 | no: bits 8 at model.layers.0.mlp.down_proj" in card


def test_what_select_refuses_the_plan_refuses(models):
    with pytest.raises(InputError, match="group_size 96 does not divide"):
        plan(str(models["fits"]), QuantizeConfig(bits=4, group_size=96))


# -- the files, read as vLLM and SGLang read them --------------------------------------------------------------------------

GROUP_SIZES = (-1, 32, 64, 128)
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ZEROS = {
    (2, "gptq_v2"): ["AAAAAAAA"],
    (2, "gptq"): ["55555555"],
    (3, "gptq_v2"): ["24924924", "49249249", "92492492"],
    (3, "gptq"): ["DB6DB6DB", "B6DB6DB6", "6DB6DB6D"],
    (4, "gptq_v2"): ["88888888"],
    (4, "gptq"): ["77777777"],
    (8, "gptq_v2"): ["80808080"],
    (8, "gptq"): ["7F7F7F7F"],
}


def rule(quantization, name):
    """The server's look-up: the first rule that matches from the start of the name; False where it leaves the linear."""
    for pattern, changes in quantization.get("dynamic", {}).items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
            return False if pattern.startswith("-:") else changes
    return {}


def tensors_of(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return {name: tensor for shard in sorted(set(index["weight_map"].values())) for name, tensor in load_file(folder / shard).items()}


def problems(server, folder, model):
    """What the format notes' rules for `server` find wrong in a folder of a quantized Llama; the model gives the sizes."""
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert json.loads((folder / "quantize_config.json").read_text()) == quantization
    found = [f"no {key}" for key in ("quant_method", "bits", "group_size", "desc_act", "sym") if key not in quantization]
    found += ["dataset"] if "dataset" in quantization else []
    tensors = tensors_of(folder)
    quantized = {name.rpartition(".")[0] for name, tensor in tensors.items() if tensor.dtype == torch.int32}
    if quantization.get("modules_in_block_to_quantize"):
        listed = sum(quantization["modules_in_block_to_quantize"], [])
    else:
        listed = list(quantized)
    if (quantization["bits"], quantization["sym"]) not in [(4, True), (8, True)]:
        found.append("keys")
    linears = {"lm_head": ["lm_head"]} if quantization["lm_head"] else {}
    for block in (0, 1):
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            path, _, leaf = f"model.layers.{block}.{name}".rpartition(".")
            linears[f"{path}.{leaf}"] = [f"{path}.{member}" for member in FUSED.get(leaf, [leaf])]
    with safe_open(model / "model.safetensors", "pt") as file:
        sizes = {member: file.get_slice(f"{member}.weight").get_shape() for members in linears.values() for member in members}
    for name, members in linears.items():
        changes = rule(quantization, name)
        if server == "vLLM":
            inside = {any(part in member for part in listed) for member in members}
            if len(inside) > 1:
                found.append(f"{name}: some members only")
            if not all(inside):
                changes = False
        if changes is False:
            found += [f"{member}: {leaf}" for member in members for leaf in ("weight",) if f"{member}.{leaf}" not in tensors]
            found += [f"{member}: packed" for member in members if member in quantized]
            continue
        keys = {key: quantization[key] for key in ("bits", "group_size", "sym", "desc_act")} | changes
        if (keys["bits"], keys["sym"]) not in [(4, True), (8, True)] or keys["group_size"] not in GROUP_SIZES:
            found.append(f"{name}: {keys}")
            continue
        if server == "vLLM" and keys["desc_act"] and keys["group_size"] != -1:
            found.append(f"{name}: desc_act")
        columns, out = sizes[members[0]][1], sum(sizes[member][0] for member in members)
        if server == "SGLang" and name != "lm_head" and not any(columns % k == 0 and out % n == 0 for k, n in ((128, 64), (64, 128))):
            found.append(f"{name}: no tile")
        if name == "lm_head" and out % 64:
            found.append("lm_head: padded")
        for member in members:
            out, groups = sizes[member][0], 1 if keys["group_size"] == -1 else columns // keys["group_size"]
            wanted = {
                "qweight": (torch.int32, (columns * keys["bits"] // 32, out)),
                "qzeros": (torch.int32, (groups, out * keys["bits"] // 32)),
                "scales": (torch.float16, (groups, out)),
                "g_idx": (torch.int32, (columns,)),
            }
            for leaf, want in wanted.items():
                tensor = tensors.get(f"{member}.{leaf}")
                if tensor is None or (tensor.dtype, tuple(tensor.shape)) != want:
                    found.append(f"{member}.{leaf}: {want}")
            if not keys["desc_act"] and not found:
                trivial = torch.arange(columns) // (columns // groups)
                assert torch.equal(tensors[f"{member}.g_idx"].long(), trivial)
    return found


@pytest.mark.grid
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bits": 8, "group_size": -1, "desc_act": True},
        {"group_size": 64, "format": "gptq_v2", "recipe": "tuned"},
        {"dynamic": {".*down": {"bits": 8}, r".*(q|k|v)_proj": {"group_size": 64}}},
        {"dynamic": LEFT_ALIKE, "format": "gptq_v2"},
        {"dynamic": LEFT_IN_ONE | {r".*\.1\.self_attn": {"bits": 8, "group_size": -1}}},
        {"modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]]},
        {"modules_in_block_to_quantize": [["mlp.gate_proj"], ["mlp.down_proj"]]},
        {"modules_in_block_to_quantize": [["self_attn.q_proj"]]},
        {"model": "narrow", "strict": False},
        {"model": "narrow", "dynamic": {r"-:.*\.(k_proj|q_proj|v_proj)": {}}},
        {"model": "head", "lm_head": True, "dynamic": {"lm_head": {"bits": 8}} | LEFT_ALIKE},
        {"lm_head": True},
        {"model": "small"},
        {"bits": 3, "format": "gptq_v2"},
        {"bits": 2},
        {"bits": 3, "desc_act": True},
        {"sym": False},
        {"desc_act": True},
        {"group_size": 16},
        {"dynamic": {".*down": {"bits": 2}}},
    ],
    ids=str,
)
def test_the_written_files_keep_the_rules_of_vllm_and_sglang_where_the_verdict_says_so(fields, models, tmp_path):
    model = models[fields.get("model", "fits")]
    config = QuantizeConfig(**W4 | {key: value for key, value in fields.items() if key != "model"})
    made = quantize(model, tmp_path / "out", config)
    for record in made["loads"]:
        if record["consumer"] in SERVERS:
            assert record["loads"] == (problems(record["consumer"], tmp_path / "out", model) == []), record
    quantization = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert quantization["desc_act"] is config.desc_act
    assert quantization["checkpoint_format"] == quantization["format"] == config.format
    tensors = tensors_of(tmp_path / "out")
    for name, layer in select(model, config, tmp_path).layers.items():
        if layer.config.sym:
            words = [f"{word & 0xFFFFFFFF:08X}" for word in tensors[f"{name}.qzeros"][0].tolist()]
            period = ZEROS[layer.config.bits, config.format]
            assert words == period * (len(words) // len(period)), name


def select(model, config, folder):
    with Quantization.open(str(model), config, windows(), folder / "probe", device="cpu") as run:
        assert refusing(loadability(config, run.selection)) == refusing(plan(str(model), config).verdicts)
        return run.selection


def strings(value):
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in strings(item)]
    return [text for item in value for text in strings(item)] if isinstance(value, list) else [value] if isinstance(value, str) else []


def test_no_json_names_a_place_on_this_machine(models, tmp_path):
    config = QuantizeConfig(**W4, dataset=str(tmp_path / "text.txt"), dynamic=LEFT_ALIKE, backend="torch")
    quantize(models["fits"], tmp_path / "out", config)
    files = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".jsonl")}
    assert {"config.json", "quantize_config.json", "manifest.jsonl", "model.safetensors.index.json"} <= files.keys()
    for name, text in files.items():
        documents = [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else [json.loads(text)]
        places = [text for text in strings(documents) if re.search(r"(^|[\s'\"=:])(/|~|file:|[A-Za-z]:\\)", text)]
        assert places == [], name
