"""The model around its blocks: with the blocks run one by one it is the model."""

import pytest
import torch
import transformers
from tiny import CONFIGS, DENSE
from torch import nn

from gptq_core.block import walk
from gptq_core.errors import UnsupportedModelError
from gptq_core.model import capture
from gptq_core.model.architecture import find_decoder


@pytest.mark.parametrize("architecture", DENSE)
def test_blocks_run_apart_in_their_surroundings_are_the_model(architecture):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture]()).eval()
    decoder, batches = find_decoder(model), [torch.randint(3, 96, (size, 24)) for size in (2, 2, 1)]
    blocks = decoder.blocks
    before = list(blocks)
    as_tuple = capture.returns_tuple(model.base_model, blocks[0], batches[0][:1])
    hidden, calls = capture.capture(model.base_model, blocks, batches, as_tuple)
    for block, own in zip(blocks, calls, strict=True):
        walk.run(block, hidden, own)
    head, entering = model.get_output_embeddings(), []
    capture.finish(model, blocks, head, batches, hidden, as_tuple, entering.append)
    assert list(blocks) == before and not head._forward_pre_hooks
    for batch, left, inputs in zip(batches, hidden, entering, strict=True):
        with torch.no_grad():
            expected = model(input_ids=batch, use_cache=False).logits
            torch.testing.assert_close(head(inputs), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(capture.logits(model, blocks, batch, left, as_tuple), expected, rtol=1e-5, atol=1e-5)


def test_arguments_that_depend_on_the_tokens_are_refused():
    class Block(nn.Module):
        def forward(self, hidden, extra):
            return hidden

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block()])

        def forward(self, input_ids, use_cache):
            return self.blocks[0](input_ids.float(), input_ids)

    body = Body()
    with pytest.raises(UnsupportedModelError, match="depend on the token ids"):
        capture.capture(body, body.blocks, [torch.zeros(1, 4), torch.ones(1, 4)], as_tuple=False)
