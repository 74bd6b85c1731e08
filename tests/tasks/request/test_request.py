import sys

import pytest

import tasks.request.request
from gptq_core.errors import InputError
from tasks.config.overrides import parse_setting
from tasks.config.run import from_dict
from tasks.request.request import Requests
from tasks.steps.allocate import allocate
from tasks.steps.evaluate import evaluate
from tasks.steps.opaque import Opaque


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


def check(config):
    with Requests().of(config) as request:
        return request.check()


def test_the_revision_reaches_the_model(config, monkeypatch):
    right, seen = tasks.request.request.open_model, []
    monkeypatch.setattr(tasks.request.request, "open_model", lambda *where: seen.append(where) or right(*where))
    check(config)
    assert seen == [(config.model.path, "v1.2")]


def test_dtype_and_device_reach_the_engine_and_the_dtype_names_other_work(config, monkeypatch):
    seen, right = [], tasks.request.request.Quantization.open
    keys = set()

    def spy(*args, **kwargs):
        seen.append((kwargs["dtype"], kwargs["device"]))
        return right(*args, **kwargs)

    monkeypatch.setattr(tasks.request.request.Quantization, "open", spy)
    for dtype in ("float32", "bfloat16", "float16"):
        with Requests().of(changed(config, "model", dtype=dtype, device="cpu")) as request:
            request.check()
            keys.add(request.key)
    assert seen == [("float32", "cpu"), ("bfloat16", "cpu"), ("float16", "cpu")] and len(keys) == 3


def test_dtype_and_device_reach_the_choice_of_widths(config, monkeypatch):
    class SeenError(Exception):
        pass

    def seen(*_args, **kwargs):
        raise SeenError(kwargs["dtype"], kwargs["device"])

    monkeypatch.setattr("gptq_core.search.allocation.allocate", seen)
    with pytest.raises(SeenError) as caught:
        allocate.fn(Opaque(Requests().of(changed(config, "model", dtype="float16", device="cpu"))), Opaque(None))
    assert caught.value.args == ("float16", "cpu")


@pytest.mark.parametrize("rule", ["{bits: 8, desc_act: true}", "{desc_act: 'true', bits: 8.0}", "{static_groups: false}"])
@pytest.mark.parametrize("recipe", ["classic", "tuned"])
def test_a_rule_from_the_command_line_reaches_the_engine(rule, recipe, config):
    key, value = parse_setting(f'quantization.dynamic={{".*down_proj": {rule}}}')
    data = config.model_dump(exclude={"quantization"}) | {"quantization": {"bits": 4, "dataset": config.quantization.dataset}}
    ruled = from_dict(data, {key: value, "quantization.recipe": recipe, "quantization.group_size": 32})
    check(ruled)
    assert Requests().texts(ruled).calibration.digest == Requests().texts(config).calibration.digest


def test_a_kernel_that_is_not_installed_is_missed_before_a_text_is_read(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    monkeypatch.setattr(tasks.request.request, "read_texts", lambda *_args: pytest.fail("a text was read"))
    wanted = config.model_copy(update={"quantization": config.quantization.model_copy(update={"backend": "gptq_marlin"})})
    with pytest.raises(InputError, match=r"backend = 'gptq_marlin': .*pip install 'gptq-pipeline\[kernels\]'"):
        check(wanted)


def test_a_kernel_that_cannot_run_what_will_be_written_is_refused_and_the_output_let_go(config, monkeypatch):
    asked = []

    def choose(backend, layers, device, *_rest):
        asked.append([str(layer) for layer in layers])
        if asked[-1]:
            raise InputError("not these layers")

    monkeypatch.setattr("gptq_core.inference.backends.choose", choose)
    with pytest.raises(InputError, match="not these layers"):
        check(config)
    assert asked[0] == []
    assert "4 bits, group_size -1, desc_act False, sym True, 128 x 256" in asked[1]
    monkeypatch.undo()
    check(config)  # the lock is free


@pytest.mark.parametrize("compared", [False, True])
def test_original_and_backend_reach_the_evaluation(compared, config, monkeypatch):
    seen = []

    def judged(first, *_args, backend, **_kwargs):
        seen.append((first, backend))
        numbers = dict.fromkeys(("original_perplexity", "quantized_perplexity", "kl", "top1_agreement"), 1.0)
        return numbers if compared else {"perplexity": 1.0, "tokens": 1}

    monkeypatch.setattr("tasks.steps.evaluate.evaluate_pair", judged)
    monkeypatch.setattr("tasks.steps.evaluate.evaluate_one", judged)
    request = Requests().of(config)
    original = Opaque(request.model) if compared else None
    result = evaluate.fn("checkpoint", Opaque(request.texts.evaluation), original, "cpu", True, Opaque(None), "marlin")
    assert seen == [(request.model if compared else "checkpoint", "marlin")]
    assert result.backend == "gptq_marlin"


def changed(config, room, **values):
    return config.model_copy(update={room: getattr(config, room).model_copy(update=values)})


def test_who_will_not_load_the_result_is_a_note_and_with_the_portable_profile_an_error_before_any_work(config, tmp_path):
    config = changed(config, "evaluation", seqlen=16)
    assert check(changed(config, "output", profile="portable")) == ()
    wanted = changed(config, "quantization", bits=3)
    assert check(wanted) == ("vLLM 0.33 and SGLang 0.5.23 will not load this: bits 3 (must be 4 or 8)",)
    elsewhere = changed(wanted, "output", profile="portable", dir=str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match=r"profile = 'portable'.*vLLM 0.33 and SGLang.*bits 3.*: set quantization.bits; or set output"):
        check(elsewhere)
    assert not list(tmp_path.glob("elsewhere*"))


def test_the_profile_is_not_part_of_what_is_made(config):
    keys = set()
    for profile in ("mixed", "portable"):
        with Requests().of(changed(config, "output", profile=profile)) as request:
            keys.add(request.job.key)
    assert len(keys) == 1
