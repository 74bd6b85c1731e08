"""evaluation.measures: what a config may say, and what is refused before any work."""

import pytest
import yaml

from gptq_core.errors import InputError
from tasks.config import from_dict
from tasks.measures import PRESETS
from tasks.measuring import check_measures, measures_key

BASE = {"model": {"path": "m"}, "quantization": {"bits": 4, "dataset": "t.txt"}}
PERPLEXITY = {"wikitext2", "c4"}
TASKS = {"arc_easy", "arc_challenge", "hellaswag", "winogrande", "piqa", "mmlu", "gsm8k", "embedded_choice", "embedded_words"}


def config(*measures, **evaluation):
    return from_dict(BASE | {"evaluation": {"measures": list(measures), **evaluation}})


def test_every_preset_is_known_and_says_all_its_keys():
    assert {path.stem for path in PRESETS.glob("*.yaml")} == PERPLEXITY | TASKS
    for path in PRESETS.glob("*.yaml"):
        [measure] = config(path.stem).evaluation.measures
        assert measure.kind == ("perplexity" if path.stem in PERPLEXITY else "tasks")
        said = set(yaml.safe_load(path.read_text()))
        assert said >= set(type(measure).model_fields) - {"include", "name"}, path.stem


def test_lm_eval_has_every_task_of_the_presets():
    check_measures(config(*sorted(TASKS)))


def test_names_files_and_measures_in_place_mean_the_same(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("kind: tasks\ntasks: [a, b]\nlimit: 5\n")
    spelled = {"kind": "perplexity", "dataset": "text.jsonl"}, {"kind": "tasks", "tasks": ["a", "b"], "limit": 5}
    found = config(str(own), "text.jsonl", *spelled)
    assert found.evaluation.measures[0] == found.evaluation.measures[3] and found.evaluation.measures[1] == found.evaluation.measures[2]
    assert found.evaluation.has_tasks and not config("text.txt").evaluation.has_tasks
    assert from_dict(found.model_dump(mode="json")) == found, "the expanded config loads again"
    assert found.flat()["evaluation.measures.0.limit"] == 5 and found.flat()["evaluation.measures.1.dataset"] == "text.jsonl"


@pytest.mark.parametrize(("measures", "said"), [
    (["arc_eazy"], "did you mean 'arc_easy'"), ([{"kind": "tasks", "tasks": []}], "tasks"), ([{"tasks": ["a"]}], "kind"),
    ([{"kind": "tasks", "tasks": ["a"], "shots": 3}], "shots"), (["none.yaml"], "'none.yaml' is no preset"),
    ([{"kind": "perplexity", "dataset": "a.txt", "seqlen": 1}], "seqlen"), ("arc_easy", "list"),
])  # fmt: skip
def test_what_is_wrong_is_told_when_the_config_is_made(measures, said):
    with pytest.raises(InputError, match=said):
        from_dict(BASE | {"evaluation": {"measures": measures}})


def test_tasks_and_folders_that_are_not_there_are_told(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        check_measures(config({"kind": "tasks", "tasks": ["x"], "include": str(tmp_path / "no")}))
    with pytest.raises(InputError, match="task 'no_such_task' is not known"):
        check_measures(config({"kind": "tasks", "tasks": ["no_such_task"]}))
    with pytest.raises(InputError, match="'piqa' is named twice"):
        check_measures(config({"kind": "tasks", "tasks": ["piqa", "piqa"]}))


def test_a_runner_that_is_not_installed_is_told_and_each_runner_is_other_work():
    with pytest.raises(InputError, match="the package vllm is not installed"):
        check_measures(config("embedded_choice", runner="vllm"))
    keys = {measures_key(config("embedded_choice", runner=runner)) for runner in (None, "torch", "gptqmodel", "vllm")}
    assert len(keys) == 4 and measures_key(config()) is None
    assert [config(runner=runner).evaluation_backend for runner in (None, "torch", "gptqmodel")] == [None, "torch", "gptq_torch"]
    named = from_dict(BASE | {"quantization": BASE["quantization"] | {"backend": "gptq_triton"}, "evaluation": {"runner": "gptqmodel"}})
    assert named.evaluation_backend == "gptq_triton"


def test_a_gate_on_recovery_needs_tasks():
    gated = BASE | {"gate": {"min_recovery": 0.9}}
    with pytest.raises(InputError, match="needs the scores of tasks"):
        from_dict(gated | {"evaluation": {"measures": ["text.txt"]}})
    assert from_dict(gated | {"evaluation": {"measures": ["embedded_choice"]}}).gate.min_recovery == 0.9
