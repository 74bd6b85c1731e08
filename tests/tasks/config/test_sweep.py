"""Which cells a sweep has, and how they are called."""

import json

import pytest
import yaml

from gptq_core.errors import InputError
from tasks.config.sweep import SweepConfig, cell_name, load_sweep, parse_axis

BASE = {"model": {"path": "m"}, "quantization": {"dataset": "t.txt"}}


def sweep(**keys):
    return SweepConfig(**{"base": BASE, "grid": {"bits": [3, 4], "group_size": [32, -1]}, "dir": "s"} | keys)


def names(config):
    return [cell.name for cell in config.expanded()]


def test_every_combination_is_a_cell_with_a_folder_and_a_config_of_its_own():
    cells = sweep().expanded()
    assert [(cell.config.quantization.bits, cell.config.quantization.group_size) for cell in cells] == [(3, 32), (3, -1), (4, 32), (4, -1)]
    assert [str(cell.config.out) for cell in cells] == [f"s/bits={bits}_group_size={group}" for bits in (3, 4) for group in (32, -1)]


def test_explicit_cells_join_the_grid_once_and_exclusions_leave_it():
    config = sweep(cells=[{"bits": 8}, {"bits": 4, "group_size": 32}], exclude=[{"bits": 3, "group_size": -1}, {"quantization.bits": 8}])
    assert names(sweep(grid={"bits": [4]}, cells=[{"quantization.bits": 4}])) == ["bits=4"]
    assert names(config) == ["bits=3_group_size=32", "bits=4_group_size=32", "bits=4_group_size=-1", "bits=8"]


def test_an_axis_of_any_section_reaches_its_key():
    [cell] = sweep(grid={"bits": [4], "calibration.samples": [7], "model.path": ["a/b"]}).expanded()
    assert (cell.config.calibration.samples, cell.config.model.path) == (7, "a/b")


def test_a_recipe_axis_keeps_the_defaults_of_each_recipe():
    classic, best = sweep(grid={"bits": [4], "recipe": ["classic", "best"]}).expanded()
    assert (classic.config.quantization.target_shift, best.config.quantization.target_shift) == (0.0, 1.0)


def test_a_grid_that_grows_keeps_the_names_it_had():
    assert set(names(sweep())) < set(names(sweep(grid={"group_size": [32, -1], "bits": [2, 3, 4]})))


def test_names_differ_where_settings_do_and_stay_single_path_components():
    settings = [
        {"group_size": 1},
        {"group_size": -1},
        {"model.path": "a/b"},
        {"model.path": "a-b"},
        {"model.path": "../b"},
        {"dynamic": {"x": {"bits": 2}}},
        {"dynamic": {"x": {"bits": 3}}},
        {"sym": True},
        {"sym": "true"},
    ]
    found = [cell_name(each) for each in settings[:-1]]
    assert len(set(found)) == len(found) and not any("/" in name or name.startswith(".") for name in found)


def test_an_invalid_combination_is_a_cell_with_its_reason_and_the_others_stand():
    base = BASE | {"quantization": {"dataset": "t", "static_groups": True}}
    good, bad = sweep(grid={"bits": [4], "desc_act": [False, True]}, base=base).expanded()
    assert good.config and bad.config is None and "static_groups" in bad.error


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"grid": {"bits": []}}, "bits has no values"),
        ({"grid": {}}, "no cells"),
        ({"grid": {"bits": [5]}}, "no cell is valid"),
        ({"grid": {"output.dir": ["a"]}}, "cannot be an axis"),
        ({"base": BASE | {"output": {"dir": "x"}}}, "base.output.dir"),
        ({"ray_address": "ray://h:1"}, "runner: ray"),
        ({"runner": "ray", "mode": "screening"}, "runner: local"),
        ({"choose": {"rule": "best_within_size"}}, "max_gb"),
        ({"max_parallel": 0}, "greater than 0"),
        ({"exclude": [{"bitz": 3}]}, "not an axis of the grid"),
        ({"runner": "ray", "max_parallel": 2}, "runner: local"),
        ({"base": BASE | {"model": {"path": "m", "device": "cuda:1"}}}, r"devices: \['1'\]"),
        ({"base": BASE | {"output": "x"}}, "sections"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(keys, told):
    with pytest.raises(ValueError, match=told):
        sweep(**keys)


def test_a_run_s_yaml_is_a_base_and_its_folder_is_left_to_it(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(BASE | {"output": {"dir": "runs/one", "profile": "portable"}, "calibration": {"samples": 3}}))
    overrides = {"calibration.seqlen": 16, "max_parallel": 2, "limits.minutes": 3, "dir": str(tmp_path / "s")}
    [cell] = load_sweep(run, dict([parse_axis("bits=4")]), overrides).expanded()
    assert cell.config.calibration.model_dump() == {"samples": 3, "seqlen": 16, "seed": 0}
    assert (cell.config.out, cell.config.output.profile) == (tmp_path / "s" / "bits=4", "portable")
    config = load_sweep(run, {"bits": [4]}, overrides)
    assert (config.max_parallel, config.limits.minutes) == (2, 3)


def test_a_sweep_s_yaml_takes_its_base_from_a_file_and_axes_from_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE))
    values = {"base": str(tmp_path / "run.yaml"), "grid": {"bits": [2, 3]}, "mode": "screening"}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values))
    config = load_sweep(tmp_path / "sweep.yaml", dict([parse_axis("bits=4"), parse_axis("dynamic=[null, {'-:.*0.*': {}}]")]), {})
    assert config.mode == "screening" and [cell.config.quantization.bits for cell in config.expanded()] == [4, 4]
    assert SweepConfig.model_validate_json(json.dumps(config.model_dump(mode="json"))) == config


def test_a_password_of_the_tracking_address_is_in_no_dump():
    uri = "postgresql://me:secret@host/db"
    config = sweep(base=BASE | {"tracking": {"uri": uri}})
    assert "secret" not in config.model_dump_json() and config.expanded()[0].config.tracking.uri == uri


@pytest.mark.parametrize("text", ["bits", "bits=", "=3", "bits=3,[4"])
def test_an_axis_that_cannot_be_read_says_how_to_write_one(text):
    with pytest.raises(InputError, match="--grid"):
        parse_axis(text)
