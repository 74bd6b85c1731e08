"""The examples do on a model of two blocks what they say."""

import json
import subprocess
import sys

import matplotlib
import pytest

pytestmark = pytest.mark.slow

SMALL = ("--group-size", "32", "--samples", "4", "--seqlen", "64")


@pytest.fixture(scope="module")
def example(request):
    def run(name, *args):
        command = [sys.executable, str(request.config.rootpath / "examples" / name), *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=request.config.rootpath)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.fixture(scope="module")
def checkpoint(example, tiny_llama, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("examples") / "OUT"
    *blocks, last = example("quantize.py", tiny_llama, corpus, out, "--bits", 4, *SMALL)
    assert [line.partition(",")[0] for line in blocks] == ["block 1 of 2: 7 layers", "block 2 of 2: 7 layers"]
    assert last.startswith(f"{out}: 4.") and last.endswith("bits per weight")
    return out


def test_a_checkpoint_continues_a_text(example, checkpoint):
    lines = [example("load_and_generate.py", checkpoint, "Ba ke lo", "--tokens", 8, "--device", "cpu") for _ in range(2)]
    text = "\n".join(lines[0])
    assert text.startswith("Ba ke lo") and len(text) > len("Ba ke lo")
    assert lines[0] == lines[1], "greedy: the same text again"


@pytest.mark.parametrize(("limit", "choice"), [(1e9, "choice: 2 bits"), (0, "no width has a KL of 0 or less: raise --max-kl")])
def test_three_widths_are_judged_and_the_smallest_within_the_limit_is_chosen(example, tiny_llama, corpus, limit, choice):
    *rows, last = example("sweep_and_choose.py", tiny_llama, corpus, corpus, "--max-kl", limit, *SMALL)
    assert [row.partition("  ")[0] for row in rows] == ["2 bits", "3 bits", "4 bits"]
    kl = [float(row.rpartition("KL ")[2]) for row in rows]
    assert kl == sorted(kl, reverse=True)
    assert last.startswith(choice)


@pytest.mark.parametrize("source", ["manifest", "record"])
def test_the_notebook_draws_a_line_for_each_kind_of_layer(source, request, checkpoint, monkeypatch):
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in (checkpoint / "manifest.jsonl").read_text().splitlines()]
    blocks = [line for line in lines if line["kind"] == "block"]
    record = checkpoint.with_name("OUT.run.json")
    if source == "record":
        blocks[0]["layers"][0]["relative_error"] = 0.5  # not in the manifest: shows which of the two is read
        record.write_text(json.dumps({"blocks": blocks}))
    matplotlib.use("agg")
    monkeypatch.chdir(checkpoint.parent)
    notebook = json.loads((request.config.rootpath / "examples" / "layers.ipynb").read_text())
    found = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec("".join(cell["source"]), found)  # as a notebook does, without one
    record.unlink(missing_ok=True)
    drawn = {line.get_label(): list(line.get_ydata()) for line in found["axes"].get_lines()}
    plt.close(found["figure"])
    wanted = {}
    for block in blocks:
        for layer in block["layers"]:
            wanted.setdefault(".".join(layer["name"].split(".")[-2:]), []).append(layer["relative_error"])
    assert drawn == wanted and len(drawn) == 7


def test_every_example_is_short_and_run_here(request):
    folder = request.config.rootpath / "examples"
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        "quantize.py",
        "sweep_and_choose.py",
        "load_and_generate.py",
        "layers.ipynb",
    }
    assert all(len(path.read_text().splitlines()) < 40 for path in folder.glob("*.py"))
