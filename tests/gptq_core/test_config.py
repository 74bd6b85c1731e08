import pytest
from pydantic import ValidationError

from gptq_core.config import RECIPES, QuantizeConfig
from gptq_core.schema import explain


def test_defaults_are_the_reference_schema():
    config = QuantizeConfig(bits=4)
    reference = {"group_size", "damp_percent", "desc_act", "act_group_aware", "sym", "true_sequential", "format", "backend"}
    assert config.model_dump(include=reference) == {
        "group_size": 128,
        "damp_percent": 0.1,
        "desc_act": False,
        "act_group_aware": True,
        "sym": True,
        "true_sequential": True,
        "format": "gptq",
        "backend": None,
    }


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "bits is required"),
        ({"bits": 5}, "bits = 5"),
        ({"bits": 4, "group_size": 0}, "group_size = 0"),
        ({"bits": 4, "group_size": -2}, "group_size = -2"),
        ({"bits": 4, "group_size": True}, "group_size = True"),
        ({"bits": 4, "damp_percent": 0}, "damp_percent = 0: "),
        ({"bits": 4, "damp_percent": 1}, "damp_percent = 1: "),
        ({"bits": 4, "damp_percent": "automatic"}, "damp_percent = 'automatic': "),
        ({"bits": 4, "format": "awq"}, "format = 'awq'"),
        ({"bits": 4, "backend": "marlyn"}, "backend = 'marlyn': did you mean 'gptq_marlin'?"),
        ({"bits": 4, "backend": "vllm"}, "backend = 'vllm': known backends are torch (this library) and GPTQModel's gptq_torch, "),
        ({"bits": 4, "desc_act": True, "act_group_aware": True}, "act_group_aware: true excludes desc_act: true"),
        ({"bits": 4, "static_groups": True, "desc_act": True}, "static_groups: true excludes desc_act"),
        ({"bits": 4, "residual_shift": 0.5}, "residual_shift = 0.5 needs target_shift above 0"),
        ({"bits": 4, "tuning_steps": 5}, "tuning_steps = 5 needs target_shift above 0"),
        ({"bits": 4, "recipe": "bset"}, "recipe = 'bset'"),
        ({"bits": 4, "goup_size": 64}, "did you mean 'group_size'"),
    ],
)
def test_refused_in_one_line(fields, says):
    with pytest.raises(ValidationError) as caught:
        QuantizeConfig(**fields)
    line = explain(caught.value)
    assert says in line
    assert "\n" not in line


@pytest.mark.parametrize("fields", [{"desc_act": True}, {"static_groups": True}, {"group_size": -1}, {"desc_act": True, "group_size": -1}])
def test_the_default_gives_way_and_the_result_survives_a_round_trip(fields):
    config = QuantizeConfig(bits=4, **fields)
    assert config.act_group_aware == ("desc_act" not in fields)
    assert config.static_groups == ("desc_act" not in fields)
    assert QuantizeConfig(**config.model_dump()) == config


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_its_fields_and_each_can_be_overridden(recipe):
    config = QuantizeConfig(bits=4, recipe=recipe)
    plain = QuantizeConfig(bits=4, recipe="classic")
    assert config.model_dump() == plain.model_dump() | RECIPES[recipe] | {"recipe": recipe}
    assert QuantizeConfig(**config.model_dump()) == config
    for key in RECIPES[recipe]:
        off = QuantizeConfig(bits=4, recipe=recipe, **{key: getattr(plain, key)})
        assert getattr(off, key) == getattr(plain, key) != getattr(config, key)


def test_each_recipe_adds_to_the_one_before():
    assert QuantizeConfig(bits=4).recipe == "tuned"
    assert RECIPES["classic"] == {}
    assert RECIPES["tuned"].keys() < RECIPES["best"].keys() < RECIPES["max"].keys()


def test_frozen():
    with pytest.raises(ValidationError):
        QuantizeConfig(bits=4).bits = 3
