import re
from types import NoneType
from typing import get_args

import pytest
import yaml

from flows.demo import demo_config
from gptq_core.config import RECIPES, QuantizeConfig
from gptq_core.errors import InputError
from tasks.config.overrides import parse_setting
from tasks.config.run import RunConfig, from_dict, load, without_password

LEAST = {"model": {"path": "m"}, "quantization": {"bits": 4, "dataset": "t.txt"}}


@pytest.mark.parametrize("name", ["demo", "quantize"])
def test_every_config_file_loads(name, request):
    config = load(request.config.rootpath / "configs" / f"{name}.yaml")
    assert load_text(config.to_yaml()) == config


def load_text(text):
    return from_dict(yaml.safe_load(text))


def test_the_documented_config_names_every_key_with_its_default(request):
    text = (request.config.rootpath / "configs" / "quantize.yaml").read_text()
    live, data = yaml.safe_load(text), yaml.safe_load(re.sub(r"(?m)^  # (?=[a-z_]+: )", "  ", text))
    for room, field in RunConfig.model_fields.items():
        schema = next(kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type) and kind is not NoneType)
        assert sorted(data[room]) == sorted(schema.model_fields), room
        optional = field.default is None
        assert (live[room] is None) == optional, "a gate and hooks are only shown"
        if optional:  # what is shown are examples; what has a default is shown with it
            shown = getattr(from_dict(LEAST, {f"{room}.{key}": value for key, value in data[room].items()}), room)
            defaults = {key: known.default for key, known in schema.model_fields.items() if known.default is not None}
            assert {key: getattr(shown, key) for key in defaults} == defaults
            del data[room]
    # what is said in a file wins over its recipe, so what recipes set is only said in comments
    assert data["quantization"].keys() - live["quantization"].keys() == {"act_group_aware"}.union(*RECIPES.values())
    assert all(live[room] == data[room] for room in data if room != "quantization")
    least = from_dict({"model": {"path": data["model"]["path"]}, "quantization": {"bits": 4, "dataset": data["quantization"]["dataset"]}})
    assert from_dict(data) == from_dict(live) == least


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_copy_of_the_documented_config_follows_its_recipe(recipe, request):
    config = load(request.config.rootpath / "configs" / "quantize.yaml", {"quantization.recipe": recipe}).quantization
    assert config == QuantizeConfig(bits=4, dataset=config.dataset, recipe=recipe)
    assert {key: getattr(config, key) for key in RECIPES[recipe]} == RECIPES[recipe]
    reordered = load(request.config.rootpath / "configs" / "quantize.yaml", {"quantization.desc_act": True}).quantization
    assert reordered.desc_act and not reordered.static_groups and not reordered.act_group_aware


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "changes", [{"bits": 8, "desc_act": True}, {"static_groups": False}, {"act_group_aware": False}, {"refit": False}], ids=str
)
def test_rules_mean_the_same_after_the_yaml(recipe, changes):
    config = from_dict(LEAST, {"quantization.recipe": recipe, "quantization.dynamic": {"b": {"bits": 2}, "a": changes, "-:c": {}}})
    again = load_text(config.to_yaml())
    assert again == config and list(again.quantization.dynamic) == ["b", "a", "-:c"]
    for name in ("a", "b", "c", "d"):
        assert again.quantization.for_linear(name) == config.quantization.for_linear(name)


def test_demo_finds_its_files_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    config = demo_config({"output.dir": "here"})
    for path in (config.model.path, config.quantization.dataset, config.evaluation.dataset):
        assert Path(path).exists()
    assert config.out == Path("here")


def test_least_config_has_the_documented_defaults():
    config = from_dict(LEAST)
    assert (config.calibration.samples, config.calibration.seqlen, config.evaluation.kl) == (128, 2048, True)
    assert str(config.out) == "runs/m-w4g128"
    assert from_dict({**LEAST, "calibration": None}) == config, "an empty section means its defaults"


def test_default_output_is_one_folder_under_runs():
    for path in ("org/name", "../up", "a b:c", "/", "."):
        out = from_dict(LEAST, {"model.path": path}).out
        assert out.parent.name == "runs" and len(out.parts) == 2, path


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert from_dict(LEAST, {"output.dir": "~/x"}).out == tmp_path / "x"


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///mlflow.db",
        "sqlite:////abs/mlflow.db",
        "http://host:5000",
        "https://host",
        "postgresql://u:p@host/db",
        "postgresql+psycopg2://host/db",
        "mysql+pymysql://host/db",
        "mssql+pyodbc://host/db",
    ],
)
def test_stores_that_mlflow_takes(uri):
    assert from_dict(LEAST, {"tracking.uri": uri}).tracking.uri == uri


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_devices(device):
    assert from_dict(LEAST, {"model.device": device}).model.device == device


def test_overrides_win_and_are_yaml():
    config = from_dict(LEAST, dict(parse_setting(s) for s in ["quantization.sym=false", "output.dir=a=b", "evaluation.samples=null"]))
    assert config.quantization.sym is False and str(config.out) == "a=b" and config.evaluation.samples is None


def test_flat_holds_every_key_and_only_counts_texts():
    flat = from_dict(LEAST, {"quantization.dataset": ["one text", "another"]}).flat()
    assert flat["quantization.dataset"] == "2 given in the config"
    assert {f"quantization.{key}" for key in QuantizeConfig.model_fields} <= set(flat)
    assert flat["output.dir"] == "runs/m-w4g128"


@pytest.mark.parametrize(
    "overrides, said",
    [
        ({"quantization.bits": 5}, "quantization.bits = 5"),
        ({"quantization.bit": 4}, "did you mean 'bits'"),
        ({"quantisation.bits": 4}, "did you mean 'quantization'"),
        ({"calibration.samples": 0}, "calibration.samples = 0"),
        ({"calibration.seed": -1}, "calibration.seed = -1"),
        ({"quantization.dataset": None}, "quantization.dataset is required"),
        ({"quantization.desc_act": True, "quantization.act_group_aware": True}, "act_group_aware"),
        ({"output.dir": ""}, "output.dir"),
        ({"output.dir": "~nobody-of-this-name/x"}, "output.dir"),
        ({"model.device": "meta"}, "auto, cpu, cuda or cuda:N"),
        ({"model.device": "cuda:0\n"}, "model.device"),
        ({"model.device": "cuda:"}, "model.device"),
        ({"evaluation.seqlen": 1}, "evaluation.seqlen = 1"),
        ({"tracking.uri": "mlruns"}, "sqlite:///FILE.db, http(s)://HOST:PORT"),
        ({"tracking.uri": "foo://bar"}, "postgresql://"),
        ({"tracking.uri": "sqlite://"}, "tracking.uri"),
        ({"tracking.uri": "file:///tmp/mlruns"}, "tracking.uri"),
        ({"gate.max_kl": 0}, "gate.max_kl = 0"),
        ({"gate.max_kl": float("inf")}, "gate.max_kl = inf"),
        ({"gate.max_perplexity_increase": -0.1}, "gate.max_perplexity_increase = -0.1"),
        ({"gate.max_gb": 0}, "gate.max_gb = 0"),
        ({"gate.max_fallback_layers": -1}, "gate.max_fallback_layers = -1"),
        ({"gate.alias": "champion"}, "gate: no limit is set: set one of max_perplexity_increase, max_kl"),
        ({"gate.max_lk": 1}, "did you mean 'max_kl'"),
        ({"gate.max_gb": 1, "gate.measure": "perplexity"}, "gate.measure = 'perplexity'"),
        ({"gate.max_gb": 1, "gate.alias": "v3"}, "gate.alias = 'v3': is a name that MLflow reserves"),
        ({"gate.max_gb": 1, "gate.alias": "a b"}, "gate.alias = 'a b'"),
        ({"gate.max_gb": 1, "gate.register_as": "a/b"}, "gate.register_as = 'a/b'"),
        ({"gate.max_kl": 1, "evaluation.kl": False}, "gate.max_kl = 1 needs the KL: set evaluation.kl: true"),
        ({"gate.max_gb": 1, "evaluation.kl": False}, "gate.measure = 'kl' needs the KL"),
        ({"gate.min_recovery": 0.9}, "gate.min_recovery = 0.9 needs task scores"),
        ({"notify.seconds": 3}, "notify: no target is set: set command or webhook, or remove the section"),
        ({"notify.webhook": "hooks.example/x"}, "notify: webhook must be http(s)://HOST/..., or env:NAME"),
        ({"notify.webhook": "env:1x"}, "notify: webhook must be"),
        ({"notify.command": "true", "notify.when": []}, "notify.when = []"),
        ({"notify.command": "true", "notify.when": ["always"]}, "notify.when"),
        ({"notify.command": "true", "notify.seconds": 0}, "notify.seconds = 0"),
        ({"notify.command": ""}, "notify.command = ''"),
        ({"bits": 4}, "section.key"),
        ({"model.path.x": 4}, "section.key"),
    ],
)
def test_wrong_values_are_one_line_that_names_them(overrides, said):
    with pytest.raises(InputError) as error:
        from_dict(LEAST, overrides)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, said", [("a: [", "line"), ("just words", "sections"), ("model: here", "model"), (b"\xff\xfe\x00", "UTF-8")])
def test_wrong_files_are_one_line_that_names_them(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_a_setting_needs_key_and_value():
    for wrong in ("quantization.bits", "=4", "a.b=["):
        with pytest.raises(InputError, match="--set"):
            parse_setting(wrong)


def test_a_password_in_the_tracking_uri_is_in_no_dump():
    values = {"model": {"path": "m"}, "quantization": {"bits": 4, "dataset": "t.txt"}}
    config = from_dict(values | {"tracking": {"uri": "postgresql://user:s3cret@host/db"}})
    assert config.tracking.uri == "postgresql://user:s3cret@host/db"
    assert "s3cret" not in config.to_yaml() + config.model_dump_json() + str(config.flat())
    assert config.flat()["tracking.uri"] == "postgresql://user:***@host/db"


def test_an_empty_gate_is_none_and_a_gate_travels():
    assert from_dict({**LEAST, "gate": None, "notify": None}) == from_dict(LEAST) == load_text(from_dict(LEAST).to_yaml())
    config = from_dict(LEAST, {"gate.max_kl": 0.1, "notify.webhook": "http://127.0.0.1:8/hook"})
    assert load_text(config.to_yaml()) == config and config.flat()["gate.max_kl"] == 0.1
    without_kl = from_dict(LEAST, {"gate.max_gb": 1, "gate.measure": "perplexity_increase", "evaluation.kl": False})
    assert without_kl.gate.measure == "perplexity_increase"


@pytest.mark.parametrize(
    "webhook",
    [
        "https://me:s3cret@host/x",
        "https://s3cret@host/x",
        "https://host/x?token=s3cret",
        "https://host/x?a=1&api_key=s3cret",
        "https://host/services/T00000000/B00000000/s3cretXXXXXXXXXXXXXXXXXX",
    ],
)
def test_a_webhook_with_a_secret_is_refused_and_not_repeated(webhook):
    with pytest.raises(InputError, match="give env:NAME") as error:
        from_dict(LEAST, {"notify.webhook": webhook})
    assert "s3cret" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "webhook", ["env:HOOK", "block:hook-1", "http://127.0.0.1:9/quantized", "https://host.example/hooks/model-quantized-by-me?x=1"]
)
def test_webhooks_that_hold_no_secret(webhook):
    assert from_dict(LEAST, {"notify.webhook": webhook}).notify.webhook == webhook


def test_the_tracking_uri_may_stand_in_the_environment(monkeypatch):
    config = from_dict(LEAST, {"tracking.uri": "env:GPTQ_TEST_STORE"})
    with pytest.raises(InputError, match="the environment variable GPTQ_TEST_STORE is not set"):
        _ = config.tracking.address
    monkeypatch.setenv("GPTQ_TEST_STORE", "postgresql://user:s3cret@host/db")
    assert config.tracking.address == "postgresql://user:s3cret@host/db"
    assert config.flat()["tracking.uri"] == "env:GPTQ_TEST_STORE" and "s3cret" not in config.to_yaml() + repr(config)
    monkeypatch.setenv("GPTQ_TEST_STORE", "s3cret://host")
    with pytest.raises(InputError, match="must be sqlite:///FILE.db") as error:
        _ = config.tracking.address
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "http://u:SECRET@h:1/x",
        "postgresql://u:p@SECRET@h/db",
        "API request to http://u:SECRET@h:9/api failed",
        "mysql://h/db?password=SECRET&x=1",
    ],
)
def test_a_password_in_an_address_or_a_message_becomes_stars(text):
    assert "SECRET" not in without_password(text) and "***" in without_password(text)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("output.dir=2024-11-28", "2024-11-28"),
        ("output.dir=1:30", "1:30"),
        ("model.revision=0123456", "0123456"),
        ("model.revision=null", None),
        ("tracking.experiment=2024", "2024"),
        ("tracking.experiment=no", "no"),
        ("tracking.experiment=null", "null"),
        ("tracking.experiment='2024'", "2024"),
        ("gate.alias=1e3", "1e3"),
        ("quantization.dataset=[a.txt, b.txt]", ["a.txt", "b.txt"]),
        ("quantization.dataset=2024.0", "2024.0"),
        ("quantization.damp_percent=0.1", 0.1),
        ("quantization.bits=4", 4),
        ("quantization.sym=no", False),
        ("evaluation.samples=null", None),
        ("model.path=123", "123"),
        ("nothing.known=123", 123),
    ],
)
def test_a_text_is_taken_as_it_was_typed(setting, value):
    assert parse_setting(setting)[1] == value
