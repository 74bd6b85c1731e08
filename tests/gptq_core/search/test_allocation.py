"""Widths under a budget: the choice against all choices, the losses against the engine's, the KL against the dense model's."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from tiny import logits, quantize, save_model, windows

from gptq_core import Allocation, QuantizeConfig, allocate, calibration_windows, evaluate_pair, load_quantized
from gptq_core.data.tokenizer import load_tokenizer
from gptq_core.errors import InputError
from gptq_core.model.selection import bits_on_disk, units_of
from gptq_core.planning.plan import plan
from gptq_core.schema import explain
from gptq_core.search import allocation
from gptq_core.search.allocation import UnitProbes, choose, knapsack, presumed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

EMBEDDED = Path(__file__).parents[3] / "flows" / "embedded"
W = {"bits": 3, "group_size": 32}


def wanted(bits=(2, 3, 4, 8), budget_bpw=3.5, **fields):
    return QuantizeConfig(**W | fields, allocate={"bits": list(bits), "budget_bpw": budget_bpw})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("allocation") / "model")


@pytest.fixture(scope="module")
def chosen(model):
    return allocate(str(model), wanted(), windows(), device="cpu")


# -- the knapsack ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_within_the_budget_is_better(seed):
    chance = random.Random(seed)
    units, widths = chance.randint(1, 6), chance.randint(2, 4)
    sizes = [sorted(chance.sample(range(1, 60), widths)) for _ in range(units)]
    costs = [[chance.random() for _ in range(widths)] for _ in range(units)]
    budget = chance.randint(sum(size[0] for size in sizes), sum(size[-1] for size in sizes))
    picks = knapsack(costs, sizes, budget)
    choices = itertools.product(range(widths), repeat=units)
    fitting = [c for c in choices if sum(size[at] for size, at in zip(sizes, c, strict=True)) <= budget]
    assert tuple(picks) in fitting
    best = min(sum(cost[at] for cost, at in zip(costs, c, strict=True)) for c in fitting)
    assert sum(cost[at] for cost, at in zip(costs, picks, strict=True)) == pytest.approx(best)


def test_a_front_cut_short_keeps_the_budget_and_nearly_the_best(monkeypatch):
    """Sizes without a common measure: the front of 60 units would not end."""
    chance = np.random.default_rng(0)
    weights = chance.integers(10**6, 10**9, 60)
    sizes = [[int(weight) * bits for bits in (2, 3, 4, 8)] for weight in weights]
    costs = [[float(effect) * 4.0**-bits for bits in (2, 3, 4, 8)] for effect in weights * chance.random(60)]
    budget = int(3.5 * weights.sum())
    found = {}
    for front in (500, 20_000):
        monkeypatch.setattr(allocation, "LARGEST_FRONT", front)
        picks = knapsack(costs, sizes, budget)
        assert sum(size[at] for size, at in zip(sizes, picks, strict=True)) <= budget
        found[front] = sum(cost[at] for cost, at in zip(costs, picks, strict=True))
    assert found[500] < 1.01 * found[20_000]


# -- the allocation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [2.0, 2.7, 3.0, 3.5, 8.0])
def test_the_budget_is_kept_and_used(model, chosen, budget):
    config = wanted(budget_bpw=budget)
    selected = plan(str(model), config.model_copy(update={"allocate": None})).selection
    found = choose(config, selected, {unit.name: (unit.loss, unit.kl) for unit in chosen.units})
    assert budget - 0.25 < found.bits_per_weight <= budget
    assert found.bits_per_weight == pytest.approx(sum(bits * share for bits, share in found.shares.items()))
    assert found.predicted_kl == pytest.approx(sum(unit.kl[unit.bits] for unit in found.units))


def test_a_budget_in_gigabytes_is_the_size_on_disk(model, tmp_path):
    least, most = (plan(str(model), QuantizeConfig(**W | {"bits": bits})) for bits in (2, 8))
    smallest, largest = (
        sum(bits_on_disk(layer.in_features, layer.out_features, bits, layer.config.group_size) for layer in layers) / 8e9
        for bits, layers in ((2, least.selection.layers.values()), (8, most.selection.layers.values()))
    )
    budget = (smallest + largest) / 2
    config = QuantizeConfig(**W, allocate={"bits": [2, 3, 4, 8], "budget_gb": budget})
    found = allocate(str(model), config, windows(), device="cpu")
    made = quantize(model, tmp_path / "out", found.apply(config))
    packed = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in load_quantized(tmp_path / "out").state_dict().items()
        if name.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx")
    )
    assert 0.97 * budget * 1e9 < packed <= budget * 1e9
    assert made["bits_per_weight"] > found.bits_per_weight
    for wrong in (0.9 * smallest, 1.1 * largest):
        config = QuantizeConfig(**W, allocate={"bits": [2, 3, 4, 8], "budget_gb": wrong})
        with pytest.raises(InputError, match=r"budget_gb = .* GB at 2 bits and .* GB at 8; give a size between"):
            allocate(str(model), config, windows(), device="cpu")


def test_fused_linears_are_one_unit_and_a_rule_covers_the_whole(model, chosen):
    names = [unit.name.removeprefix("model.layers.") for unit in chosen.units]
    inside = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert names == [f"{index}.{name}" for index in (0, 1) for name in inside]
    config = chosen.apply(wanted())
    for unit in chosen.units:
        for name in (unit.name, *unit.members):
            assert config.for_linear(name).bits == unit.bits, name
    selected = plan(str(model), config.model_copy(update={"allocate": None})).selection
    assert not selected.parted
    assert not any(rule.startswith("+:") for rule in selected.rules)


def test_what_rules_leave_out_stays_out(model):
    config = wanted(dynamic={r"-:.*\.0\.mlp\.": {}})
    found = allocate(str(model), config, windows(), device="cpu")
    assert not any(".0.mlp" in unit.name for unit in found.units)
    assert list(found.apply(config).dynamic)[0] == r"-:.*\.0\.mlp\."
    assert found.apply(config).allocate is None


def test_fused_linears_that_modules_part_are_refused(model):
    config = wanted(modules_in_block_to_quantize=[["self_attn.q_proj", "mlp.down_proj"]])
    with pytest.raises(InputError, match="allocate: .*q_proj.* get one width, but not all of them are quantized"):
        allocate(str(model), config, windows(), device="cpu")


def test_the_record_survives_json(chosen):
    assert Allocation.from_record(json.loads(json.dumps(chosen.record()))) == chosen


def test_widths_are_presumed_before_anything_is_computed(model):
    config = QuantizeConfig(bits=4, group_size=32, allocate={"bits": [4, 8], "budget_bpw": 5})
    selected = plan(str(model), config.model_copy(update={"allocate": None})).selection
    found = presumed(config, selected)
    assert set(found.shares) == {4, 8} and 4.5 < found.bits_per_weight <= 5


# -- losses and KL --------------------------------------------------------------------------------------------------------


@pytest.mark.grid
@pytest.mark.parametrize("recipe", ["classic", "tuned"])
def test_losses_are_those_of_the_engine_where_nothing_upstream_differs(model, recipe, tmp_path):
    found = allocate(str(model), wanted(recipe=recipe), windows(), device="cpu")
    for bits in (2, 4):
        quantize(model, tmp_path / str(bits), QuantizeConfig(**W | {"bits": bits}, recipe=recipe, true_sequential=False))
        records = [json.loads(line) for line in (tmp_path / str(bits) / "manifest.jsonl").read_text().splitlines()]
        losses = {layer["name"]: layer["loss"] for layer in records[1]["layers"]}
        for unit in found.units[:4]:
            assert unit.loss[bits] == pytest.approx(sum(losses[name] for name in unit.members), rel=1e-4)


@pytest.mark.grid
@pytest.mark.parametrize(("architecture", "head"), [("llama", True), ("gemma3", False), ("opt", False), ("qwen2_tied_with_bias", False)])
def test_the_kl_is_that_of_a_model_in_which_one_unit_is_quantized(architecture, head, tmp_path, monkeypatch):
    """Against transformers' own forward of the whole model, on the windows that were probed."""
    folder, tokens = save_model(architecture, tmp_path / "model"), windows(6)
    config = wanted(lm_head=head, recipe="classic")
    monkeypatch.setattr(allocation, "PROBE_TOKENS", 4 * tokens.seqlen)
    solved = {}
    right = UnitProbes._solve

    def seen(self, modules, hessian):
        found = right(self, modules, hessian)
        names = {module: name for name, module in modules.items()}
        solved.update({probe: {names[linear]: weight for linear, weight in part.items()} for probe, part in found.items()})
        return found

    monkeypatch.setattr(UnitProbes, "_solve", seen)
    found = {unit.name: unit for unit in allocate(str(folder), config, tokens, device="cpu").units}
    assert ("lm_head" in found) == head
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    original = torch.log_softmax(logits(dense, tokens.tokens[:4])[:, :-1].double(), -1)
    assert {unit for unit, _ in solved} == set(found)
    for (unit, bits), weights in solved.items():
        for name, weight in weights.items():
            dense.get_submodule(name).weight.data = weight
        other = torch.log_softmax(logits(dense, tokens.tokens[:4])[:, :-1].double(), -1)
        kl = float((original.exp() * (original - other)).sum(-1).mean())
        assert found[unit].kl[bits] == pytest.approx(kl, rel=2e-2, abs=1e-7), unit
        for name in weights:
            dense.get_submodule(name).weight.data = own[f"{name}.weight"]
    for unit in found.values():
        assert unit.kl[8] == pytest.approx(unit.kl[3] * unit.loss[8] / unit.loss[3])


# -- end to end -----------------------------------------------------------------------------------------------------------


def test_the_checkpoint_has_the_announced_bits_and_loads(model, chosen, tmp_path):
    quantize(model, tmp_path / "out", chosen.apply(wanted()))
    quantized = load_quantized(tmp_path / "out")
    for unit in chosen.units:
        assert {quantized.get_submodule(name).bits for name in unit.members} == {unit.bits}
    weights = sum(unit.weights for unit in chosen.units)
    assert sum(unit.bits * unit.weights for unit in chosen.units) / weights == chosen.bits_per_weight <= 3.5


def test_nothing_is_quantized_before_the_widths_are_chosen(model, tmp_path):
    with pytest.raises(InputError, match="the widths are not chosen yet"):
        quantize(model, tmp_path / "out", wanted())


@pytest.mark.slow
def test_better_than_uniform_on_the_embedded_model(tmp_path):
    folder, tokenizer = EMBEDDED / "model", load_tokenizer(str(EMBEDDED / "model"))
    calibration = calibration_windows(str(EMBEDDED / "train.parquet"), tokenizer, 32, 256, 0)
    heldout = calibration_windows(str(EMBEDDED / "heldout.parquet"), tokenizer, 24, 256, 0)
    config = QuantizeConfig(bits=3, allocate={"bits": [2, 3, 4, 8], "budget_bpw": 3.0})
    found = allocate(str(folder), config, calibration, device="cpu")
    assert found.bits_per_weight <= 3.0
    kl = []
    for name, one in (("chosen", found.apply(config)), ("uniform", QuantizeConfig(bits=3))):
        quantize(folder, tmp_path / name, one, calibration)
        kl.append(evaluate_pair(str(folder), str(tmp_path / name), heldout, device="cpu")["kl"])
    assert kl[0] < 0.97 * kl[1]


# -- the schema -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"allocate": {"bits": [3, 3], "budget_bpw": 3}}, "allocate.bits = [3, 3]: needs at least two different widths"),
        ({"allocate": {"bits": [3, 5], "budget_bpw": 3}}, "allocate.bits.1 = 5"),
        ({"allocate": {"bits": [3, 4]}}, "set exactly one budget"),
        ({"allocate": {"bits": [3, 4], "budget_bpw": 3.5, "budget_gb": 1}}, "set exactly one budget"),
        ({"allocate": {"bits": [4, 3], "budget_bpw": 2.9}}, "budget_bpw = 2.9: must be 3 to 4, the range of the widths [3, 4]"),
        ({"allocate": {"bits": [3, 4], "budget_bpw": 4.1}}, "budget_bpw = 4.1: must be 3 to 4, the range of the widths [3, 4]"),
        ({"allocate": {"bits": [3, 4], "budget": 3.5}}, "did you mean 'budget_gb'?"),
        ({"allocate": {"bits": [4, 8], "budget_bpw": 5}}, "bits = 3: must be one of allocate.bits [4, 8]"),
        ({"allocate": {"bits": [3, 4], "budget_bpw": 3.5}, "dynamic": {"a": {"bits": 8}}}, "allocate writes the rules of dynamic itself"),
    ],
)
def test_refused_in_one_line(fields, says):
    with pytest.raises(ValidationError) as caught:
        QuantizeConfig(bits=3, **fields)
    assert says in explain(caught.value)


def test_widths_are_put_in_order():
    config = QuantizeConfig(bits=4, allocate={"bits": [8, 2, 4, 4], "budget_bpw": 4})
    assert config.allocate.bits == [2, 4, 8]
    assert QuantizeConfig(**config.model_dump()) == config
    assert config.for_linear("any").allocate is None


@pytest.mark.grid
@pytest.mark.parametrize("architecture", ["opt", "bloom"])
def test_linears_of_other_names_are_units_of_their_own(architecture, tmp_path):
    folder = save_model(architecture, tmp_path / "model")
    config = wanted(budget_bpw=3.0)
    selected = plan(str(folder), config.model_copy(update={"allocate": None})).selection
    expected = {member for members in units_of(selected).values() for member in members}
    assert expected == set(selected.layers)
    found = allocate(str(folder), config, windows(), device="cpu")
    quantize(folder, tmp_path / "out", found.apply(config))
    quantized = load_quantized(tmp_path / "out")
    assert all(quantized.get_submodule(name).bits == unit.bits for unit in found.units for name in unit.members)
