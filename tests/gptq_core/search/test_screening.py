"""Many configurations from one capture: each as if it were alone, the exact run's codes where nothing upstream differs."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
import transformers
from tiny import logits, quantize, save_model, windows

from gptq_core import QuantizeConfig, evaluate_pair, load_quantized, screen
from gptq_core.block.group import solve_group
from gptq_core.checkpoint.reader import Checkpoint
from gptq_core.errors import FactorizationError, InputError
from gptq_core.planning.plan import plan
from gptq_core.search import screening
from gptq_core.search.screening import Screened

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

HELDOUT = windows(5, 24, seed=9)
"""Neither as many as the calibration windows nor as long."""
W = {"bits": 3, "group_size": 32}
ATTENTION = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]]
CELLS = {
    "tuned": QuantizeConfig(**W),
    "two bits": QuantizeConfig(bits=2, group_size=32),
    "row": QuantizeConfig(bits=4, group_size=-1, recipe="classic"),
    "asymmetric": QuantizeConfig(**W, sym=False, format="gptq_v2"),
    "desc_act": QuantizeConfig(**W, recipe="classic", desc_act=True),
    "damped": QuantizeConfig(**W, damp_percent="auto"),
    "head": QuantizeConfig(**W, lm_head=True),
    "rules": QuantizeConfig(**W, dynamic={r"-:.*\.0\.": {}, r".*\.down_proj": {"bits": 8, "damp_percent": 0.5}}),
    "attention": QuantizeConfig(**W, modules_in_block_to_quantize=ATTENTION),
    "max": QuantizeConfig(**W, recipe="max"),
}


def screened(model, **configs):
    return screen(str(model), configs, windows(), HELDOUT, device="cpu")


def figures(found: Screened) -> dict:
    return dataclasses.asdict(found) | {"seconds": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("screening") / "model")


@pytest.fixture(scope="module")
def together(model):
    return screen(str(model), CELLS, windows(), HELDOUT, device="cpu")


@pytest.fixture
def solved(monkeypatch):
    """Solutions of every cell, in the order of the work: (name of the linear, its config, solution)."""
    seen = []

    def noting(members, *args):
        configs = {member.name: member.config for member in members}
        for name, solution, report in solve_group(members, *args):
            seen.append((name, configs[name], solution))
            yield name, solution, report

    monkeypatch.setattr(screening, "solve_group", noting)
    return seen


# -- against itself, the engine and the dense model ---------------------------------------------------------------------------


@pytest.mark.grid
@pytest.mark.parametrize("name", CELLS)
def test_a_cell_is_what_it_is_alone(model, together, name):
    assert figures(screened(model, **{name: CELLS[name]})[name]) == figures(together[name])


def test_no_two_cells_are_one(together):
    """Not even tuned and max: what is set aside leaves them a pass of the descent apart."""
    assert list(together) == list(CELLS)
    assert len({found.kl for found in together.values()}) == len(CELLS)
    assert all(found.error is None and found.kl > 0 and found.seconds > 0 for found in together.values())
    assert len({found.original_perplexity for found in together.values()}) == 1


@pytest.mark.parametrize("recipe", ["classic", "tuned"])
def test_codes_are_the_engines_where_nothing_upstream_differs(model, recipe, solved, tmp_path):
    config = QuantizeConfig(**W, recipe=recipe)
    screened(model, one=config)
    quantize(model, tmp_path / "out", config)
    exact = load_quantized(tmp_path / "out")
    first = [(name, solution) for name, _, solution in solved][:3]
    assert [name.rpartition(".")[2] for name, _ in first] == ["q_proj", "k_proj", "v_proj"]
    for name, solution in first:
        assert torch.equal(exact.get_submodule(name).weight_in(torch.float32), solution.weight(torch.float32))


@pytest.mark.parametrize(("architecture", "changes"), [("llama", {}), ("qwen2_tied_with_bias", {"layer_types": ["full_attention"]})])
def test_the_figures_are_the_checkpoints_where_one_input_group_is_quantized(architecture, changes, tmp_path):
    model = save_model(architecture, tmp_path / "model", num_hidden_layers=1, **changes)
    config = QuantizeConfig(bits=2, group_size=32, modules_in_block_to_quantize=ATTENTION)
    found = screened(model, one=config)["one"]
    summary = quantize(model, tmp_path / "out", config)
    exact = evaluate_pair(str(model), str(tmp_path / "out"), HELDOUT, device="cpu")
    for key in ("original_perplexity", "quantized_perplexity", "top1_agreement"):
        assert getattr(found, key) == pytest.approx(exact[key], rel=1e-5), key
    assert found.kl == pytest.approx(exact["kl"], rel=1e-3)
    assert found.bits_per_weight == pytest.approx(summary["bits_per_weight"])


@pytest.mark.parametrize(("architecture", "head"), [("llama", True), ("gemma3", False), ("opt", False), ("bloom", False)])
def test_the_kl_is_that_of_the_dense_model_with_these_weights(architecture, head, solved, tmp_path):
    """Against transformers' own forward of the whole model, with weights so large that the KL stands out from float32's rounding."""
    folder = save_model(architecture, tmp_path / "model", initializer_range=0.1, init_std=0.1)
    found = screened(folder, one=QuantizeConfig(**W, lm_head=head))["one"]
    dense, twin = (transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    for name, _, solution in solved:
        linear = twin.get_submodule(name)
        linear.weight.data = solution.weight(torch.float32)
        if linear.bias is not None:
            linear.bias.data = linear.bias.data.half().float()
    assert ("lm_head" in {name for name, _, _ in solved}) == head
    log_p, log_q = (torch.log_softmax(logits(m, HELDOUT.tokens)[:, :-1].double(), -1) for m in (dense, twin))
    assert found.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)


def test_more_bits_are_better(model):
    found = screened(model, **{f"w{bits}": QuantizeConfig(bits=bits, group_size=32) for bits in (8, 4, 2)})
    assert found["w8"].kl < found["w4"].kl < found["w2"].kl


def test_the_size_is_the_plans(model, together):
    for name, config in CELLS.items():
        assert together[name].bytes == plan(str(model), config).bytes
        assert together[name].bits_per_weight == plan(str(model), config).bits_per_weight


# -- what is shared -------------------------------------------------------------------------------------------------------


def test_every_tensor_of_a_block_is_read_once(model, monkeypatch):
    reads, one, many = Counter(), Checkpoint.read, Checkpoint.read_apart
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: reads.update([name]) or one(self, name))
    monkeypatch.setattr(Checkpoint, "read_apart", lambda self, names: reads.update(names) or many(self, names))
    screen(str(model), CELLS, windows(), HELDOUT, device="cpu")
    inside = {name: count for name, count in reads.items() if name.startswith("model.layers.")}
    assert len(inside) == 2 * 9 and set(inside.values()) == {1}


def test_a_hessian_is_factored_once_for_each_order_and_damping(model, monkeypatch):
    made, right = [], screening.factorize
    monkeypatch.setattr(screening, "factorize", lambda *args: made.append(args[2]) or right(*args))
    configs = {f"{bits}": QuantizeConfig(bits=bits, group_size=32) for bits in (2, 3, 4)}
    configs |= {"64": QuantizeConfig(bits=4, group_size=64), "damped": QuantizeConfig(**W, damp_percent=0.5)}
    screened(model, **configs)
    assert len(made) == 2 * 2 * 4, "two blocks, two factors, four input groups"


def test_hessians_are_of_what_some_cell_selects(model, monkeypatch):
    named, right = [], screening._Screening._solve
    monkeypatch.setattr(screening._Screening, "_solve", lambda self, modules, h: named.append(set(modules)) or right(self, modules, h))
    screened(model, a=CELLS["attention"], b=QuantizeConfig(**W, modules_in_block_to_quantize=[["mlp.down_proj"]]))
    leaves = [{name.rpartition(".")[2] for name in names} for names in named]
    assert leaves == [{"q_proj", "k_proj", "v_proj"}, {"down_proj"}] * 2


# -- what is set aside, fails or is refused --------------------------------------------------------------------------------


def test_what_answers_to_upstream_is_set_aside(model, together):
    assert together["max"].set_aside == ("target_shift", "residual_shift", "tuning_steps")
    assert together["tuned"].set_aside == ()
    best, other = QuantizeConfig(**W, recipe="best"), QuantizeConfig(**W, recipe="tuned")
    found = screened(model, best=best, same=other, half=QuantizeConfig(**W, recipe="best", residual_shift=0))
    assert found["best"].set_aside == ("target_shift", "residual_shift") and found["half"].set_aside == ("target_shift",)
    assert found["best"].kl == found["same"].kl == found["half"].kl == together["tuned"].kl


@pytest.mark.grid
@pytest.mark.parametrize("kind", [FactorizationError, torch.OutOfMemoryError])
@pytest.mark.parametrize("where", ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.down_proj", "lm_head"])
def test_a_failing_cell_leaves_the_others(model, together, monkeypatch, kind, where):
    right = screening.factorize

    def failing(hessian, config, layer, tokens):
        if config.damp_percent == 0.77 and layer.startswith(where):
            raise kind(f"{layer}: on purpose")
        return right(hessian, config, layer, tokens)

    monkeypatch.setattr(screening, "factorize", failing)
    found = screened(model, bad=QuantizeConfig(**W, damp_percent=0.77, lm_head=True), head=CELLS["head"], tuned=CELLS["tuned"])
    for name in ("head", "tuned"):
        assert figures(found[name]) == figures(together[name])
    bad = found["bad"]
    assert where in bad.error and "on purpose" in bad.error and "\n" not in bad.error
    assert bad.kl is bad.quantized_perplexity is bad.top1_agreement is bad.original_perplexity is None
    assert bad.bytes == found["head"].bytes
    assert json.loads(json.dumps(bad.record()))["mode"] == "screening"


def test_where_all_fail_the_walk_ends(model, monkeypatch):
    def failing(*_args):
        raise FactorizationError("on purpose")

    monkeypatch.setattr(screening, "factorize", failing)
    seen = []
    found = screen(str(model), {"one": CELLS["tuned"]}, windows(), HELDOUT, device="cpu", on_block=lambda *at: seen.append(at))
    assert found["one"].error == "on purpose" and seen == [(1, 2)]


def test_rounding_where_it_is_allowed_is_reported(model, monkeypatch):
    def failing(*_args):
        raise FactorizationError("on purpose")

    monkeypatch.setattr(screening, "factorize", failing)
    found = screened(model, one=QuantizeConfig(**W, on_failure="round"))["one"]
    assert found.error is None and found.kl > 0
    assert len(found.fallback_layers) == 2 * 7


def test_progress_reaches_the_end(model):
    seen = []
    screen(str(model), {"one": CELLS["tuned"]}, windows(), HELDOUT, device="cpu", on_block=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("configs", "heldout", "says"),
    [
        ({}, HELDOUT, "screening needs one configuration at least"),
        ({"a": QuantizeConfig(**W, allocate={"bits": [2, 3], "budget_bpw": 2.5})}, HELDOUT, r"configs\['a'\]: quantization.allocate"),
        ({"a": QuantizeConfig(**W), "b": QuantizeConfig(bits=4, group_size=48)}, HELDOUT, r"configs\['b'\]: .*group"),
        ({"a": QuantizeConfig(**W)}, dataclasses.replace(HELDOUT, tokens=HELDOUT.tokens + 96), "token id .* in the held-out windows"),
    ],
)
def test_refused_before_any_work(model, configs, heldout, says):
    with pytest.raises(InputError, match=says):
        screen(str(model), configs, windows(), heldout, device="cpu")
