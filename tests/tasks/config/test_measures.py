"""evaluation.measures: what a config may say, and what is refused before any work."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from gptq_core.data.tokenizer import load_tokenizer
from gptq_core.data.windows import Windows, calibration_windows
from gptq_core.errors import InputError
from gptq_core.model.opened import OpenedModel
from tasks.config.measures import PRESETS
from tasks.config.run import from_dict
from tasks.evaluation.scores import Measures

BASE = {"model": {"path": "m"}, "quantization": {"bits": 4, "dataset": "t.txt"}}
PERPLEXITY = {"wikitext2", "c4"}
TASKS = {"arc_easy", "arc_challenge", "hellaswag", "winogrande", "piqa", "mmlu", "gsm8k", "embedded_choice", "embedded_words"}


SEEN = Windows(torch.arange(64).view(2, 32), "seen", 2)


def measures(found):
    return Measures(found, OpenedModel(Path(found.model.path)))


def check(found):
    return measures(found).check(SEEN)


def config(*measures, **evaluation):
    return from_dict(BASE | {"evaluation": {"measures": list(measures), **evaluation}})


def test_every_preset_is_known_and_says_all_its_keys():
    assert {path.stem for path in PRESETS.glob("*.yaml")} == PERPLEXITY | TASKS
    for path in PRESETS.glob("*.yaml"):
        [measure] = config(path.stem).evaluation.measures
        assert measure.kind == ("perplexity" if path.stem in PERPLEXITY else "tasks")
        said = set(yaml.safe_load(path.read_text()))
        assert said >= set(type(measure).model_fields) - {"include", "name"}, path.stem


@pytest.mark.slow
def test_lm_eval_has_every_task_of_the_presets():
    check(config(*sorted(TASKS)))


def test_names_files_and_measures_in_place_mean_the_same(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("kind: tasks\ntasks: [a, b]\nlimit: 5\n")
    spelled = {"kind": "perplexity", "dataset": "text.jsonl"}, {"kind": "tasks", "tasks": ["a", "b"], "limit": 5}
    found = config(str(own), "text.jsonl", *spelled)
    assert found.evaluation.measures[0] == found.evaluation.measures[3] and found.evaluation.measures[1] == found.evaluation.measures[2]
    assert found.evaluation.has_tasks and not config("text.txt").evaluation.has_tasks
    assert from_dict(found.model_dump(mode="json")) == found, "the expanded config loads again"
    assert found.flat()["evaluation.measures.0.limit"] == 5 and found.flat()["evaluation.measures.1.dataset"] == "text.jsonl"


@pytest.mark.parametrize(
    ("measures", "said"),
    [
        (["arc_eazy"], "did you mean 'arc_easy'"),
        ([{"kind": "tasks", "tasks": []}], "tasks"),
        ([{"tasks": ["a"]}], "kind"),
        ([{"kind": "tasks", "tasks": ["a"], "shots": 3}], "shots"),
        (["none.yaml"], "'none.yaml' is not a preset"),
        ([{"kind": "perplexity", "dataset": "a.txt", "seqlen": 1}], "seqlen"),
        ("arc_easy", "list"),
    ],
)
def test_what_is_wrong_is_told_when_the_config_is_made(measures, said):
    with pytest.raises(InputError, match=said):
        from_dict(BASE | {"evaluation": {"measures": measures}})


@pytest.mark.slow
def test_tasks_and_folders_that_are_not_there_are_told(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        check(config({"kind": "tasks", "tasks": ["x"], "include": str(tmp_path / "no")}))
    with pytest.raises(InputError, match="task 'no_such_task' is not known"):
        check(config({"kind": "tasks", "tasks": ["no_such_task"]}))
    with pytest.raises(InputError, match="'piqa' is named twice"):
        check(config({"kind": "tasks", "tasks": ["piqa", "piqa"]}))


@pytest.mark.slow
def test_tags_data_that_is_missing_and_yaml_that_is_broken_are_told(tmp_path):
    def wanted(*names):
        return config({"kind": "tasks", "tasks": list(names), "include": str(tmp_path)})

    whole = {"dataset_path": "json", "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "t"}
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(whole | {"task": name, "tag": ["pair"]}))
    with pytest.raises(InputError, match="'pair' is a tag of several tasks; name them: a, b"):
        check(wanted("pair"))
    (tmp_path / "c.yaml").write_text("task: c\n  oops: [")
    with pytest.raises(InputError, match=r"'c' is not known: .*c.yaml cannot be read"):
        check(wanted("c"))
    (tmp_path / "a.yaml").write_text(json.dumps(whole | {"task": "a", "dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}))
    with pytest.raises(InputError, match=r"task 'a' names the data file '.*gone.jsonl', which is not there"):
        check(wanted("a"))
    check(wanted("b"))


def test_a_measure_on_the_calibration_text_is_told(tiny_llama, corpus):
    base = {"model": {"path": str(tiny_llama)}, "quantization": {"bits": 4, "dataset": str(corpus)}}
    found = from_dict(base | {"evaluation": {"measures": [str(corpus)]}})
    seen = calibration_windows(str(corpus), load_tokenizer(str(tiny_llama)), 8, 64, 0)
    [note] = measures(found).check(seen)
    assert note.startswith("measure corpus and calibration overlap") and "100.0% of the calibration text" in note
    with pytest.raises(InputError, match="set evaluation.strict: false"):
        measures(from_dict(base | {"evaluation": {"measures": [str(corpus)], "strict": True}})).check(seen)


def test_a_runner_that_is_not_installed_is_told_and_each_runner_is_other_work():
    with pytest.raises(InputError, match="the package vllm is not installed"):
        check(config("embedded_choice", runner="vllm"))
    keys = {measures(config("embedded_choice", runner=runner)).key for runner in (None, "torch", "gptqmodel", "vllm")}
    assert len(keys) == 4 and measures(config()).key is None
    assert [config(runner=runner).evaluation_backend for runner in (None, "torch", "gptqmodel")] == [None, "torch", "gptq_torch"]
    named = from_dict(BASE | {"quantization": BASE["quantization"] | {"backend": "gptq_triton"}, "evaluation": {"runner": "gptqmodel"}})
    assert named.evaluation_backend == "gptq_triton"


def test_a_gate_on_recovery_needs_tasks():
    gated = BASE | {"gate": {"min_recovery": 0.9}}
    with pytest.raises(InputError, match="needs task scores"):
        from_dict(gated | {"evaluation": {"measures": ["text.txt"]}})
    assert from_dict(gated | {"evaluation": {"measures": ["embedded_choice"]}}).gate.min_recovery == 0.9
