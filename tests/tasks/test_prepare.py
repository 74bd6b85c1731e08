import pytest

import tasks.prepare
from tasks.config import from_dict
from tasks.evaluate import Progress, evaluate


@pytest.fixture
def config(tiny_llama, corpus, tmp_path):
    return from_dict({"model": {"path": str(tiny_llama), "revision": "v1.2"}, "quantization": {"bits": 4, "dataset": str(corpus)},
                      "calibration": {"samples": 3, "seqlen": 16}, "output": {"dir": str(tmp_path / "out")}})


def test_the_revision_reaches_all_that_open_the_model(config, monkeypatch):
    seen = {}

    def spied(name):
        right = getattr(tasks.prepare, name)

        def spy(path, revision=None):
            seen[name] = revision
            return right(path, revision)

        monkeypatch.setattr(tasks.prepare, name, spy)

    for name in ("resolve", "model_limits", "load_tokenizer"):
        spied(name)
    right = tasks.prepare.Quantization.open

    def spy_open(*args, **kwargs):
        seen["open"] = kwargs["revision"]
        return right(*args, **kwargs)

    monkeypatch.setattr(tasks.prepare.Quantization, "open", spy_open)
    tasks.prepare.check(config)
    assert seen == dict.fromkeys(("resolve", "model_limits", "load_tokenizer", "open"), "v1.2")


def test_the_revision_reaches_the_evaluation(config, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("tasks.evaluate.evaluate_pair", lambda *args, **kwargs: seen.append((args[0], kwargs["revision"])) or {})
    path = tmp_path / "windows.safetensors"
    tasks.prepare.prepare(config).evaluation.save(path)
    evaluate.fn("checkpoint", str(path), config.model.path, config.model.revision, "cpu", True, Progress(None))
    assert seen == [(config.model.path, "v1.2")]
