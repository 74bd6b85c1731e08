import math

import pytest
import torch
from tiny import dense_twin, logits, quantize, save_model, windows

from gptq_core import QuantizeConfig, load_quantized
from gptq_core.errors import InputError
from gptq_core.inference.evaluation import evaluate_one, evaluate_pair, store_original, window_losses


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    model = save_model("gemma3", folder / "model")
    quantize(model, folder / "out", QuantizeConfig(bits=2, group_size=32))
    return model, folder / "out"


def test_against_a_plain_computation(pair):
    model, out = pair
    judged = windows(5, 24, seed=9)
    result = evaluate_pair(str(model), str(out), judged, device="cpu")
    quantized = load_quantized(out)
    log_p, log_q = (
        torch.log_softmax(logits(m, judged.tokens)[:, :-1].double(), -1) for m in (_original(model), dense_twin(model, quantized))
    )
    targets = judged.tokens[:, 1:, None]
    assert result["original_perplexity"] == pytest.approx(math.exp(-log_p.gather(-1, targets).mean()), rel=1e-5)
    assert result["quantized_perplexity"] == pytest.approx(math.exp(-log_q.gather(-1, targets).mean()), rel=1e-5)
    assert result["kl"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)
    assert result["kl"] > 0
    assert result["top1_agreement"] == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))
    right_p, right_q = (log.argmax(-1) == judged.tokens[:, 1:] for log in (log_p, log_q))
    assert result["flips"] == pytest.approx(float((right_p != right_q).double().mean()))
    assert (result["tokens"], result["windows"]) == (5 * 23, 5)
    assert evaluate_one(str(out), judged, device="cpu")["perplexity"] == pytest.approx(result["quantized_perplexity"], rel=1e-6)
    assert evaluate_one(str(model), judged, device="cpu")["perplexity"] == pytest.approx(result["original_perplexity"], rel=1e-6)


def _original(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_original_against_itself_has_no_divergence(pair):
    result = evaluate_pair(str(pair[0]), str(pair[0]), windows(), device="cpu")
    assert result["kl"] == 0
    assert result["top1_agreement"] == 1


def test_without_kl(pair):
    result = evaluate_pair(str(pair[0]), str(pair[1]), windows(), kl=False, device="cpu")
    assert result["kl"] is None
    assert result["quantized_perplexity"] > 0


def test_progress_reaches_the_end(pair, monkeypatch):
    monkeypatch.setattr("gptq_core.inference.evaluation.LOGITS_AT_ONCE", 96 * 64)
    seen = []
    evaluate_one(str(pair[1]), windows(), device="cpu", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 6), (4, 6), (6, 6)]


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt"])
def test_a_large_vocabulary_is_judged_some_positions_at_a_time(kind, tmp_path, monkeypatch):
    model, judged = save_model(kind, tmp_path / "model"), windows(3, 24, seed=9)
    quantize(model, tmp_path / "out", QuantizeConfig(bits=2, group_size=32))
    whole = evaluate_pair(str(model), str(tmp_path / "out"), judged, device="cpu")
    asked = []
    monkeypatch.setattr("gptq_core.inference.evaluation.LOGITS_AT_ONCE", 1)
    monkeypatch.setattr("gptq_core.inference.evaluation.FEWEST_POSITIONS", 5)
    softmax = torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda logits, dim: asked.append(logits.shape[0]) or softmax(logits, dim))
    result = evaluate_pair(str(model), str(tmp_path / "out"), judged, device="cpu")
    assert set(asked) == {5, 3}, "23 positions in pieces of 5"
    for key in ("original_perplexity", "quantized_perplexity", "kl"):
        assert result[key] == pytest.approx(whole[key], rel=1e-3)
    assert (result["top1_agreement"], result["flips"]) == (whole["top1_agreement"], whole["flips"])
    store_original(str(model), judged, tmp_path / "kept.npy", device="cpu")
    assert evaluate_pair(str(model), str(tmp_path / "out"), judged, device="cpu", stored=tmp_path / "kept.npy") == result


def test_losses_are_those_of_each_window(pair):
    judged = windows(5, 24, seed=9)
    model = _original(pair[0])
    log_p = torch.log_softmax(logits(model, judged.tokens)[:, :-1].double(), -1)
    expected = -log_p.gather(-1, judged.tokens[:, 1:, None]).sum((1, 2))
    assert window_losses(model, judged) == pytest.approx(expected.tolist(), rel=1e-5)


def test_pickle_weights_are_refused_before_transformers_loads_them(pair, tmp_path):
    folder = save_model("llama", tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="only pickle weights"):
        evaluate_one(str(folder), windows(), device="cpu")
