"""A model that is opened once stands for its path: same files, and nothing of one use is left for the next."""

import shutil

import pytest
import torch
from tiny import bytes_of, quantize, save_model, windows

from gptq_core import Quantization, QuantizeConfig
from gptq_core.errors import InputError
from gptq_core.model.opened import OpenedModel, open_model
from gptq_core.planning.estimate import Texts, estimate
from gptq_core.planning.plan import plan

CONFIG = QuantizeConfig(bits=4, group_size=32)


def test_plan_estimate_and_two_runs_of_one_opened_model_write_what_its_path_writes(tmp_path):
    folder = save_model("llama", tmp_path / "model")
    opened = open_model(str(folder))
    estimate(plan(opened, CONFIG), CONFIG, Texts(8, 32, 32, 4), device="cpu", process_bytes=0)
    quantize(folder, tmp_path / "by-path", CONFIG)
    for name in ("first", "second"):
        with Quantization.open(opened, CONFIG, windows(), tmp_path / name, device="cpu") as run:
            run.assemble()
        assert bytes_of(tmp_path / name) == bytes_of(tmp_path / "by-path")
        assert all(value.is_meta for value in opened.decoder(torch.float32).model.parameters())


def test_what_was_found_is_kept(tmp_path):
    opened = OpenedModel(save_model("llama", tmp_path / "model"))
    assert open_model(opened) is opened and opened.source is opened.source and opened.shapes is opened.decoder(torch.float32)
    assert opened.select(CONFIG) is opened.select(QuantizeConfig(bits=4, group_size=32))
    assert opened.select(CONFIG) is not opened.select(CONFIG.model_copy(update={"bits": 3}))
    dtype = opened.config.dtype
    assert opened.decoder(torch.bfloat16).model.dtype == torch.bfloat16 and opened.config.dtype == dtype


def test_a_folder_without_weights_does_for_a_plan_and_for_no_run(tmp_path):
    (tmp_path / "model").mkdir()
    shutil.copy(save_model("llama", tmp_path / "whole") / "config.json", tmp_path / "model")
    opened = open_model(str(tmp_path / "model"))
    assert plan(opened, CONFIG).bytes > 0
    with pytest.raises(InputError, match=r"no \*.safetensors"):
        opened.require_weights()
    with pytest.raises(InputError, match="no config.json"):
        open_model(str(tmp_path)).config  # noqa: B018
