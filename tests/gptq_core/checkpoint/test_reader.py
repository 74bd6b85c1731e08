"""Reading a model folder: several tensors at once, from whatever shards they are in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gptq_core.checkpoint.reader import Checkpoint
from gptq_core.errors import CorruptCheckpointError

MAPS = Path("/proc/self/maps")


def mappings(file: str) -> int:
    """Of that file, in this process."""
    return sum(line.endswith(file) for line in MAPS.read_text().splitlines())


@pytest.fixture
def sharded(tmp_path):
    """Two shards; the tensors of one block are in both."""
    (tmp_path / "config.json").write_text("{}")
    tensors = {f"block.{i}.{name}": torch.randn(3, 5).to(torch.bfloat16) for i in range(2) for name in ("a", "b")}
    save_file({name: t for name, t in tensors.items() if name != "block.1.b"}, tmp_path / "one.safetensors")
    save_file({"block.1.b": tensors["block.1.b"]}, tmp_path / "two.safetensors")
    return Checkpoint(tmp_path), tensors


def test_tensors_read_together_are_those_read_alone(sharded):
    source, tensors = sharded
    wanted = ["block.1.b", "block.1.a", "block.0.a"]
    found = source.read_together(wanted)
    assert set(found) == set(wanted) and source.read_together([]) == {}
    for name in wanted:
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], tensors[name]) and torch.equal(found[name], source.read(name))


@pytest.mark.skipif(not MAPS.exists(), reason="mappings are told by Linux's /proc")
def test_the_mapping_of_a_tensor_leaves_with_it_whatever_was_read_beside(sharded):
    source, _ = sharded
    before = mappings("one.safetensors")
    found = source.read_together(["block.0.a", "block.0.b"])
    assert mappings("one.safetensors") == before + 2
    del found["block.0.a"]
    assert mappings("one.safetensors") == before + 1


def test_a_tensor_that_is_missing_is_named(sharded):
    with pytest.raises(CorruptCheckpointError, match="no tensor 'block.2.a'"):
        sharded[0].read_together(["block.0.a", "block.2.a"])
