"""The measures on real files: against transformers' own arithmetic and against lm-eval called by itself."""

import json
import math
import random

import numpy as np
import pytest
import torch
import transformers

import tasks.evaluation.scores
from gptq_core import QuantizeConfig
from gptq_core.data.tokenizer import load_tokenizer
from gptq_core.data.windows import calibration_windows
from gptq_core.inference.evaluation import load_for_evaluation
from gptq_core.model.opened import open_model
from gptq_core.run.engine import Quantization
from tasks.config.run import from_dict
from tasks.evaluation import lm_eval_harness
from tasks.evaluation.scores import Measures

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_llama, corpus):
    """A checkpoint of two bits, and a folder of tasks with their data beside them."""
    home = tmp_path_factory.mktemp("measured")
    windows = calibration_windows(str(corpus), load_tokenizer(str(tiny_llama)), 8, 64, 0)
    with Quantization.open(str(tiny_llama), QuantizeConfig(bits=2, group_size=32), windows, home / "out", device="cpu") as run:
        for index in range(run.block_count):
            run.quantize_block(index)
        run.assemble()
    (home / "tasks").mkdir()
    chance, words = random.Random(0), corpus.read_text().split()
    questions = []
    for _ in range(24):
        start = chance.randrange(len(words) - 12)
        choices = [" ".join(words[start + 8 : start + 11]), " ".join(chance.sample(words, 3))]
        questions.append({"context": " ".join(words[start : start + 8]), "choices": choices, "answer": 0})
    (home / "tasks" / "pairs.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (home / "tasks" / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in corpus.read_text().splitlines()[:12]))
    common = {"dataset_path": "json", "test_split": "test"}
    tasks_ = {
        "pairs": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        "lines": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }
    for name, task in tasks_.items():
        whole = common | {"task": name, "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}, **task}
        (home / "tasks" / f"{name}.yaml").write_text(json.dumps(whole))
    (home / "tasks" / "both.yaml").write_text(json.dumps({"group": "both", "task": ["pairs", "pairs2"]}))
    twin = common | {"task": "pairs2", "dataset_kwargs": {"data_files": {"test": "pairs.jsonl"}}, **tasks_["pairs"]}
    (home / "tasks" / "pairs2.yaml").write_text(json.dumps(twin))
    return home


@pytest.fixture
def config(home, tiny_llama, corpus):
    def make(*measures):
        return from_dict(
            {
                "model": {"path": str(tiny_llama), "device": "cpu"},
                "quantization": {"bits": 2, "dataset": str(corpus)},
                "output": {"dir": str(home / "out")},
                "evaluation": {"measures": list(measures)},
            }
        )

    return make


def own(home, *names, **more):
    return {"kind": "tasks", "tasks": list(names), "include": str(home / "tasks"), "batch_size": 4, **more}


def test_perplexity_is_what_transformers_computes_on_the_same_windows(config, home, tiny_llama, corpus):
    [row] = measured(config({"kind": "perplexity", "dataset": str(corpus), "seqlen": 48, "samples": 20}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    ids = torch.tensor(tokenizer(corpus.read_text())["input_ids"])
    windows = ids[: len(ids) // 48 * 48].view(-1, 48)
    windows = windows[torch.arange(20) * len(windows) // 20]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    assert row.original == pytest.approx(math.exp(sum(losses) / 20), rel=1e-4)
    quantized = load_for_evaluation(str(home / "out"), "cpu")
    with torch.no_grad():
        losses = [quantized(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    assert row.quantized == pytest.approx(math.exp(sum(losses) / 20), rel=1e-4)
    assert (row.name, row.metric, row.higher_is_better, row.count) == ("corpus", "perplexity", False, 20)
    assert row.recovery == row.original / row.quantized and "20 windows of 48 tokens" in row.protocol


def test_examples_seed_and_batch_size_reach_lm_eval(config, home, monkeypatch):
    import lm_eval

    [row] = measured(config(own(home, "pairs", num_fewshot=2, limit=4)))
    assert ", 2-shot" in row.protocol and row.count == 4
    calls = []

    def stop(model, **keys):
        calls.append(keys)
        raise RuntimeError("far enough")

    monkeypatch.setattr(lm_eval_harness, "load_model", lambda model, **keys: calls.append(keys["batch_size"]))
    monkeypatch.setattr(lm_eval, "simple_evaluate", stop)
    wanted = config(own(home, "pairs", num_fewshot=3, seed=7) | {"batch_size": 5})
    _, [failed] = Measures(wanted, open_model(wanted.model.path)).run()
    size, keys = calls
    assert "far enough" in failed
    assert size == 5 and keys["num_fewshot"] == 3 and {value for key, value in keys.items() if key.endswith("seed")} == {7}


def test_scores_are_those_of_lm_eval_by_itself(config, home, tiny_llama):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = {(row.name, row.metric): row for row in measured(config(own(home, "pairs", "lines", limit=10)))}
    assert set(rows) == {("pairs", "acc"), ("lines", "word_perplexity"), ("lines", "bits_per_byte")}
    absolute = home / "absolute"
    absolute.mkdir()
    for name in ("pairs", "lines"):
        task = json.loads((home / "tasks" / f"{name}.yaml").read_text())
        task["dataset_kwargs"]["data_files"]["test"] = str(home / "tasks" / f"{name}.jsonl")
        (absolute / f"{name}.yaml").write_text(json.dumps(task))
    manager = TaskManager(include_path=str(absolute), include_defaults=False)
    for key, path in (("original", tiny_llama), ("quantized", home / "out")):
        model = HFLM(pretrained=load_for_evaluation(str(path), "cpu"), tokenizer=load_tokenizer(str(path)), batch_size=4)
        found = lm_eval.simple_evaluate(model, tasks=["pairs", "lines"], task_manager=manager, limit=10, bootstrap_iters=0)["results"]
        assert getattr(rows["pairs", "acc"], key) == found["pairs"]["acc,none"]
        assert getattr(rows["lines", "word_perplexity"], key) == pytest.approx(found["lines"]["word_perplexity,none"], rel=1e-9)
        assert getattr(rows["lines", "bits_per_byte"], key) == pytest.approx(found["lines"]["bits_per_byte,none"], rel=1e-9)
    row = rows["pairs", "acc"]
    assert row.count == 10 and row.lost - row.gained == round(10 * (row.original - row.quantized))
    assert "0-shot, the first 10 of each task" in row.protocol and row.sentence.startswith("pairs, acc: ")


def measures(config):
    return Measures(config, open_model(config.model.path))


def measured(config):
    rows, failed = measures(config).run()
    assert failed == []
    return rows


def test_a_group_is_its_questions_together(config, home):
    rows = {row.name: row for row in measured(config(own(home, "both"), own(home, "pairs")))}
    assert rows["both"].original == rows["pairs"].original and rows["both"].count == 48
    assert "the questions of its tasks together" in rows["both"].protocol


def test_a_group_that_lm_eval_sums_up_is_what_it_says_and_loses_no_metric(config, home):
    task(home, "unlike", "lines", include="lines.yaml")
    (home / "tasks" / "summed.yaml").write_text(
        json.dumps(
            {"group": "summed", "task": ["pairs", "short", "unlike"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}]}
        )
    )
    (home / "tasks" / "few.jsonl").write_text("".join((home / "tasks" / "pairs.jsonl").read_text().splitlines(keepends=True)[:3]))
    task(home, "short", "few", include="pairs.yaml")
    rows = {(row.name, row.metric): row for row in measured(config(own(home, "summed")))}
    pairs = measured(config(own(home, "pairs")))[0], measured(config(own(home, "short")))[0]
    assert rows["summed", "acc"].original == pytest.approx((pairs[0].original + pairs[1].original) / 2)
    assert "word_perplexity" in {metric for _, metric in rows}
    if pairs[0].original != pairs[1].original:
        assert rows["summed", "acc"].interval is None, "a mean of means is not made up of its questions"


def task(home, name, data, **keys):
    (home / "tasks" / f"{name}.yaml").write_text(
        json.dumps({"task": name, "dataset_kwargs": {"data_files": {"test": f"{data}.jsonl"}}, **keys})
    )


def test_scalar_log_likelihoods_become_a_perplexity_with_its_own_interval(config, home):
    task(
        home,
        "last",
        "lines",
        dataset_path="json",
        test_split="test",
        output_type="loglikelihood",
        doc_to_text="{{text[:20]}}",
        doc_to_target="{{text[20:]}}",
        metric_list=[{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    )
    (home / "tasks" / "lines.jsonl").write_text((home / "tasks" / "lines.jsonl").read_text() * 2)
    [row] = measured(config(own(home, "last")))
    assert row.interval[0] <= row.recovery <= row.interval[1] and row.count == 24


def test_two_names_of_one_text_are_two_rows_of_one_score(config, home, corpus):
    one = {"kind": "perplexity", "dataset": str(corpus), "seqlen": 40, "samples": 3}
    rows = measured(config(one | {"name": "one"}, one | {"name": "two"}))
    assert [row.name for row in rows] == ["one", "two"] and rows[0].original == rows[1].original


def test_what_fails_costs_no_other_measure(config, home, corpus):
    task(home, "broken", "pairs", include="pairs.yaml", doc_to_text="{{no_such_field.deeper}}")
    rows, failed = measures(config(own(home, "broken"), str(corpus))).run()
    assert [row.metric for row in rows] == ["perplexity"]
    assert len(failed) == 1 and failed[0].startswith("TaskFailedError: evaluation.measures: broken failed in lm-eval (UndefinedError")


def test_a_damaged_store_of_the_original_is_made_anew(config, home):
    mine = config(own(home, "pairs", limit=5))
    before = measured(mine)
    for damage in ('{"scores": ', "[1]"):
        for path in (home / ".originals").iterdir():
            path.write_text(damage)
        assert measured(mine)[0].original == before[0].original


def test_other_data_elsewhere_is_other_work(config, home):
    (home / "outer.jsonl").write_text((home / "tasks" / "pairs.jsonl").read_text())
    task(home, "outer", "../outer", include="pairs.yaml")
    mine = config(own(home, "outer"))
    first, key = measured(mine), measures(mine).key
    (home / "outer.jsonl").write_text("".join((home / "outer.jsonl").read_text().splitlines(keepends=True)[:9]))
    assert measures(mine).key != key and measured(mine)[0].count == 9 != first[0].count


def test_the_original_is_scored_once_for_all_runs_of_a_folder(config, home, monkeypatch):
    asked = []
    right = tasks.evaluation.scores._Judge._scored

    def scored(self, wanted, model, *rest):
        asked.append(str(model.folder))
        return right(self, wanted, model, *rest)

    monkeypatch.setattr(tasks.evaluation.scores._Judge, "_scored", scored)
    mine = config(own(home, "pairs", limit=7))
    first = measured(mine)
    assert [path == mine.model.path for path in asked] == [True, False]
    again = measured(mine)
    assert len(asked) == 3 and all(getattr(again[0], key) == getattr(first[0], key) for key in ("original", "quantized", "interval"))
    # other data under the same name is another original
    data = home / "tasks" / "pairs.jsonl"
    text = data.read_text()
    data.write_text("".join(text.splitlines(keepends=True)[::-1]))
    measures(mine).score_original()
    data.write_text(text)
    assert len(asked) == 4 and asked[-1] == mine.model.path


def test_the_global_generators_stay_as_they_were(config, home):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    measures(config(own(home, "pairs", limit=3))).run()
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
