"""A forward on shapes alone holds what the real one holds."""

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
    [found] = {tuple(map(tuple, f.held)): f for f in footprints(decoder_of(copy.deepcopy(config)), SEQLEN)}.values()
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    decoder = architecture.find_decoder(model)
    hidden, calls = capture.capture(model.base_model, decoder.blocks, [torch.zeros(1, SEQLEN, dtype=torch.long)], as_tuple=False)
    with torch.no_grad():
        real = footprint._follow(decoder.blocks[0], hidden[0], calls[0][1])
    assert [group.names for group in found.groups] == [group.names for group in real.groups]
    # eager attention holds scores of windows × heads × tokens², on both sides; fused attention on neither
    assert not found.assumed and found.held == real.held and found.highest == real.highest and found.made == real.made


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
    assert list(map(sum, found.held)) == sorted(map(sum, found.held))


def footprint_of(*parts):
    groups = tuple(InputGroup((str(number),), 1) for number in range(len(parts) - 1))
    return Footprint(groups, parts, 0, sum(size for part in parts for _, size in part))


def test_a_device_is_asked_for_what_is_live():
    found = resident(footprint_of(((0, 100), (1, 50)), ((1, 0), (2, 10))), windows=10, windows_at_once=4, streams=2, heap=False)
    assert found.at == (150 * 20,) and found.highest == 150 * 20 + 150 * 8


def test_small_tensors_of_a_process_take_more_than_their_size_and_large_ones_do_not():
    one = footprint_of(((0, ON_HEAP // 4), (1, 1000)), ((0, 0),))
    for batch, small in ((2, ON_HEAP // 4 + 1000), (4, 1000)):  # four windows at once make the first a large one
        found = resident(one, windows=8, windows_at_once=batch, streams=1, heap=True)
        assert found.at == (8 * (ON_HEAP // 4 + 1000) + 8 * small // 2,)
        assert found.highest == found.at[0] + batch * one.highest


def test_in_half_precision_the_footprint_is_about_half(tmp_path):
    config = architecture.load_config(save_model("llama", tmp_path / "model"))
    full, half = (
        sum(footprints(decoder_of(copy.deepcopy(config), dtype), SEQLEN)[0].held[-1]) for dtype in (torch.float32, torch.bfloat16)
    )
    assert half * 2 <= full * 1.2 and half * 2 >= full
