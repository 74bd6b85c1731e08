"""Which windows `evaluate` judges. The original stands in for its checkpoint: only texts are looked at here."""

import shutil

import pytest
from pydantic import ValidationError

from flows.evaluation_request import open_evaluation
from gptq_core.errors import InputError
from tasks.config.evaluation import EvaluationRequest
from tasks.config.run import from_dict
from tasks.outcome import record as records
from tasks.outcome.parts import Assembly
from tasks.request.handing import handed_on
from tasks.request.request import Requests
from tasks.request.texts import save


@pytest.fixture
def run(tiny_llama, corpus, tmp_path, monkeypatch):
    """A run that was made with relative paths from `there`, and this process somewhere else."""

    def make(**evaluation):
        there = tmp_path / "there"
        there.mkdir()
        monkeypatch.chdir(there)
        (there / "model").symlink_to(tiny_llama)
        shutil.copy(corpus, there / "text.txt")
        config = from_dict(
            {
                "model": {"path": "model"},
                "quantization": {"bits": 4, "dataset": "text.txt"},
                "evaluation": evaluation,
                "calibration": {"samples": 4, "seqlen": 16},
                "output": {"dir": "runs/out"},
            }
        )
        shutil.copytree(tiny_llama, config.out)
        data = save(Requests().texts(config).evaluation, records.beside(config.out, ".work"), "evaluation")
        assembly = Assembly(bytes=1, original_bytes=4, bits_per_weight=4.0, quantized_layers=1)
        records.write(config.out, records.new(config, "k" * 64, records.now(), data, data, assembly))
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        return there / "runs" / "out", data, there

    return make


def windows(out, **asked):
    return open_evaluation(EvaluationRequest(checkpoint=str(out), **asked)).windows


def test_the_windows_of_the_run_are_judged_again_from_anywhere(run, monkeypatch):
    out, data, there = run(seqlen=64)
    found = open_evaluation(EvaluationRequest(checkpoint=str(out)))
    assert found.windows.digest == data.digest and found.original == str(there / "model")
    (there / "text.txt").write_text("another text")
    assert windows(out).digest == data.digest, "the file of the run is read, not the text"
    assert windows(out, seqlen=64).digest == data.digest
    assert windows(out, samples=1).count == 1


def test_an_original_that_is_named_is_compared_with(run, tiny_llama):
    out, _, there = run(seqlen=64)
    assert (
        open_evaluation(EvaluationRequest(checkpoint=str(out), model=str(tiny_llama))).original == str(tiny_llama) != str(there / "model")
    )


def test_without_the_file_the_same_tail_is_cut_or_none(run):
    out, data, there = run(seqlen=64)
    shutil.rmtree(records.beside(out, ".work"))
    assert windows(out).digest == data.digest
    text = (there / "text.txt").read_text()
    (there / "text.txt").write_text(text + text[:5000])
    with pytest.raises(InputError, match="no longer the one .*--dataset"):
        windows(out)


def test_more_windows_than_the_run_judged_are_of_the_same_tail(run):
    out, data, _ = run(seqlen=16, samples=2)
    assert data.windows == 2 and windows(out, samples=3).count == 3 and windows(out, samples=1).count == 1


def test_a_longer_tail_is_refused(run, corpus):
    out, _, _ = run(seqlen=32)
    for seqlen in (16, 64):
        with pytest.raises(InputError, match=rf"--seqlen {seqlen}: .* windows of 32; .*--dataset FILE"):
            windows(out, seqlen=seqlen)
    assert windows(out, seqlen=64, dataset=str(corpus)).seqlen == 64


def test_a_text_of_its_own_takes_any_window(run, corpus):
    out, data, _ = run(seqlen=32, dataset="text.txt")
    assert windows(out).digest == data.digest
    assert windows(out, seqlen=64).seqlen == 64


def test_the_runner_is_the_one_asked_for_or_the_runs(run, monkeypatch):
    out, _, _ = run()
    asked = []
    monkeypatch.setattr("flows.evaluation_request.for_checkpoint", lambda backend, *_rest: asked.append(backend))
    devices = []
    monkeypatch.setattr("flows.evaluation_request.choose_device", devices.append)
    assert open_evaluation(EvaluationRequest(checkpoint=str(out))).backend is None
    record = records.read(out)
    record.config["quantization"]["backend"] = "gptq_marlin"
    records.write(out, record)
    assert open_evaluation(EvaluationRequest(checkpoint=str(out))).backend == "gptq_marlin"
    assert open_evaluation(EvaluationRequest(checkpoint=str(out), backend="torch")).backend == "torch"
    assert open_evaluation(EvaluationRequest(checkpoint=str(out), device="cuda:1")).backend == "gptq_marlin"
    assert asked == [None, "gptq_marlin", "torch", "gptq_marlin"] and devices == ["auto", "auto", "auto", "cuda:1"]
    with pytest.raises(ValidationError, match="did you mean 'gptq_marlin'"):
        EvaluationRequest(checkpoint=str(out), backend="marlyn")


def test_what_the_command_line_opened_is_not_opened_again_for_the_same_request(run):
    out, _, _ = run(seqlen=64)
    request = EvaluationRequest(checkpoint=str(out))
    opened = open_evaluation(request)
    with handed_on(opened):
        assert open_evaluation(request.model_copy()) is opened
        assert open_evaluation(request.model_copy(update={"samples": 1})).windows.count == 1
