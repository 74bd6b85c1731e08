"""What a report tells in words and tables, that it is one file without a network, and that nothing in it runs as a script."""

import json
import re

import pytest
import yaml
from report_records import EVIL, comparison, experts, measure, old_run, run, run_page, sweep, sweep_page

from gptq_core.errors import InputError
from tasks.outcome import record as records
from tasks.outcome.record import RunRecord
from tasks.report import compare, page
from tasks.report.find import find
from tasks.report.words import duration, number, percent, size


def words(made, key=None):
    """All texts of a page, or of one of its sections."""
    return json.dumps(
        [[vars(part) for part in section.parts] for section in made.sections if key in (None, section.key)],
        default=lambda value: vars(value) if hasattr(value, "kind") else sorted(value),
        ensure_ascii=False,
    )


def lead(made):
    return " ".join(part.text for part in made.sections[0].parts if part.kind == "text")


def test_the_summary_tells_what_how_much_smaller_how_much_worse_and_whether_that_is_allowed():
    told = lead(run_page(run()))
    assert told.startswith("models/small was quantized to 4 bits (recipe tuned, groups of 32): 3.00 MB instead of 12.00 MB, 75 % smaller.")
    assert "perplexity rises from 20.00 to 21.00 (+5.0 %), the KL from the original is 0.0500 nats per token" in told
    assert "in 90.0 % of all places both name the same next token" in told
    assert "1 of 2 measures differs by more than noise: choice (acc) is at 90.0 % of the original." in told
    assert "It did not pass its gate (max_kl: 0.05 is above 0.01)." in told
    assert "1 layer could not be solved and was rounded to nearest" in told
    assert "25.0 % of the held-out text was also seen in calibration (13 tokens in a row)" in told


def test_noise_is_told_only_where_it_is_known():
    quiet = run()
    quiet["evaluation"]["measures"] = [measure("a", 0.5, 0.49, [0.9, 1.1], True), measure("b", 0.5, 0.5, [0.9, 1.1], True)]
    assert "No difference can be told from noise in any of 2 measures." in lead(run_page(quiet))
    assert "noise" not in lead(run_page(old_run())) and "No gate was set." in lead(run_page(old_run()))


def test_what_was_left_or_fell_back_and_who_loads_it():
    made = run_page(run(notes=["vLLM will not load it"]))
    left = words(made, "left")
    for told in (
        "router: model.layers.0.mlp.gate",
        "model.layers.1.mlp.down_proj (not positive definite)",
        "was not kept: 1.",
        "extra.weight",
        "vLLM will not load it",
    ):
        assert told in left
    assert "rules it does not read" in words(made, "loads")
    assert "none fell back" in words(
        run_page(
            run(assembly=run()["assembly"] | {"fallback_layers": [], "skipped": [], "untuned_blocks": [], "unused_source_tensors": []})
        ),
        "left",
    )


def test_measures_memory_and_limits():
    made = run_page(run())
    assert "choice: told in one sentence." in words(made, "measures") and "80.0 % to 98.0 %" in words(made, "measures")
    assert "2.50 GB" in words(made, "time") and "not kept" in words(made, "quality")
    assert "No calibration token reached expert 0 of block 1" in words(run_page(experts(4)), "experts")


def test_the_config_makes_the_run_again():
    made = run_page(run())
    [config] = [part for part in made.sections[-1].parts if part.kind == "code" and part.name]
    assert yaml.safe_load(config.text) == run()["config"] and config.name == "run.yaml"
    assert "python -m flows quantize run.yaml" in words(made, "config")
    texts = run()
    texts["config"]["quantization"]["dataset"] = ["a text"] * 500
    assert "500 given in the config" in words(run_page(texts), "config") and "a text" not in words(run_page(texts), "config")


def test_old_and_unfinished_records_are_drawn_without_what_they_lack():
    made = run_page(old_run())
    assert {figure.key for figure in made.figures} == {"quality", "errors", "stages"}
    assert "codes" not in [section.key for section in made.sections] and page.html(made)
    bare = records_new()
    assert "Its quality was not measured." in lead(run_page(bare)) and page.html(run_page(bare))
    failed = run(evaluation=None, evaluation_error="OSError: the disk is gone", gate=None)
    assert "The evaluation failed: OSError: the disk is gone." in lead(run_page(failed)) and page.html(run_page(failed))
    broken = run()
    broken["evaluation"] |= {"quantized_perplexity": float("inf"), "kl": float("nan"), "original_perplexity": None}
    assert "Its quality was not measured." in lead(run_page(broken)) and page.html(run_page(broken))


def records_new():
    return {
        "id": "a",
        "key": "b",
        "out": "runs/x",
        "started": "2026-01-02T03:04:05Z",
        "config": {"quantization": {"bits": 3}},
        "calibration_data": run()["calibration_data"],
        "evaluation_data": run()["evaluation_data"],
        "assembly": {"bytes": 1, "original_bytes": 4, "bits_per_weight": 3.2, "quantized_layers": 1},
        "machine": {},
    }


def test_a_sweep_is_a_table_a_front_and_a_choice_with_its_reason():
    made = sweep_page(sweep())
    told = lead(made)
    assert "5 configurations of models/small were quantized and evaluated; 1 of 6 did not complete" in told
    assert "Recommended is b4g32: 3.00 MB instead of 12.00 MB, perplexity +2.5 % against the original." in told
    assert "the smallest that passes the gate" in told and "1 of 6 cells fit" in told
    assert "b7: invalid: bits = 7: must be 2, 3, 4 or 8" in words(made, "failed")
    assert made.label is None and "creening" not in words(made)
    none = sweep(recommended={"name": None, "rule": "the smallest", "reason": "none of 6 cells"})
    assert "None can be recommended." in lead(sweep_page(none)) and page.html(sweep_page(none))


def test_a_screening_says_so_everywhere():
    screened = sweep(mode="screening")
    for row in screened["cells"]:
        row.update(out=None, original_bytes=None, set_aside=["tuning_steps"])
    made = sweep_page(screened)
    assert made.label.startswith("Screening: ") and "screening" in made.kicker
    assert all("screening" in section.title for section in made.sections)
    assert all("screening" in figure.title for figure in made.figures if figure.key.startswith("front"))
    assert all("screening" in figure.plot["layout"]["yaxis"]["title"]["text"] for figure in made.figures if figure.key.startswith("front"))
    assert "does not see tuning_steps" in words(made, "failed")


def test_two_runs_side_by_side():
    other = run(out="runs/other")
    other["config"]["quantization"]["bits"] = 3
    other["assembly"]["bytes"] = 2_400_000
    other["evaluation"]["kl"] = 0.1
    made = comparison(run(), other)
    rows = {row[0]: row[1:] for row in compare.numbers(*map(RunRecord.model_validate, (run(), other)), True)}
    assert rows["size"] == ["3.00 MB", "2.40 MB", "-600.00 kB (-20.0 %)"] and rows["KL per token (nats)"][2] == "+0.05000 (+100.0 %)"
    assert rows["perplexity"][2] == "the same"
    assert "Its KL is 0.1000 instead of 0.05000." in lead(made)
    assert compare.differences(run()["config"], other["config"]) == [["quantization.bits", "4", "3"]]
    assert {figure.key for figure in made.figures} == {"quality", "difference"} and page.html(made)


def test_kl_on_other_held_out_text_is_not_compared():
    other = run(out="runs/other")
    other["evaluation"]["digest"] = "f" * 64
    made = comparison(run(), other)
    assert "not compared: they were judged on different held-out windows (digests eeeeeeeeeeee and ffffffffffff)" in lead(made)
    rows = {row[0]: row[-1] for row in compare.numbers(*map(RunRecord.model_validate, (run(), other)), False)}
    assert rows["KL per token (nats)"] == rows["perplexity"] == "not compared: other held-out text" and rows["size"] == "the same"
    assert "Its KL" not in lead(made) and "quality" not in [section.key for section in made.sections]
    assert "at least one was not evaluated" in lead(comparison(run(), run(evaluation=None)))


def test_everything_from_outside_is_escaped():
    evil = run(out=f"runs/{EVIL}", notes=[EVIL], machine={"gpu": EVIL}, stage_seconds={EVIL: 1.0})
    evil["config"]["model"]["path"] = EVIL
    evil["evaluation"]["measures"][0] |= {"name": EVIL, "protocol": EVIL, "sentence": EVIL}
    evil["evaluation_data"]["source"] = evil["gate"]["checks"][0]["limit"] = EVIL
    evil["assembly"]["skipped"][0] |= {"name": EVIL, "reason": EVIL}
    evil["assembly"]["loads"][0]["consumer"] = EVIL
    for block in evil["blocks"]:
        block["layers"][0] |= {"name": EVIL, "fallback": EVIL}
    cells = sweep(folder=f"runs/{EVIL}")
    cells["cells"][0] |= {"name": EVIL}
    cells["cells"][5]["error"] = EVIL
    cells["front"][-1] = cells["recommended"]["name"] = EVIL
    for made in (run_page(evil), sweep_page(cells), comparison(evil, evil)):
        text = page.html(made)
        assert "<script>window.evil" not in text and "<img src=x" not in text and EVIL not in text
        data = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)[1]
        # what plotly draws would be read as tags by it, were they not entities
        assert "<img" not in json.dumps(json.loads(data)) and "&lt;img" in json.dumps(json.loads(data))


def test_one_file_with_plotly_once_and_a_policy_that_forbids_the_network(tmp_path):
    text = page.write(tmp_path / "new" / "r.html", run_page(run())).read_text()
    assert text.count("plotly.js v") <= 2 and len(text) < 6_000_000 and "default-src 'none'" in text
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href)="(?!#|data:)', own) and 'name="viewport"' in own
    assert own.count("<figure>") == own.count("<details>") == 6


@pytest.fixture
def finished(tmp_path):
    (tmp_path / "small").mkdir()
    records.write(tmp_path / "small", RunRecord.model_validate(run()))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "sweep.json").write_text(json.dumps(sweep()))
    return tmp_path


def test_a_run_and_a_sweep_are_found_by_folder_and_by_file(finished):
    for name in ("small", "small.run.json"):
        found = find(finished / name)
        assert (found.record, found.report) == (RunRecord.model_validate(run()), finished / "small.report.html")
    for name in ("s", "s/sweep.json"):
        found = find(finished / name)
        assert (found.record.id, found.record.screening, found.report) == ("s1", False, finished / "s" / "report.html")


def test_what_is_no_run_is_refused_with_what_would_do(finished):
    (finished / "x.txt").write_text("")
    (finished / "list").mkdir()
    (finished / "list" / "sweep.json").write_text("[]")
    (finished / "half.run.json").write_text("{}")
    for name, told in (
        ("x.txt", "is no record: give"),
        ("nothing", "neither .*nothing.run.json nor"),
        ("half", "run record .*half.run.json is damaged .*: mend it or remove it"),
        ("list", "sweep record .*sweep.json must hold a JSON object: .*the same sweep command writes it again"),
    ):
        with pytest.raises(InputError, match=told):
            find(finished / name)


def test_numbers_are_read_easily():
    assert (size(999), size(2_320_000), size(7.1e9)) == ("999 B", "2.32 MB", "7.10 GB")
    assert (number(25.4), number(0.0430), number(None), number(12345.6), number(7), number(True)) == (
        "25.40",
        "0.04300",
        "–",
        "12,346",
        "7",
        "yes",
    )
    assert (percent(0.0512, signed=True), percent(None), duration(0.031), duration(75), duration(600)) == (
        "+5.1 %",
        "–",
        "0.031 s",
        "75 s",
        "10 min",
    )
