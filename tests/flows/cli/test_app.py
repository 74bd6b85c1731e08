"""The command line up to the point where Prefect starts: what is wrong is said in one line, at once."""

import json
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from flows.cli.app import KeyHelp, app
from gptq_core.errors import OutputHeldError
from tasks.config.reference import help_of


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def broken(tmp_path, tiny_llama, corpus, monkeypatch):
    """A working directory with the inputs that must be refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gptqmodel", None)  # as where it is not installed
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for path in tiny_llama.iterdir():
        if path.suffix != ".safetensors":
            (pickled / path.name).write_bytes(path.read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("Ba ke lo.")
    (tmp_path / "good").symlink_to(tiny_llama)
    (tmp_path / "good.txt").symlink_to(corpus)
    (tmp_path / "run.yaml").write_text("model: {path: good}\nquantization: {bits: 4, dataset: good.txt, gruop_size: 32}\n")
    return tmp_path


GOOD = ["--model", "good", "--dataset", "good.txt", "--bits", "4", "--group-size", "32"]


@pytest.mark.parametrize(
    "args, said",
    [
        ([*GOOD, "--bits", "5"], "quantization.bits = 5"),
        ([*GOOD, "--group-size", "0"], "quantization.group_size = 0"),
        ([*GOOD, "--group-size", "96"], "group_size 96 does not divide"),
        ([*GOOD, "--model", "gone"], "'gone': no such folder"),
        ([*GOOD, "--model", "pickled"], "pickle"),
        ([*GOOD, "--dataset", "empty.txt"], "empty"),
        ([*GOOD, "--dataset", "short.txt"], "shorter than one window"),
        ([*GOOD, "--dataset", "gone.txt"], "gone.txt"),
        ([*GOOD, "--eval-dataset", "short.txt"], "shorter than one window"),
        ([*GOOD, "--set", "quantization.gruop_size=32"], "did you mean 'group_size'"),
        ([*GOOD, "--set", "quantization.bits"], "key.path=value"),
        ([*GOOD, "--format", "awq"], "quantization.format = 'awq'"),
        ([*GOOD, "--set", "quantization.backend=marlyn"], "quantization.backend = 'marlyn': did you mean 'gptq_marlin'?"),
        ([*GOOD, "--set", "quantization.backend=marlin", "--device", "cpu"], "backend = 'marlin': needs the package gptqmodel"),
        ([*GOOD, "--damp-percent", "1"], "damp_percent"),
        ([*GOOD, "--samples", "0"], "calibration.samples = 0"),
        ([*GOOD, "--device", "foo"], "model.device = 'foo': must be auto, cpu, cuda or cuda:N"),
        ([*GOOD, "--device", ""], "model.device = ''"),
        ([*GOOD, "--device", "meta"], "model.device = 'meta'"),
        ([*GOOD, "--seqlen", "1"], "evaluation.seqlen = 1"),
        ([*GOOD, "--set", "tracking.uri=mlruns"], "tracking.uri = 'mlruns': must be sqlite:///FILE.db"),
        ([*GOOD, "--desc-act", "--set", "quantization.act_group_aware=true"], "act_group_aware"),
        (
            [*GOOD, "--bits", "3", "--set", "output.profile=portable"],
            "output.profile = 'portable': vLLM 0.33 and SGLang 0.5.23 will not load this: bits 3 (must be 4 or 8): set quantization.bits; ",
        ),
        ([*GOOD, "--asym", "--set", "output.profile=portable"], "GPTQModel 7.7 will not load this: sym false with format gptq"),
        (
            [*GOOD, "--set", 'quantization.dynamic={".*down_proj": {bits: 8, desc_act: true}}', "--set", "output.profile=portable"],
            "desc_act true at model.layers.0.mlp.down_proj",
        ),
        ([*GOOD, "--set", 'quantization.dynamic={".*": {}, ".*down_proj": {bits: 8}}'], "'.*down_proj' decides about no linear"),
        ([*GOOD, "--set", "output.profile=any"], "output.profile = 'any'"),
        (["run.yaml"], "did you mean 'group_size'"),
        (["gone.yaml"], "gone.yaml"),
        ([], "model.path is required"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2_and_costs_nothing(broken, args, said):
    before = sorted(path.name for path in broken.iterdir())
    result = call("quantize", *args, "--out", "out")
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and said in result.stderr and result.stdout == ""
    assert sorted(path.name for path in broken.iterdir()) == before


def test_the_plan_tells_who_will_load_the_result_and_writes_nothing(broken):
    (broken / "run.yaml").write_text("model: {path: good}\nquantization: {bits: 3, group_size: 32, dataset: good.txt}\n")
    before = sorted(path.name for path in broken.iterdir())
    found = json.loads(call("plan", "run.yaml", "--json").stdout)
    assert {row["consumer"]: row["loads"] for row in found["loads"]} == {
        "vLLM": False,
        "SGLang": False,
        "transformers": True,
        "GPTQModel": True,
    }
    assert len(found["quantized_layers"]) == 14 and 3 < found["bits_per_weight"] < 5 and found["bytes"] < found["original_bytes"]
    table = call("plan", "run.yaml", "--set", "quantization.group_size=16")
    assert table.exit_code == 0 and "bits 3 (must be 4 or 8)" in table.stdout and "group_size 16 (must be" in table.stdout
    assert call("plan", "gone.yaml").exit_code == 2
    assert sorted(path.name for path in broken.iterdir()) == before


@pytest.mark.parametrize(
    "args",
    [
        ["inspect", "gone"],
        ["evaluate", "gone"],
        ["evaluate", "."],
        ["evaluate", ".", "--samples", "0"],
        ["evaluate", "good", "--dataset", "good.txt", "--seqlen", "1"],
        ["evaluate", "good", "--dataset", "good.txt", "--device", "meta"],
        ["evaluate", "good", "--dataset", "good.txt", "--backend", "marlyn"],
        ["evaluate", "good", "--dataset", "good.txt", "--backend", "marlin"],
    ],
)
def test_a_checkpoint_that_is_none_is_one_line_and_exit_2(broken, args):
    result = call(*args)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1


def test_a_held_output_is_exit_75(broken, monkeypatch):
    def held(config):
        raise OutputHeldError("out is held by process 7")

    monkeypatch.setattr("tasks.request.request.Request.check", held)
    result = call("quantize", *GOOD)
    assert result.exit_code == 75 and result.stderr == "error: out is held by process 7\n"


def test_interruption_is_exit_130(broken, monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("tasks.request.request.Request.check", interrupted)
    result = call("quantize", *GOOD)
    assert result.exit_code == 130 and "resumes" in result.stderr


def test_usage_errors_are_exit_2():
    assert call("quantize", "--nonsense").exit_code == call("nonsense").exit_code == 2


def test_help_and_a_wrong_key_answer_without_torch_and_prefect(request):
    code = (
        "import sys; from flows.cli.app import app\n"
        "for args in (['--help'], ['quantize', '--help']):\n"
        "    app(args, standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'prefect', 'mlflow'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=request.config.rootpath, check=True)
    assert done.stderr.strip() == "[]"
    for command in ("demo", "quantize", "plan", "evaluate", "inspect"):
        assert command in done.stdout


def test_json_is_nothing_but_json(monkeypatch):
    found = {"path": "x", "layers": []}
    monkeypatch.setattr("gptq_core.checkpoint.inspection.inspect_checkpoint", lambda path: found)
    assert json.loads(call("inspect", "x", "--json").stdout) == found


# -- options on config keys -------------------------------------------------------------------------------------------------


def options_on_keys():
    """Command, option and the keys that its help names, as in {quantization.bits}."""
    for name, command in typer.main.get_command(app).commands.items():
        for option in command.params:
            if keys := re.findall(r"\{([a-z_.]+)\}", getattr(option, "help", None) or ""):
                yield name, option, keys


def test_the_help_of_an_option_is_what_the_schema_says_of_its_key():
    found = list(options_on_keys())
    assert {name for name, *_ in found} == {"demo", "quantize", "sweep", "evaluate"} and len(found) > 25
    for name, option, keys in found:
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "400"}).stdout
        assert all(f" {help_of(key)} " in shown for key in keys), (name, option.name)
    groups = typer.main.get_command(app).commands
    assert all(isinstance(groups[name], KeyHelp) for name, *_ in found)


SET = [
    ("quantize", "--out there", "output.dir", "there"),
    ("quantize", "--overwrite", "output.overwrite", True),
    ("quantize", "--model there", "model.path", "there"),
    ("quantize", "--dataset there", "quantization.dataset", "there"),
    ("quantize", "--bits 4", "quantization.bits", 4),
    ("quantize", "--group-size 64", "quantization.group_size", 64),
    ("quantize", "--format gptq_v2", "quantization.format", "gptq_v2"),
    ("quantize", "--asym", "quantization.sym", False),
    ("quantize", "--desc-act", "quantization.desc_act", True),
    ("quantize", "--damp-percent 0.2", "quantization.damp_percent", 0.2),
    ("quantize", "--samples 3", "calibration.samples", 3),
    ("quantize", "--seqlen 7", "calibration.seqlen", 7),
    ("quantize", "--seqlen 7", "evaluation.seqlen", 7),
    ("quantize", "--seed 5", "calibration.seed", 5),
    ("quantize", "--eval-dataset there", "evaluation.dataset", "there"),
    ("quantize", "--device cpu", "model.device", "cpu"),
    ("sweep", "--out there", "sweep.dir", "there"),
    ("sweep", "--mode screening", "sweep.mode", "screening"),
    ("sweep", "--max-parallel 3", "sweep.max_parallel", 3),
    ("sweep", "--runner ray", "sweep.runner", "ray"),
    ("sweep", "--runner ray --address ray://h:1", "sweep.ray_address", "ray://h:1"),
    ("sweep", "--overwrite", "output.overwrite", True),
    ("evaluate", "--dataset there", "evaluate.dataset", "there"),
    ("evaluate", "--model there", "evaluate.model", "there"),
    ("evaluate", "--seqlen 7", "evaluate.seqlen", 7),
    ("evaluate", "--samples 3", "evaluate.samples", 3),
    ("evaluate", "--device cpu", "evaluate.device", "cpu"),
    ("evaluate", "--backend torch", "evaluate.backend", "torch"),
]


def test_every_option_on_a_key_is_tried():
    assert {(name, key) for name, *_, key, _ in SET} >= {
        (name, key) for name, _, keys in options_on_keys() if name != "demo" for key in keys
    }


@pytest.mark.parametrize(("name", "words", "key", "value"), SET)
def test_an_option_sets_the_key_that_its_help_names(name, words, key, value, broken, monkeypatch):
    (broken / "run.yaml").write_text("model: {path: good}\nquantization: {bits: 3, group_size: 32, dataset: good.txt}\n")
    seen = []

    def keep(config, *_rest):
        seen.append(config)
        raise OutputHeldError("far enough")

    for place in ("flows.cli.app.run", "flows.cli.app.run_sweep", "flows.evaluation_request.open_evaluation"):
        monkeypatch.setattr(place, keep)
    start = {"quantize": ["run.yaml"], "sweep": ["run.yaml", "--grid", "group_size=32,64"], "evaluate": ["good"]}[name]
    result = call(name, *start, *words.split())
    assert result.exit_code == 75, result.output
    [config] = seen
    section, _, leaf = key.partition(".")
    if section == name or section == "sweep":
        assert getattr(config, leaf) == value
    else:
        sections = config.base if name == "sweep" else config.model_dump()
        assert sections[section][leaf] == value
    flag = next(word for word in reversed(words.split()) if word.startswith("--"))
    [keys] = [keys for command, option, keys in options_on_keys() if command == name and flag in (*option.opts, *option.secondary_opts)]
    assert keys == [key] or flag == "--seqlen"
