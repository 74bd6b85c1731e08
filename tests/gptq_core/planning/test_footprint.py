"""A forward on shapes alone holds what the real one holds, and a heap grows as the C library's does."""

import copy

import pytest
import torch
import transformers
from tiny import CONFIGS, save_model

from gptq_core.block.walk import InputGroup
from gptq_core.model import architecture, capture
from gptq_core.planning import footprint
from gptq_core.planning.footprint import ON_HEAP, Footprint, footprints, resident

SEQLEN = 24


def decoder_of(config, dtype=torch.float32):
    return architecture.find_decoder(architecture.empty_model(config, dtype))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("gpt2", "mixtral")])
def test_the_forward_on_shapes_keeps_what_the_real_one_keeps(name):
    config = CONFIGS[name]()
    [found] = {tuple(f.live): f for f in footprints(decoder_of(copy.deepcopy(config)), SEQLEN)}.values()
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    decoder = architecture.find_decoder(model)
    hidden, calls = capture.capture(model.base_model, decoder.blocks, [torch.zeros(1, SEQLEN, dtype=torch.long)], as_tuple=False)
    with torch.no_grad():
        real = footprint._follow(decoder.blocks[0], hidden[0], calls[0][1])
    assert [group.names for group in found.groups] == [group.names for group in real.groups]
    # eager attention holds scores of windows × heads × tokens², on both sides; fused attention on neither
    assert not found.assumed and found.live == real.live and found.highest == real.highest and found.made == real.made


def test_the_model_is_left_as_it_was():
    decoder = decoder_of(CONFIGS["llama"]())
    footprints(decoder, SEQLEN)
    assert all(tensor.is_meta for tensor in decoder.model.state_dict().values())
    assert all(not buffer.is_meta for buffer in decoder.model.buffers())  # rotary tables


def test_a_block_that_asks_for_values_is_taken_by_its_linears(monkeypatch):
    decoder = decoder_of(CONFIGS["opt"]())
    forward = type(decoder.blocks[0]).forward
    monkeypatch.setattr(type(decoder.blocks[0]), "forward", lambda self, hidden, **k: forward(self, hidden * hidden.sum().item(), **k))
    found = footprints(decoder, SEQLEN)[0]
    columns = sum(linear.out_features for linear in architecture.linears_of(decoder.blocks[0]).values())
    assert found.assumed and found.made == SEQLEN * 4 * columns
    assert found.live == sorted(found.live)


def footprint_of(*parts):
    groups = tuple(InputGroup((str(number),), 1) for number in range(len(parts) - 1))
    return Footprint(groups, parts, 0, sum(size for part in parts for _, size in part))


def test_a_device_is_asked_for_what_is_live():
    found = resident(footprint_of(((0, 100), (1, 50)), ((1, 0), (2, 10))), windows=10, windows_at_once=4, streams=2, heap=False)
    assert found.at == (150 * 20,) and found.highest == 150 * 20 + 150 * 8


def test_a_hole_of_the_same_size_does_not_do_and_joined_holes_do():
    size = 1 << 20
    # two tensors side by side, the second pinned by a third: one hole, then another tensor of its size
    one = footprint_of(((0, size), (1, size)), ((0, 0), (2, size)), ())
    assert resident(one, 1, 1, 1, heap=True).at == (2 * size, 3 * size)
    both = footprint_of(((0, size), (1, size), (2, size)), ((0, 0), (1, 0), (3, size)), ())
    assert resident(both, 1, 1, 1, heap=True).at == (3 * size, 3 * size)


def test_large_tensors_go_back_when_they_are_released():
    found = resident(footprint_of(((0, ON_HEAP),), ((0, 0), (1, 1 << 20)), ()), 1, 1, 1, heap=True)
    assert found.at == (ON_HEAP, 1 << 20) and found.highest == ON_HEAP


def test_many_batches_grow_in_proportion():
    part = footprint_of(((0, 1 << 20),), ((0, 0),))
    few, many = (resident(part, windows, 1, 1, heap=True) for windows in (64, 640))
    assert many.at[0] == 10 * few.at[0] == 640 << 20


def test_in_half_precision_the_footprint_is_about_half(tmp_path):
    config = architecture.load_config(save_model("llama", tmp_path / "model"))
    full, half = (footprints(decoder_of(copy.deepcopy(config), dtype), SEQLEN)[0].live[-1] for dtype in (torch.float32, torch.bfloat16))
    assert half * 2 <= full * 1.2 and half * 2 >= full
