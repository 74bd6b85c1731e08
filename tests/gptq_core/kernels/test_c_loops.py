"""How the library in C comes to be; products of bfloat16 inputs against float64, and where C does not take them.

What its loops compute is held against their twins in test_kernels.py.
"""

import ctypes
from pathlib import Path

import pytest
import torch

from gptq_core.kernels import c_loops, dispatch
from gptq_core.method.hessian import Hessian

in_c = pytest.mark.skipif(not dispatch.compiles_products(), reason="no avx512_bf16 here, or no C compiler that knows it")


# -- the library ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loops_are_built_once(fresh, monkeypatch):
    if not dispatch.compiles():
        pytest.skip("no C compiler")
    assert dispatch.implementation(torch.device("cpu"), torch.float32) == "c"
    [built] = (fresh / "gptq_core").iterdir()
    assert (fresh / "gptq_core").stat().st_mode & 0o777 == 0o700
    c_loops.library.cache_clear()
    monkeypatch.setattr(c_loops, "_build", None)
    c_loops.library()
    assert [built] == list((fresh / "gptq_core").iterdir())


@pytest.mark.slow
def test_a_library_that_cannot_be_loaded_is_built_anew(fresh, monkeypatch):
    if not dispatch.compiles():
        pytest.skip("no C compiler")
    [built] = (fresh / "gptq_core").iterdir()
    damaged = fresh / "another" / "gptq_core" / built.name
    damaged.parent.mkdir(mode=0o700, parents=True)
    damaged.write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "another"))
    c_loops.library.cache_clear()
    assert c_loops.library().write_back.argtypes and damaged.stat().st_size


def test_a_folder_that_others_may_write_to_is_not_run_from(fresh, caplog):
    (fresh / "gptq_core").mkdir()
    (fresh / "gptq_core").chmod(0o777)
    assert not dispatch.compiles() and "others may write to it" in caplog.text


def test_a_user_without_a_home_folder(fresh, monkeypatch, caplog):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", unknown)
    assert not dispatch.compiles() and "no home folder" in caplog.text


# -- products ------------------------------------------------------------------------------------------------------------


def operand(tokens, columns, gap=0):
    """With so many numbers between two rows, which nobody may read into a sum."""
    chance = torch.Generator().manual_seed(1000 * tokens + columns)
    wide = torch.full((tokens, columns + gap), float("nan"), dtype=torch.bfloat16)
    wide[:, :columns] = torch.randn(tokens, columns, generator=chance)
    return wide[:, :columns]


@in_c
@pytest.mark.parametrize("tokens", [1, 2, 77, 512, 513, 1030])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 50), (48, 48), (97, 193), (200, 5), (10, 400)])
@pytest.mark.parametrize("gap", [0, 3])
def test_products_are_summed_in_float32(tokens, rows, columns, gap):
    left, right = operand(tokens, rows, gap), operand(tokens, columns, gap)
    around = torch.ones(rows + 2, columns + 2)
    c_loops.add_products([(around[1:-1, 1:-1], left, right)])
    expected = torch.ones(rows + 2, columns + 2, dtype=torch.float64)
    expected[1:-1, 1:-1] += left.double().T @ right.double()
    # of the sum's own size, since products that cancel leave the rounding of each; a sum in bfloat16 is off by 2^-9 of it
    sizes = 1 + left.double().norm(dim=0).max() * right.double().norm(dim=0).max()
    assert ((around - expected).abs().max() / sizes) < 2**-21
    edge = around.clone()
    edge[1:-1, 1:-1] = 1
    assert torch.equal(edge, torch.ones_like(edge)), "nothing beside the total is written to"


@in_c
def test_threads_do_not_change_a_bit(monkeypatch):
    x, y = operand(700, 400), operand(700, 530)

    def summed(threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        tall, square = torch.zeros(530, 400), torch.zeros(400, 400)
        for _ in range(2):
            c_loops.add_products([(tall, y, x), (square[200:, :200], x[:, 200:], x[:, :200])])
        return torch.cat([tall, square])

    one = summed(1)
    monkeypatch.setattr(c_loops, "WORTH_THREADS", 0)
    assert torch.equal(summed(2), one) and torch.equal(summed(5), one)
    monkeypatch.setattr(c_loops, "_team", lambda: None)  # a torch without OpenMP
    assert torch.equal(summed(5), one)
    torch.testing.assert_close(one[:530].double(), 2 * y.double().T @ x.double(), rtol=1e-5, atol=1e-3)


@in_c
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("columns", [1, 48, 100, 192, 193, 400])
def test_of_a_product_with_itself_the_lower_half(threads, columns, monkeypatch):
    x = operand(700, columns)
    monkeypatch.setattr(c_loops, "WORTH_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    whole, half = torch.zeros(2, columns, columns)
    c_loops.add_products([(whole, x.clone(), x)])  # laid out apart
    c_loops.add_products([(half, x, x)], lower=True)
    assert torch.equal(half.tril(), whole.tril())
    assert int(half.count_nonzero()) <= columns * (columns + 2 * c_loops.SIDE) / 2, "no more above it than the products are wide"


@in_c
def test_torchs_threads_share_what_is_large(monkeypatch):
    assert c_loops._team() or not torch.backends.openmp.is_available()
    lent = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def team(work, shared, threads, flags):
        lent.append(threads)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)(shared)

    monkeypatch.setattr(c_loops, "_team", lambda: ctypes.cast(team, ctypes.c_void_p))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x = operand(512, 192)
    c_loops.add_products([(torch.zeros(192, 192), x, x)])
    assert lent == [3]
    c_loops.add_products([(torch.zeros(64, 64), x[:, :64], x[:, :64])])
    assert lent == [3], "starting threads would take longer"


@in_c
def test_operands_that_do_not_fit_are_refused():
    x, total = operand(9, 12), torch.zeros(12, 12)
    for wrong in [
        (total, x, x[1:]),
        (total[1:], x, x),
        (total, x.T, x),
        (total.T[:, ::2], x, x[:, ::2]),
        (total, x, x.float()),
        (total.double(), x, x),
        (torch.zeros(9, 9), x.T, x.T),
    ]:
        with pytest.raises(AssertionError):
            c_loops.add_products([wrong])


def in_float32():
    x = operand(100, 60)
    means = []
    for inputs in (x, x.float()):
        hessian = Hessian(60, "cpu")
        hessian.add(inputs)
        means.append(hessian.mean())
    return not dispatch.compiles_products() and torch.equal(*means)


@pytest.mark.parametrize("found", ["amx_bf16", "bf16", "avx512_vnni"])
def test_a_processor_without_the_instructions(found, monkeypatch, fresh):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {found: True})
    assert in_float32()


def test_a_machine_without_a_compiler(monkeypatch, fresh):
    monkeypatch.setenv("CC", str(fresh / "missing"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert in_float32()


@pytest.mark.slow
def test_a_compiler_that_does_not_know_the_instructions_builds_the_other_loops(monkeypatch, fresh, caplog):
    if not dispatch.compiles():
        pytest.skip("no C compiler")
    c_loops.library.cache_clear()
    empty = fresh / "products.c"
    empty.write_text("typedef int nothing;\n")
    monkeypatch.setattr(c_loops, "SOURCES", (c_loops.SOURCES[0], empty))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert in_float32() and c_loops.library().write_back.argtypes
    assert len(caplog.messages) == 1 and "gcc 10 or clang 9" in caplog.text and str(fresh) in caplog.text
