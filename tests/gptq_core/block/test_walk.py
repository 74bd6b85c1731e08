"""The staged forward: what it computes, in what order, and how often."""

import pytest
import torch
from tiny import CONFIGS, DENSE, quantize, save_model, windows
from torch import nn

from gptq_core import QuantizeConfig, load_quantized
from gptq_core.block import walk
from gptq_core.block.group import solve_group
from gptq_core.block.stream import BlockStream
from gptq_core.errors import UnsupportedModelError
from gptq_core.model import capture
from gptq_core.model.architecture import empty_model, find_decoder, linears_of
from gptq_core.run import block_work
from gptq_core.run.engine import Quantization


@pytest.mark.grid
@pytest.mark.parametrize("architecture", DENSE)
@pytest.mark.parametrize("true_sequential", [True, False])
def test_outputs_equal_a_full_forward_of_the_quantized_model(architecture, true_sequential, tmp_path):
    model = save_model(architecture, tmp_path / "model")
    config = QuantizeConfig(bits=4, group_size=32, sym=False, true_sequential=true_sequential)
    result = quantize(model, tmp_path / "out", config)
    quantized = load_quantized(tmp_path / "out")
    last = find_decoder(quantized).blocks[-1]
    seen = []
    last.register_forward_hook(lambda _m, _a, output: seen.append(output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        quantized(input_ids=windows().tokens, use_cache=False)
    torch.testing.assert_close(result["hidden"], seen[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("true_sequential", "expected"), [(True, 1), (False, 2)])
def test_forwards_per_block(true_sequential, expected, tmp_path, monkeypatch):
    """One pass of every batch (two without true_sequential), and one probe of a single window."""
    model = save_model("llama", tmp_path / "model")
    calls: list[tuple[int, int]] = []
    original = capture.Call.__call__

    def counted(self, block, hidden):
        calls.append((id(block), hidden.shape[0]))
        return original(self, block, hidden)

    monkeypatch.setattr(capture.Call, "__call__", counted)
    monkeypatch.setattr("gptq_core.block.stream.TOKENS_PER_FORWARD", {"cpu": 64, "cuda": 64})  # three batches of two windows
    quantize(model, tmp_path / "out", QuantizeConfig(bits=4, group_size=32, true_sequential=true_sequential))
    full = [block for block, size in calls if size == 2]
    assert len(full) == expected * 3 * 2
    assert len([1 for _, size in calls if size == 1]) == 2


def test_groups_are_found_in_call_order(tmp_path, monkeypatch):
    model = save_model("llama", tmp_path / "model")
    found = []

    def seen(members, *rest):
        found.append(tuple(member.name.removeprefix("model.layers.0.") for member in members))
        return solve_group(members, *rest)

    monkeypatch.setattr(block_work, "solve_group", seen)
    with Quantization.open(str(model), QuantizeConfig(bits=4, group_size=32), windows(), tmp_path / "out", device="cpu") as run:
        run.quantize_block(0)
    assert found == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]


class Routed(nn.Module):
    """Two linears of which each batch reaches only one, then a shared one."""

    def __init__(self):
        super().__init__()
        self.even, self.odd, self.last = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x):
        return self.last(self.even(x) if x[0, 0, 0] > 0 else self.odd(x))


def test_a_batch_counts_only_where_it_goes():
    block = Routed()
    linears = dict(block.named_modules())
    linears.pop("")
    hidden = [torch.full((1, 4, 8), sign) for sign in (1.0, -1.0, 2.0)]
    groups = [walk.InputGroup((name,), 8) for name in ("even", "odd", "last")]
    seen = {}
    calls = {1: capture.Call((), {}, 1)}
    walk.walk(block, linears, groups, hidden, calls, lambda g, h, _shift: seen.update({g.names[0]: h.tokens}), True)
    assert seen == {"even": 8, "odd": 4, "last": 12}


def test_quantized_weights_are_seen_downstream_only_with_true_sequential():
    block = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    linears = {"0": block[0], "1": block[1]}
    groups = [walk.InputGroup(("0",), 4), walk.InputGroup(("1",), 4)]
    for true_sequential in (True, False):
        nn.init.eye_(block[0].weight)
        traces = {}

        def solve(group, hessian, _shift, traces=traces):
            traces[group.names[0]] = float(hessian.mean().trace())
            linears[group.names[0]].weight.data.mul_(2)

        walk.walk(block, linears, groups, [torch.ones(1, 3, 4)], {1: capture.Call((), {}, 1)}, solve, true_sequential)
        assert traces == {"0": 4.0, "1": 16.0 if true_sequential else 4.0}


def test_a_weight_is_given_up_when_the_last_batch_has_passed_unless_it_is_wanted():
    block = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    linears, groups = {"0": block[0], "1": block[1]}, [walk.InputGroup(("0",), 4), walk.InputGroup(("1",), 4)]
    calls, entering = {1: capture.Call((), {}, 1)}, [torch.ones(1, 3, 4), torch.randn(1, 3, 4)]
    expected = [block(hidden) for hidden in entering]
    for once in (False, True):
        hidden, seen = list(entering), []

        def solve(_group, _hessian, _shift, seen=seen):
            seen.append([linear.weight.is_meta for linear in linears.values()])

        walk.walk(block, linears, groups, hidden, calls, solve, True, once=once)
        assert seen == [[False, False], [once, False]] and block[1].weight.is_meta == once
        torch.testing.assert_close(hidden, expected)


def test_a_linear_that_a_longer_batch_calls_again_is_refused():
    class Chunked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4, bias=False)

        def forward(self, hidden):
            return torch.cat([self.inner(part) for part in hidden.split(2, dim=1)], 1)

    block, calls = Chunked(), {1: capture.Call((), {}, 1)}
    linears = {"inner": block.inner}
    groups = walk.discover(block, linears, torch.ones(1, 2, 4), calls[1])
    with pytest.raises(UnsupportedModelError, match="inner: called more than once"):
        walk.walk(block, linears, groups, [torch.ones(1, 5, 4)], calls, lambda *_: None, True, once=True)


def test_a_weight_that_a_batch_goes_around_stays():
    block = Routed()
    linears = {name: module for name, module in block.named_modules() if name}
    groups = [walk.InputGroup((name,), 8) for name in linears]
    hidden = [torch.full((1, 4, 8), sign) for sign in (1.0, -1.0)]
    walk.walk(block, linears, groups, hidden, {1: capture.Call((), {}, 1)}, lambda *_: None, True, once=True)
    assert [linear.weight.is_meta for linear in linears.values()] == [False, False, True]
    assert not any(linear._forward_hooks for linear in linears.values())


@pytest.mark.parametrize(("architecture", "reason"), [("gpt2", "Conv1D"), ("mixtral", "experts stacked")])
def test_what_cannot_be_quantized_yet_is_refused_by_name(architecture, reason):
    with pytest.raises(walk.UnsupportedModelError, match=reason):
        find_decoder(empty_model(CONFIGS[architecture](), torch.float32))


@pytest.mark.grid
@pytest.mark.parametrize("architecture", DENSE)
def test_a_few_tokens_show_the_groups_of_a_full_window(architecture, tmp_path, monkeypatch):
    """Also where windows are shorter than what the probe would look at."""
    model, found = save_model(architecture, tmp_path / "model"), {}
    for tokens in (8, 10**6):
        monkeypatch.setattr("gptq_core.block.stream.DISCOVERY_TOKENS", tokens)
        with BlockStream.open(str(model), dtype="auto", device="cpu") as stream:
            stream.enter(windows(seqlen=32))
            with stream.filled(1) as block:
                found[tokens] = stream.input_groups(1, block, linears_of(block))
            assert stream._probe.states[0].shape[:2] == (1, min(tokens, 32))
    assert found[8] == found[10**6] != []
