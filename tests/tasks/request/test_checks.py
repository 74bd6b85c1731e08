import sys

import pytest

import tasks.request.checks
import tasks.request.texts
from gptq_core.errors import InputError
from tasks.config.run import from_dict, parse_setting
from tasks.steps.evaluate import Progress, evaluate


@pytest.fixture
def config(tiny_llama, corpus, tmp_path):
    return from_dict(
        {
            "model": {"path": str(tiny_llama), "revision": "v1.2"},
            "quantization": {"bits": 4, "dataset": str(corpus)},
            "calibration": {"samples": 3, "seqlen": 16},
            "output": {"dir": str(tmp_path / "out")},
        }
    )


def test_the_revision_reaches_all_that_open_the_model(config, monkeypatch):
    seen = {}

    def spied(name):
        right = getattr(tasks.request.texts, name)

        def spy(path, revision=None):
            seen[name] = revision
            return right(path, revision)

        monkeypatch.setattr(tasks.request.texts, name, spy)

    for name in ("resolve", "model_limits", "load_tokenizer"):
        spied(name)
    right = tasks.request.checks.Quantization.open

    def spy_open(*args, **kwargs):
        seen["open"] = kwargs["revision"]
        return right(*args, **kwargs)

    monkeypatch.setattr(tasks.request.checks.Quantization, "open", spy_open)
    tasks.request.checks.check(config)
    assert seen == dict.fromkeys(("resolve", "model_limits", "load_tokenizer", "open"), "v1.2")


@pytest.mark.parametrize("rule", ["{bits: 8, desc_act: true}", "{desc_act: 'true', bits: 8.0}", "{static_groups: false}"])
@pytest.mark.parametrize("recipe", ["classic", "tuned"])
def test_a_rule_from_the_command_line_reaches_the_engine(rule, recipe, config):
    key, value = parse_setting(f'quantization.dynamic={{".*down_proj": {rule}}}')
    data = config.model_dump(exclude={"quantization"}) | {"quantization": {"bits": 4, "dataset": config.quantization.dataset}}
    ruled = from_dict(data, {key: value, "quantization.recipe": recipe, "quantization.group_size": 32})
    tasks.request.checks.check(ruled)
    assert tasks.request.texts.prepare(ruled).calibration.digest == tasks.request.texts.prepare(config).calibration.digest


def test_the_revision_reaches_the_evaluation(config, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("tasks.steps.evaluate.evaluate_pair", lambda *args, **kwargs: seen.append((args[0], kwargs["revision"])) or {})
    path = tmp_path / "windows.safetensors"
    tasks.request.texts.prepare(config).evaluation.save(path)
    evaluate.fn("checkpoint", str(path), config.model.path, config.model.revision, "cpu", True, Progress(None))
    assert seen == [(config.model.path, "v1.2")]


def test_a_kernel_that_is_not_installed_is_missed_before_a_text_is_read(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    monkeypatch.setattr(tasks.request.checks, "prepare", lambda config: pytest.fail("a text was read"))
    wanted = config.model_copy(update={"quantization": config.quantization.model_copy(update={"backend": "gptq_marlin"})})
    with pytest.raises(InputError, match=r"backend = 'gptq_marlin': .*pip install 'gptq-pipeline\[kernels\]'"):
        tasks.request.checks.check(wanted)


def test_a_kernel_that_cannot_run_what_will_be_written_is_refused_and_the_output_let_go(config, monkeypatch):
    asked = []

    def choose(backend, layers, device, *_rest):
        asked.append([str(layer) for layer in layers])
        if asked[-1]:
            raise InputError("not these layers")

    monkeypatch.setattr("gptq_core.inference.backends.choose", choose)
    with pytest.raises(InputError, match="not these layers"):
        tasks.request.checks.check(config)
    assert asked[0] == []
    assert "4 bits, group_size -1, desc_act False, sym True, 128 x 256" in asked[1]
    monkeypatch.undo()
    tasks.request.checks.check(config)  # the lock is free


@pytest.mark.parametrize("original", [None, "original"])
def test_the_backend_reaches_the_evaluation(original, config, monkeypatch, tmp_path):
    seen = []

    def judged(*_args, backend, **_kwargs):
        seen.append(backend)
        return {"perplexity": 1.0, "tokens": 1}

    monkeypatch.setattr("tasks.steps.evaluate.evaluate_pair", judged)
    monkeypatch.setattr("tasks.steps.evaluate.evaluate_one", judged)
    path = tmp_path / "windows.safetensors"
    tasks.request.texts.prepare(config).evaluation.save(path)
    result = evaluate.fn("checkpoint", str(path), original, None, "cpu", True, Progress(None), "marlin")
    assert seen == ["marlin"]
    assert result["backend"] == "gptq_marlin"


def changed(config, room, **values):
    return config.model_copy(update={room: getattr(config, room).model_copy(update=values)})


def test_who_will_not_load_the_result_is_a_note_and_with_the_portable_profile_an_error_before_any_work(config, tmp_path):
    config = changed(config, "evaluation", seqlen=16)
    assert tasks.request.checks.check(changed(config, "output", profile="portable")) == ()
    wanted = changed(config, "quantization", bits=3)
    assert tasks.request.checks.check(wanted) == ("vLLM 0.33 and SGLang 0.5.23 will not load this: bits 3 (must be 4 or 8)",)
    elsewhere = changed(wanted, "output", profile="portable", dir=str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match=r"profile = 'portable'.*vLLM 0.33 and SGLang.*bits 3.*: set quantization.bits; or set output"):
        tasks.request.checks.check(elsewhere)
    assert not list(tmp_path.glob("elsewhere*"))


def test_the_profile_is_not_part_of_what_is_made(config):
    keys = set()
    for profile in ("mixed", "portable"):
        with tasks.request.checks.open_quantization(
            changed(config, "output", profile=profile), tasks.request.texts.prepare(config).calibration
        ) as job:
            keys.add(job.key)
    assert len(keys) == 1
