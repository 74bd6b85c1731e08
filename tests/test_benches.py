"""The benches that measure this engine alone: that they start, and what they make of what they measured. No time is judged here."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from oracles import problem, textbook_gptq

from gptq_core import Quantization, QuantizeConfig
from gptq_core.kernels import dispatch

BENCH = Path(__file__).parent / "bench"
WITH_ARGUMENTS = sorted(path.name for path in BENCH.glob("*.py") if "ArgumentParser" in path.read_text())
FORBIDDEN = ("prefect", "mlflow", "typer", "rich", "flows", "tasks")
TOLD = {"seconds", "floor", "ratio"}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "same_threads")]


@pytest.fixture
def same_threads():
    """A bench sets the number of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bench(monkeypatch):
    """Imports a bench by name as a script finds its siblings, and forgets all of them afterwards."""
    monkeypatch.syspath_prepend(BENCH)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(BENCH)):
            del sys.modules[name]


def start(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    module.main()


def written(folder):
    """The one result of a bench, and its page."""
    [record], [page] = folder.glob("*.json"), folder.glob("*.md")
    assert record.stem == page.stem
    return json.loads(record.read_text()), page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_ARGUMENTS)
def test_help(name, bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCH / name), run_name="__main__")
    assert ended.value.code == 0
    assert f"tests/bench/{name}" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["classic", "tuned", "best"])
def test_floors_count_what_their_formulas_say(recipe, bench, tmp_path):
    """Two blocks of hidden size 64, intermediate 128, 4 heads of 16: groups of (inputs, outputs) as below, six windows of 32 tokens."""
    floors = bench("floors")
    groups, tokens = 2 * [(64, 64 + 32 + 32), (64, 64), (64, 256), (128, 64)], 6 * 32
    weights, squares, cubes = (sum(n * r for n, r in groups), sum(n * n for n, _ in groups), sum(n**3 for n, _ in groups))
    model = tiny.save_model("llama", tmp_path / "model")
    config = QuantizeConfig(bits=4, group_size=32, recipe=recipe)
    rates = floors.Rates({"float32": 2.0}, 4.0, 8.0, 16.0, 16.0)
    with Quantization.open(str(model), config, tiny.windows(), tmp_path / "out", device="cpu") as run:
        for index in range(run.block_count):
            run.quantize_block(index)
        run.assemble()
        found = floors.floors(run, rates)
        seconds = run.stage_seconds
    streams = 2 if recipe == "best" else 1
    expected = {
        "forward": streams * 2 * tokens * (weights + 2 * 32 * 64),
        "hessian": tokens * squares,
        "factor": cubes / 3,
        "scales": (2 if recipe == "classic" else 8 * 38) * weights,
        "sweep": sum((n * n + 128 * n) * r for n, r in groups),
        "pack": 2.5 * weights,
        "read": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "write": sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")),
    }
    if recipe != "classic":
        expected["descent"] = sum((2 * n * n + 128 * n) * r for n, r in groups)
    if recipe == "best":
        residual = 2 * (2 * tokens * 64 * 64 + 2 * tokens * 128 * 64)  # o_proj and down_proj of both blocks
        expected["shift"] = 2 * tokens * squares + residual + cubes / 3 + 4 * sum(n * n * r for n, r in groups)
    assert {stage: floor.amount for stage, floor in found.items()} == pytest.approx(expected)
    assert {stage: floor.seconds for stage, floor in found.items()} == pytest.approx(
        {stage: amount / {"scales": 4.0, "pack": 8.0, "write": 16.0, "read": 16.0}.get(stage, 2.0) for stage, amount in expected.items()}
    )
    assert expected.keys() <= seconds.keys(), "a floor of what is no stage"


def test_a_model_is_written_in_shards_that_the_engine_reads(bench, monkeypatch, tmp_path):
    models = bench("models")
    monkeypatch.setattr(models, "SHARD_BYTES", 200_000)
    size = models.write_llama(tmp_path, models.SHAPES["tiny"] | {"tie_word_embeddings": True}, torch.device("cpu"))
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and size == sum(path.stat().st_size for path in shards)
    windows = models.random_windows(models.SHAPES["tiny"], 2, 32)
    found = models.quantize(tmp_path, QuantizeConfig(bits=4), windows, tmp_path / "out")
    assert len(found["blocks"]) == 2 and sum(found[part] for part in ("open", "capture", "all_blocks", "assemble")) == pytest.approx(
        found["seconds"]
    )


def test_stages_over_their_floor_are_marked(bench):
    floors = bench("floors")
    found = {"sweep": floors.Floor(8.0, "FLOP", "float32", 1.0), "factor": floors.Floor(8.0, "FLOP", "float32", 1.0)}
    stages = floors.stage_records({"sweep": 3.5, "factor": 2.0, "tuning": 1.0}, found)
    lines = {line.split(" | ")[0].strip("| "): line for line in floors.table(stages, 8.0).splitlines()}
    assert "**3.5**" in lines["sweep"] and "2.0" in lines["factor"] and "**" not in lines["factor"]
    assert lines["tuning"].split(" | ")[3:5] == ["", ""]
    assert lines["outside the stages"].split(" | ")[1] == "1.500"


def test_stages_of_a_local_model(bench, monkeypatch, tmp_path, tiny_llama, corpus):
    start(
        bench("stages"),
        monkeypatch,
        tiny_llama,
        "--calibration",
        corpus,
        "--samples",
        4,
        "--seqlen",
        32,
        "--quick",
        "--threads",
        1,
        "--recipe",
        "best",
        "--out",
        tmp_path,
    )
    results, page = written(tmp_path)
    stages = results["run"]["stages"]
    assert stages.keys() >= {"read", "forward", "hessian", "factor", "shift", "scales", "sweep", "descent", "pack", "write"}
    assert all(own.keys() == TOLD and own["floor"]["seconds"] > 0 for own in stages.values())
    assert str(tiny_llama) not in json.dumps(results) and "| sweep |" in page


def test_the_loop_of_the_solver_bench_is_the_textbook_s(bench):
    solver = bench("solver")
    weight, hessian = problem(256)
    rounded, loss = solver.textbook_sweep(weight, solver.textbook_factor(hessian), 4, 64)
    oracle = textbook_gptq(
        weight, hessian, bits=4, group_size=64, sym=True, damp_percent=solver.DAMPING, order=torch.arange(256), groups_follow_order=False
    )
    codes, g_idx = oracle["codes"].double(), oracle["g_idx"].long()
    theirs = ((codes - oracle["zeros"][g_idx]) * oracle["scales"][g_idx]).T
    # their scales are float16, and a code that lies between two draws others along
    assert torch.isclose(rounded.double(), theirs, rtol=1e-2, atol=1e-2).double().mean() > 0.9
    assert float(loss.sum()) == pytest.approx(float(oracle["loss"].sum()), rel=0.01)
    error, damped = weight - rounded, hessian + solver.DAMPING * hessian.diagonal().mean() * torch.eye(256)
    assert torch.allclose(loss, (error @ damped * error).sum(1), rtol=1e-3)


def test_solver(bench, monkeypatch, tmp_path):
    start(bench("solver"), monkeypatch, "--sizes", "128,256", "--rounds", 1, "--threads", 1, "--out", tmp_path)
    results, page = written(tmp_path)
    assert [own["columns"] for own in results["sizes"]] == [128, 256]
    for own in results["sizes"]:
        assert own["seconds"].keys() >= {"textbook sweep", "textbook factor", "factor", "classic", "static: sweep", "tuned: descent"}
        assert own["loss, ours over the loop's"] == pytest.approx(1, rel=0.05), "not the same problem"
        assert min(own["loop over ours"].values()) > 0 and min(own["over its products"].values()) > 0
    assert "| tuned: scales, s |" in page and len(results["exponents"]) == len(results["sizes"]) - 1 > 0


@pytest.mark.slow
def test_growth(bench, monkeypatch, tmp_path):
    growth = bench("growth")
    monkeypatch.setattr(growth, "fixed", lambda *_: {"imports": 3.0, "first": 0.5, "second": 0.25})  # a process of its own
    start(
        growth,
        monkeypatch,
        "--shape",
        "tiny",
        "--blocks",
        "1,3",
        "--windows",
        "2,4",
        "--seqlen",
        32,
        "--rounds",
        1,
        "--threads",
        1,
        "--out",
        tmp_path,
    )
    results, page = written(tmp_path)
    assert [len(own["blocks"]) for own in results["depth"].values()] == [1, 3]
    assert [row["tokens"] for row in results["tokens"]["rows"]] == [64, 128]
    assert "the smallest run 0.50 s" in page


def test_growth_tells_a_climb_from_none_and_leaves_the_first_block_out(bench):
    growth = bench("growth")
    assert growth.depth([{"blocks": [9.0, 1.0, 1.0, 1.0]}])["climb"] == pytest.approx(0)
    climbing = growth.depth([{"blocks": [9.0, 1.0, 2.0, 3.0]}, {"blocks": [9.0, 1.0, 2.0, 3.0]}, {"blocks": [9.0, 5.0, 5.0, 5.0]}])
    assert climbing["climb"] == pytest.approx(1.0) and climbing["mean"] == pytest.approx(2.0)


def test_growth_fits_a_line_through_tokens(bench):
    def run(count):
        return {"tokens": count, "seconds": 2 + 0.5 * count, "stages": {"forward": {"seconds": 0.25 * count}, "sweep": {"seconds": 1.0}}}

    lines = bench("growth").tokens({count: [run(count)] for count in (8, 16, 32)})["lines"]
    assert (lines["seconds"]["a token"], lines["seconds"]["at no token"]) == pytest.approx((0.5, 2))
    assert lines["stages that see tokens"]["a token"] == pytest.approx(0.25) and lines["seconds"]["farthest off"] == pytest.approx(0)


@pytest.mark.slow
def test_gpu_bench_runs_on_a_cpu_with_the_engine_alone(tmp_path):
    """In processes that cannot import what a machine with a GPU may lack."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({FORBIDDEN!r}))\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{BENCH.parents[1]}"}
    check = [sys.executable, "-c", "import tasks"]
    assert b"ModuleNotFoundError" in subprocess.run(check, env=environment, capture_output=True).stderr
    command = [
        sys.executable,
        str(BENCH / "gpu.py"),
        *"--device cpu --shape tiny --windows 4 --seqlen 32 --threads 1 --quick".split(),
        "--recipes",
        "best",
        "--blocks",
        "1",
        "--folder",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results, page = written(tmp_path / "out")
    run = results["runs"]["best"]
    assert run["stages"].keys() >= {"read", "forward", "hessian", "factor", "shift", "scales", "sweep", "descent", "pack", "write"}
    assert all(own["floor"]["seconds"] > 0 for own in run["stages"].values())
    assert min(run["tokens_a_second"], run["flop_a_second"], run["peak_bytes"]["host"]) > 0
    assert run["extrapolated_seconds"] > run["seconds"] and "EXTRAPOLATED to 2 blocks" in page
    assert {path.name for path in tmp_path.iterdir()} == {"sitecustomize.py", "out"}, "the model and the checkpoints are left behind"


def test_kernels(bench, monkeypatch, tmp_path):
    start(bench("inner_loops"), monkeypatch, "--device", "cpu", "--rows", "32,64", "--columns", 256, "--times", 1, "--out", tmp_path)
    results, page = written(tmp_path)
    products = dispatch.compiles_products()
    assert [own["what"].split(",")[0] for own in results["calls"]] == 2 * ["sweep", "books", "descent", "scales"] + products * ["hessian"]
    assert all(own["kernel"] > 0 and own["twin"] > 0 and own["alike"] > 0.95 for own in results["calls"])
    assert results["kernels"] == dispatch.implementation(torch.device("cpu"), torch.bfloat16)
    assert ("both columns are the twin" in page) == (not dispatch.compiles())


def test_the_twin_of_a_kernel_is_plain_torch(bench, monkeypatch):
    """Both columns would be the same, and alike, if the kernel stood in for its twin."""
    kernels, given = bench("inner_loops"), []
    monkeypatch.setattr(dispatch, "kernels", lambda *_tensors: given.append(True))
    for each in kernels.problems(8, 256, torch.device("cpu")):
        given.clear()
        kernels.compare(each, torch.device("cpu"), 1)
        assert len(given) == 2, each[0]
