"""Train the embedded model: a small Llama on the frozen snapshot beside this file.

    python -m flows.embedded.train [--out DIR] [--tokens N] [--seed N] [--threads N]

Recipe: byte-level BPE of 2,048 symbols fitted on the training split; 4 blocks of hidden 256, intermediate 512, 4 heads over
2 key-value heads, tied embeddings; windows of 256 tokens drawn at random offsets from the packed training documents. Muon
(Jordan et al. 2024; `torch.optim.Muon`) on the matrices of the blocks, AdamW on embeddings and norms, because at this budget
AdamW alone ends far higher. Warm-up, then a linear decay to zero. The forward runs in bfloat16 autocast, the master weights
are float32 and are saved as bfloat16. The final figures are measured on the saved bfloat16 weights and written to
`model/training.json` beside a bigram baseline on the same tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
WINDOW = 256
VOCABULARY = 2048
BATCH = 16


def documents(split: str) -> list[str]:
    texts: list[str] = pq.read_table(HERE / f"{split}.parquet").column("text").to_pylist()
    return texts


def fit_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=WINDOW, clean_up_tokenization_spaces=False
    )


def packed(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    return torch.tensor([i for row in tokenizer(texts, verbose=False)["input_ids"] for i in row])


def make_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def bigram_perplexity(train: torch.Tensor, heldout: torch.Tensor) -> float:
    """An add-δ bigram interpolated with the unigram; δ and the weight are the best of a small grid on the held-out split."""
    unigram = torch.bincount(train, minlength=VOCABULARY).double() + 1
    unigram /= unigram.sum()
    pairs = torch.bincount(train[:-1] * VOCABULARY + train[1:], minlength=VOCABULARY**2).double().view(VOCABULARY, VOCABULARY)
    best = math.inf
    for delta in (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0):
        smoothed = (pairs + delta * unigram * 10) / (pairs.sum(1, keepdim=True) + delta * 10)
        best = min(best, float((-smoothed[heldout[:-1], heldout[1:]].log().mean()).exp()))
    return best


@torch.no_grad()
def heldout_perplexity(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    windows = tokens[: tokens.numel() // WINDOW * WINDOW].view(-1, WINDOW)
    total = 0.0
    for batch in windows.split(16):
        logits = model(batch, use_cache=False).logits.float()
        total += torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (windows.shape[0] * (WINDOW - 1)))


def train(out: Path, budget: int, seed: int) -> None:
    torch.manual_seed(seed)
    tokenizer = fit_tokenizer(documents("train"))
    train_ids, heldout_ids = (packed(tokenizer, documents(split)) for split in ("train", "heldout"))
    model = make_model()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.15, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    steps = budget // (BATCH * WINDOW)
    warmup = max(1, steps // 50)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: min((s + 1) / warmup, max(0.0, (steps - s) / (steps - warmup)))) for o in optimizers
    ]
    generator = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {train_ids.numel()} training tokens, {steps} steps", flush=True)
    for step in range(steps):
        offsets = torch.randint(train_ids.numel() - WINDOW, (BATCH,), generator=generator)
        batch = torch.stack([train_ids[o : o + WINDOW] for o in offsets.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(
                f"step {step} loss {loss.item():.3f} held-out {heldout_perplexity(model, heldout_ids[: 64 * WINDOW]):.2f} "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )

    model.to(torch.bfloat16).save_pretrained(out)  # type: ignore[arg-type]  # transformers decorates `to`: its self counts as an argument
    tokenizer.save_pretrained(out)
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "steps": steps,
        "tokens_seen": steps * BATCH * WINDOW,
        "train_tokens": train_ids.numel(),
        "heldout_tokens": heldout_ids.numel(),
        "heldout_perplexity": heldout_perplexity(LlamaForCausalLM.from_pretrained(out), heldout_ids),
        "heldout_perplexity_bigram": bigram_perplexity(train_ids, heldout_ids),
        "seconds": round(time.monotonic() - started),
        "threads": torch.get_num_threads(),
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the embedded model")
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--tokens", type=int, default=4_500_000, help="training budget in tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.out, arguments.tokens, arguments.seed)
