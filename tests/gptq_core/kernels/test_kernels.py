"""The kernels, triton_loops.py's and c_loops.py's, against their twins: those in C on the CPU, those of Triton on the GPU where there is
one, else in its interpreter (see tests/conftest.py)."""

import contextlib
import importlib
import subprocess
import sys
from dataclasses import replace
from unittest.mock import Mock, patch

import pytest
import torch
from oracles import problem

from gptq_core.config import QuantizeConfig
from gptq_core.kernels import c_loops, descent, dispatch, rounding, scale_search
from gptq_core.method.factor import factorize
from gptq_core.method.solver import solve

WIDTHS = [(2, True), (3, False), (4, True), (4, False), (8, False)]
OUT, MORE = 37, 101
"""No multiple of a tile, and more than one of the loops in C."""


@pytest.fixture(params=[pytest.param("triton_loops", marks=pytest.mark.slow), "c_loops"])
def kernels(request):
    """The module, and where it runs."""
    if request.param == "triton_loops":
        pytest.importorskip("triton", reason="Triton is not installed: it is to be had for Linux")
    elif not dispatch.compiles():
        pytest.skip("no C compiler")
    module = importlib.import_module(f"gptq_core.kernels.{request.param}")
    module_device = "cuda" if request.param == "triton_loops" and torch.cuda.is_available() else "cpu"
    with patch.object(dispatch, "kernels", lambda *tensors: None):  # whoever asks gets the twin
        yield module, module_device


@contextlib.contextmanager
def given_to(module):
    with patch.object(dispatch, "kernels", lambda *tensors: module):
        yield


def on_device(kernels, function, *arguments):
    """What a kernel makes of copies of its arguments: its result, and the tensors it was given, back on the CPU. The function by its
    name is the module's own; others are given to it by dispatch."""
    module, device = kernels
    copies = [a.to(device, copy=True) if isinstance(a, torch.Tensor) else a for a in arguments]
    with given_to(module):
        result = (getattr(module, function) if isinstance(function, str) else function)(*copies)
    return [t.cpu() for t in (result if isinstance(result, tuple) else (result,))], [a.cpu() for a in copies if isinstance(a, torch.Tensor)]


def grids(bits, sym, groups, g, out=OUT):
    """Scales that are powers of two, of either sign where symmetric, and zeros."""
    scale = 2.0 ** torch.randint(-3, 0, (groups, out), generator=g)
    if sym:
        return scale * (1 - 2 * torch.randint(0, 2, scale.shape, generator=g)), torch.full_like(scale, 2 ** (bits - 1))
    return scale, torch.randint(0, 2**bits, scale.shape, generator=g).float()


def sparse(block, g):
    """Strictly upper triangular, of 0 and ±1: what is summed up with it stays a multiple of 2^-6."""
    sign = 1 - 2 * torch.randint(0, 2, (block, 1), generator=g)
    return torch.triu((torch.rand(block, block, generator=g) < 2 / block).float(), 1) * sign


@pytest.mark.parametrize(("block", "out"), [(1, OUT), (16, OUT), (102, MORE), (128, OUT)])
@pytest.mark.parametrize(("bits", "sym"), WIDTHS)
def test_the_sweep_equals_its_twin_to_the_bit_where_sums_are_exact(bits, sym, block, out, kernels):
    g = torch.Generator().manual_seed(block)
    scale, zero = grids(bits, sym, 3, g, out)
    group = torch.randint(0, 3, (block,), generator=g)  # interleaved
    now = torch.randint(-150, 150, (block, out), generator=g) / 64
    now[:, :3] = 0
    feedback = torch.eye(block) + sparse(block, g)
    assert block == 1 or ((now / scale[group]) % 1 == 0.5).any()  # ties

    rests = {dtype: now.to(dtype, copy=True) for dtype in (torch.float32, torch.float64)}
    codes, exact = (rounding.round_columns(r, feedback.to(d), scale.to(d), zero.to(d), group, 2**bits - 1) for d, r in rests.items())
    assert torch.equal(codes, exact) and torch.equal(*(r.double() for r in rests.values()))
    (found,), (rest, *_) = on_device(kernels, "round_columns", now, feedback, scale, zero, group, 2**bits - 1)
    assert torch.equal(found, codes)
    assert torch.equal(rest, rests[torch.float32])


@pytest.mark.parametrize("block", [128, 300])
def test_the_sweep_rounds_every_target_to_its_nearest_code(block, kernels):
    g = torch.Generator().manual_seed(0)
    now = torch.randn(block, OUT, generator=g)
    feedback = torch.eye(block) + torch.triu(torch.randn(block, block, generator=g), 1) / block**0.5
    scale, zero = torch.rand(4, OUT, generator=g) * 0.2 + 0.1, torch.randint(0, 16, (4, OUT), generator=g).float()
    group = torch.arange(block) // 30 % 4
    (codes,), (rest, *_) = on_device(kernels, rounding.round_columns, now, feedback, scale, zero, group, 15)

    # the same sweep in float64, with the kernel's codes
    target, step, centre = now.double(), scale[group].double(), zero[group].double()
    for i in range(block):
        left = target[i] - (codes[i] - centre[i]) * step[i]
        target[i + 1 :] -= feedback[i, i + 1 :, None] * left
    assert ((target / step + centre).clamp(0, 15) - codes).abs().max() < 0.5 + 1e-4
    torch.testing.assert_close(rest.double(), target - (codes - centre) * step, rtol=1e-4, atol=1e-4)
    assert (codes != rounding.round_columns(now.clone(), feedback, scale, zero, group, 15)).double().mean() < 1e-3


@pytest.mark.parametrize(("block", "out"), [(1, OUT), (47, MORE), (128, OUT)])
@pytest.mark.parametrize(("bits", "sym"), WIDTHS)
def test_the_descent_equals_its_twin_to_the_bit_where_sums_are_exact(bits, sym, block, out, kernels):
    g = torch.Generator().manual_seed(block)
    scale, zero = (t[0] for t in grids(bits, sym, 1, g, out))
    upper = sparse(block, g)
    damped = upper + upper.T + torch.diag(2.0 ** torch.randint(0, 3, (block,), generator=g))
    codes = torch.randint(0, 2**bits, (block, out), dtype=torch.uint8, generator=g)
    slope = torch.randint(-64, 64, (block, out), generator=g) / 64

    slopes = {dtype: slope.to(dtype, copy=True) for dtype in (torch.float32, torch.float64)}
    moved = {dtype: codes.clone() for dtype in slopes}
    changes = [descent.descend_columns(moved[d], slopes[d], scale.to(d), zero.to(d), 2**bits - 1, damped.to(d)).double() for d in slopes]
    assert torch.equal(*changes) and torch.equal(*(s.double() for s in slopes.values()))
    assert block == 1 or (moved[torch.float32] != codes).any()
    (change,), (after, left, *_) = on_device(kernels, "descend_columns", codes, slope, scale, zero, 2**bits - 1, damped)
    assert torch.equal(after, moved[torch.float32])
    assert torch.equal(left, slopes[torch.float32])
    assert torch.equal(change.double(), changes[0])


@pytest.mark.parametrize(("bits", "length", "smallest_zero"), [(2, 32, None), (3, 16, 1), (4, 100, None), (4, 300, 0), (8, 32, 1)])
def test_the_search_finds_what_its_twin_finds(bits, length, smallest_zero, kernels):
    g = torch.Generator().manual_seed(bits)
    weights = torch.randn(2, length, OUT, generator=g) * torch.logspace(-9, 3, OUT)
    weights[0, :, :3] = 0
    weights[1, :, 5] = weights[1, :, 5].abs()
    importance = torch.rand(2, length, generator=g)
    arguments = weights, importance, 2**bits - 1, smallest_zero
    found, _ = on_device(kernels, "search", *arguments)
    expected = scale_search.search(*arguments)

    def error(scale, zero):
        scale, zero = scale.unsqueeze(1).double(), zero.unsqueeze(1).double()
        rounded = ((weights / scale).round().add(zero).clamp(0, 2**bits - 1) - zero) * scale
        return ((rounded - weights).square() * importance.unsqueeze(2)).sum(1)

    torch.testing.assert_close(error(*found), error(*expected), rtol=1e-4, atol=0)  # never worse but for the order of a sum
    same = (found[0] == expected[0]) & (found[1] == expected[1])
    assert same.double().mean() > 0.97
    assert (found[0][0, :3] == 1).all()
    assert torch.equal(found[0], found[0].half().float())
    if smallest_zero is None:  # the extreme lies on the longer side
        assert (found[0] < 0).any() and (found[0] > 0).any()


def test_weights_that_are_no_numbers_get_no_scale(kernels):
    weights = torch.ones(1, 16, OUT)
    weights[0, 3, 2] = float("nan")
    arguments = weights, torch.ones(1, 16), 15, None
    for scale, _ in (on_device(kernels, "search", *arguments)[0], scale_search.search(*arguments)):
        assert not scale[0, 2].isfinite() and scale[0, 3:].isfinite().all()


@pytest.mark.parametrize("smallest_zero", [None, 0])
def test_candidates_beyond_float16_are_no_choice(kernels, smallest_zero):
    weights = torch.randn(1, 16, OUT, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) * 1.5e5
    weights[0, :, 0] *= 1e4  # beyond it whatever the candidate
    arguments = weights, torch.ones(1, 16), 15, smallest_zero
    (found, _), _ = on_device(kernels, "search", *arguments)
    expected, _ = scale_search.search(*arguments)
    assert torch.equal(found.isfinite(), expected.isfinite()) and found.isfinite().sum() == OUT - 1
    assert torch.equal(found[found.isfinite()], expected[found.isfinite()])


def test_errors_beyond_float32_leave_no_scale(kernels):
    arguments = torch.ones(1, 16, OUT) * 0.3, torch.full((1, 16), float("inf")), 15, None
    for scale, _ in (on_device(kernels, "search", *arguments)[0], scale_search.search(*arguments)):
        assert not scale.isfinite().any()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"])
def test_defaults_of_the_process_change_nothing(default, kernels):
    """transformers sets the default dtype while it builds a model, in whatever thread."""
    g = torch.Generator().manual_seed(0)
    arguments = torch.randn(2, 32, OUT, generator=g), torch.rand(2, 32, generator=g), 15, 0
    (expected, _) = on_device(kernels, "search", *arguments)
    before = torch.get_default_dtype()
    with torch.device("meta") if default == "meta" else contextlib.nullcontext():
        torch.set_default_dtype(before if default == "meta" else default)
        try:
            found, own = on_device(kernels, "search", *arguments)[0], scale_search.search(*arguments)
        finally:
            torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in own)


WAYS = {
    "tuned": {},
    "one output": {"rows": 1},
    "asymmetric": {"sym": False, "bits": 3},
    "searched while swept": {"recipe": "classic", "scale_search": "weighted"},
    "whole rows": {"group_size": -1, "bits": 8},
    "groups out of order": {"desc_act": True, "descent": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_solved_by_kernels_is_the_layer_solved_without(way, kernels):
    fields = {"bits": 4, "group_size": 48, "damp_percent": 0.05, "rows": OUT} | WAYS[way]
    weight, hessian = problem(144, fields.pop("rows"))
    config = QuantizeConfig(**fields)
    factor = factorize(hessian, config, "layer", 600)
    plain = solve(weight, factor, config)
    module, device = kernels
    called = Mock(wraps=module)
    with given_to(called):
        there = {name: value.to(device) for name, value in vars(factor).items() if isinstance(value, torch.Tensor)}
        solved = solve(weight.to(device), replace(factor, **there), config)
    assert called.search.called and called.round_columns.called
    assert called.descend_columns.called == bool(config.descent)
    assert (solved.codes.cpu() != plain.codes).double().mean() < 0.01
    torch.testing.assert_close(solved.loss.cpu().sum(), plain.loss.sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [True, False])
def test_a_block_is_booked_as_by_the_twin(dtype, kept):
    if not dispatch.compiles():
        pytest.skip("no C compiler")
    g = torch.Generator().manual_seed(0)
    target, left = torch.randn(100, OUT, generator=g), torch.randn(40, OUT, generator=g)
    here, group = torch.randperm(100, generator=g)[:40], torch.randint(0, 3, (40,), generator=g)
    scale, zero = grids(4, False, 3, g)
    found = torch.randint(0, 16, (40, OUT), dtype=torch.uint8, generator=g)
    diagonal = torch.rand(40, generator=g)

    def booked(module):
        codes, loss = torch.zeros(100, OUT, dtype=torch.uint8), torch.ones(OUT)
        delta, errors = torch.zeros(40, OUT, dtype=dtype), torch.zeros(40, OUT, dtype=dtype) if kept else None
        with given_to(module):
            rounding.write_back(found, left.clone(), target, here, scale, zero, group, diagonal, codes, delta, errors, loss)
        return codes, delta, loss, *([errors] if kept else [])

    ours, twins = booked(c_loops), booked(None)
    assert torch.equal(ours[0], twins[0]) and (ours[0][here] == found).all()
    tolerance = {} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}  # next to a tie, of bfloat16 the next number
    for one, other in zip(ours[1:], twins[1:], strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    exact = (target[here] - (found - zero[group]) * scale[group]).flip(0)
    assert (ours[1].double() - exact).abs().max() <= 2**-8 * exact.abs().max() + 1e-6


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gptq_core.kernels import triton_loops as fused

POINTERS = {"codes": "*u8", "group": "*i64"}
VALUES = {"MAX_CODE": 15, "BLOCK": 128, "CHUNK": 128, "TILE": fused.TILE, "SMALLEST_ZERO": 1, "COARSE": 16, "FINE": 4, "LEAST": 0.4,
          "MOST": 1.1, "SMALLEST_SCALE": 2.0**-24}

def kind(name):
    if name.isupper():
        return "constexpr"
    return "i32" if name in ("block", "columns", "out") or name.endswith("stride") else POINTERS.get(name, "*fp32")

for kernel, sym in ((fused._round_columns, 0), (fused._descend_columns, 0), (fused._search, True), (fused._search, False)):
    values = {(i,): (VALUES | {"SYM": sym})[name] for i, name in enumerate(kernel.arg_names) if name.isupper()}
    source = ASTSource(fn=kernel, signature={name: kind(name) for name in kernel.arg_names}, constexprs=values)
    for capability in (80, 90):
        made = compile(source, target=GPUTarget("cuda", capability, 32), options=fused.LAUNCH)
        assert "div.rn.f32" in made.asm["ptx"] or "__nv_" in made.asm["ptx"], kernel
        assert not {"fma.rn.f32", "div.full.f32"} & set(made.asm["ptx"].split()), kernel
        assert ".local" not in made.asm["ptx"], kernel
print("compiled")
"""


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here(request, tmp_path, monkeypatch):
    """The compiler wants more than the interpreter. Products and sums stay apart, divisions are true, nothing leaves the registers."""
    pytest.importorskip("triton", reason="Triton is not installed: it is to be had for Linux")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=request.config.rootpath, capture_output=True, text=True)
    assert done.stdout.strip() == "compiled", done.stderr
