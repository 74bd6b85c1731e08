"""Which files of a model folder go along with its weights."""

from pathlib import Path

import pytest
from tiny import quantize, save_model, windows

from gptq_core import Quantization, QuantizeConfig
from gptq_core.checkpoint.carried import carried_files
from gptq_core.errors import InputError

W4 = QuantizeConfig(bits=4, group_size=32)
CARRIED = [
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tokenizer.json",
    "vocab.txt",
]
LEFT = [
    "README.md",
    "additional_chat_templates/notes.txt",
    "config.json",
    "consolidated.00.pth",
    "model.safetensors.index.json",
    "modeling_mine.py",
    "original/params.json",
    "quantize_config.json",
    "tokenization_mine.py",
    "tokenizer_of_mine.py",
    "training_args.bin",
]


def test_what_belongs_to_the_model_is_carried_and_nothing_else(tmp_path):
    for name in (*CARRIED, *LEFT):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.as_posix() for path in carried_files(tmp_path)] == CARRIED


def test_it_reaches_the_checkpoint_and_its_manifest(tmp_path):
    model = save_model("llama", tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (model / "tekken.json").write_text("{}")
    quantize(model, tmp_path / "out", W4)
    manifest = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[-1]
    for name in ("additional_chat_templates/tool_use.jinja", "tekken.json"):
        assert (tmp_path / "out" / name).read_text() == (model / name).read_text()
        assert f'"{name}"' in manifest


def test_a_link_into_the_hubs_store_is_followed(tmp_path):
    store = tmp_path / "models--a--b"
    folder = store / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (store / "blobs").mkdir()
    (store / "blobs" / "ab").write_text("{}")
    (folder / "tokenizer.json").symlink_to(Path("..") / ".." / "blobs" / "ab")
    assert carried_files(folder) == [Path("tokenizer.json")]


def test_a_link_that_leads_out_of_the_folder_is_refused_before_any_work(tmp_path):
    model = save_model("llama", tmp_path / "model")
    (tmp_path / "secret.txt").write_text("mine")
    (model / "tokenizer_config.json").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InputError, match=r"tokenizer_config.json: a link to .*secret.txt, outside of the model's folder; put a copy"):
        Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu")
    assert not list(tmp_path.glob("out*"))
