import math
from collections import Counter

import pytest
import torch
from tiny import quantize, save_model

from gptq_core import QuantizeConfig
from gptq_core.checkpoint.packing import unpack
from gptq_core.checkpoint.writer import OutputFolder
from gptq_core.method.solver import Solution
from gptq_core.run.summary import distribution


def test_counts_of_codes_and_octaves():
    codes = torch.tensor([[0, 3, 3], [1, 3, 0]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, -0.6, 4.0]], dtype=torch.float16)
    solution = Solution(codes, scales, torch.zeros(1, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32), torch.zeros(3))
    assert distribution(solution, 2) == {"codes": [2, 1, 0, 3], "scales": {"first_octave": -1, "counts": [2, 0, 0, 1]}}


def test_scales_of_zero_have_no_octave():
    empty = torch.zeros(1, 1)
    solution = Solution(empty.to(torch.uint8), empty.half(), empty.to(torch.uint8), torch.zeros(1, dtype=torch.int32), empty[0])
    assert distribution(solution, 3) == {"codes": [1] + [0] * 7, "scales": {"first_octave": 0, "counts": []}}


@pytest.mark.grid
@pytest.mark.parametrize("recipe", ["tuned", "max"])
def test_the_record_tells_of_the_checkpoint_as_it_lies_on_disk(tmp_path, recipe):
    quantize(save_model("llama", tmp_path / "model"), tmp_path / "out", QuantizeConfig(bits=3, group_size=32, recipe=recipe))
    from gptq_core.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint(tmp_path / "out")
    layers = [layer for record in OutputFolder._read(tmp_path / "out") if record["kind"] == "block" for layer in record["layers"]]
    assert layers
    for layer in layers:
        codes = unpack(checkpoint.read(layer["name"] + ".qweight"), 3)
        assert layer["codes"] == torch.bincount(codes.flatten().int(), minlength=8).tolist()
        scales = checkpoint.read(layer["name"] + ".scales").float().flatten().tolist()
        octaves = Counter(math.floor(math.log2(abs(s))) for s in scales)
        found = layer["scales"]
        assert {found["first_octave"] + i: count for i, count in enumerate(found["counts"]) if count} == octaves
