"""Reading a model folder: several tensors at once, from whatever shards they are in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gptq_core.checkpoint.reader import Checkpoint
from gptq_core.errors import CorruptCheckpointError, InputError

STATUS = Path("/proc/self/status")


def address_space() -> int:
    """Kilobytes of this process."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmSize"))


@pytest.fixture
def sharded(tmp_path):
    """Two shards; the tensors of one block are in both."""
    (tmp_path / "config.json").write_text("{}")
    tensors = {f"block.{i}.{name}": torch.randn(3, 5).to(torch.bfloat16) for i in range(2) for name in ("a", "b")}
    save_file({name: t for name, t in tensors.items() if name != "block.1.b"}, tmp_path / "one.safetensors")
    save_file({"block.1.b": tensors["block.1.b"]}, tmp_path / "two.safetensors")
    return Checkpoint(tmp_path), tensors


def test_tensors_read_apart_are_those_read_alone(sharded):
    source, tensors = sharded
    wanted = ["block.1.b", "block.1.a", "block.0.a"]
    source.expect(wanted)
    found = source.read_apart(wanted)
    assert set(found) == set(wanted) and source.read_apart([]) == {}
    for name in wanted:
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], tensors[name]) and torch.equal(found[name], source.read(name))


def test_shapes_without_axes_or_without_numbers(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    tensors = {"none": torch.empty(0, 4), "scalar": torch.tensor(2.5), "odd": torch.arange(5, dtype=torch.int8)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = Checkpoint(tmp_path).read_apart(tensors)
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items())


@pytest.mark.skipif(not STATUS.exists(), reason="the address space is told by Linux's /proc")
def test_the_pages_of_a_tensor_leave_with_it_whatever_was_read_beside(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({name: torch.ones(1 << 20) for name in "abcdefgh"}, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path)
    before = address_space()
    found = source.read_apart("abcdefgh")
    assert 0.9 < (address_space() - before) / (8 << 12) < 1.5, "no tensor maps the whole file"
    del found["a"], found["d"]
    assert 0.9 < (address_space() - before) / (6 << 12) < 1.3


def test_a_file_that_was_changed_meanwhile_is_not_read_from(sharded, tmp_path):
    source, tensors = sharded
    save_file({"block.1.b": tensors["block.1.b"] + 1}, tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "two.safetensors")
    source.read_apart(["block.0.a"])
    with pytest.raises(InputError, match="two.safetensors: was changed"):
        source.read_apart(["block.1.b"])


def test_a_tensor_that_is_missing_is_named(sharded):
    with pytest.raises(CorruptCheckpointError, match="no tensor 'block.2.a'"):
        sharded[0].read_apart(["block.0.a", "block.2.a"])
