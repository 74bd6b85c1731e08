"""The keys of calibration and evaluation decide which windows a run sees and is judged on."""

import pytest
import torch

from gptq_core.data.tokenizer import load_tokenizer
from gptq_core.data.windows import calibration_windows, evaluation_windows
from tasks.config.run import from_dict
from tasks.request.request import Requests


@pytest.fixture
def texts(tiny_llama, corpus):
    """The two texts for a few changed keys."""
    base = {
        "model": {"path": str(tiny_llama)},
        "quantization": {"bits": 4, "dataset": str(corpus)},
        "calibration": {"samples": 4, "seqlen": 32},
        "evaluation": {"dataset": str(corpus), "seqlen": 16, "samples": 5},
    }
    return lambda **keys: Requests().of(from_dict(base, {key.replace("__", "."): value for key, value in keys.items()})).texts


def test_samples_seqlen_and_seed_choose_the_calibration_windows(texts, tiny_llama, corpus):
    tokenizer = load_tokenizer(str(tiny_llama))
    for samples, seqlen, seed in ((4, 32, 0), (6, 32, 0), (4, 16, 0), (4, 32, 1)):
        found = texts(calibration__samples=samples, calibration__seqlen=seqlen, calibration__seed=seed).calibration
        assert torch.equal(found.tokens, calibration_windows(str(corpus), tokenizer, samples, seqlen, seed).tokens)
    assert not torch.equal(texts().calibration.tokens, texts(calibration__seed=1).calibration.tokens)


def test_dataset_seqlen_and_samples_choose_the_evaluation_windows(texts, tiny_llama, corpus, tmp_path):
    tokenizer, other = load_tokenizer(str(tiny_llama)), tmp_path / "other.txt"
    other.write_text(corpus.read_text()[20_000:40_000])
    for text, seqlen, samples in ((corpus, 16, 5), (other, 16, 5), (corpus, 32, 5), (corpus, 16, 7), (corpus, 16, None)):
        found = texts(evaluation__dataset=str(text), evaluation__seqlen=seqlen, evaluation__samples=samples).evaluation
        assert torch.equal(found.tokens, evaluation_windows(str(text), tokenizer, seqlen, samples).tokens)
    assert not torch.equal(texts().evaluation.tokens, texts(evaluation__dataset=str(other)).evaluation.tokens)
