"""What several rooms' tests share. Nothing here reaches a hub."""

from __future__ import annotations

import importlib
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import MISSING, executable
from jaxtyping import install_import_hook

# Triton's kernels run on the GPU where there is one, else in its interpreter; it looks when it is first imported, and torch imports it
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

# The hook compiles what it instruments in every process, and with it each library that is first imported meanwhile:
# transformers comes before, from its bytecode, which saves seconds.
importlib.import_module("transformers.modeling_utils")
# Shapes and dtypes of the engine's signatures are checked in every test; before anything imports the engine.
install_import_hook("gptq_core", "beartype.beartype")

# started in the background of a script, SIGINT is ignored, and so it would be by every process that a test starts and interrupts
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SERVERS = {"prefect_server", "migrated", "browser"}
"""Fixtures that take seconds to come up."""
SYLLABLES = "ba ke lo mi nu sa te vo wi xa ra do fi gu".split()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For modules whose layers are small: more threads than one only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .txt of more than 60 KB, the same on every machine: sentences of made-up words, frequent ones more often."""
    chance = random.Random(0)
    words = ["".join(chance.choices(SYLLABLES, k=chance.randint(1, 3))) for _ in range(400)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    sentences = [" ".join(chance.choices(words, weights, k=chance.randint(4, 12))).capitalize() + "." for _ in range(2000)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(" ".join(sentences[start : start + 5]) for start in range(0, len(sentences), 5)) + "\n")
    assert path.stat().st_size >= 60_000
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder with a random Llama of two blocks and a tokenizer fitted on `corpus`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train(
        [str(corpus)], trainers.BpeTrainer(vocab_size=384, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(fast),
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                bos_token_id=0,
                eos_token_id=1,
                tie_word_embeddings=False,
                initializer_range=0.1,
            )
        ).float()
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """One ephemeral Prefect server on a database of its own for the whole session."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: to make one takes seconds, to copy it none."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def browser():
    """A headless browser of the system; skipped where there is none, which the summary tells.

    Of one module: while it is open an event loop runs in this thread, and Prefect's flows of other modules want none.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
    path = executable()
    if path is None:
        pytest.skip(MISSING)
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path)
        yield found
        found.close()


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what needs a server, a store or a browser, and all cases of a `grid` but its first."""
    seen = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if SERVERS.intersection(item.fixturenames) or (item.get_closest_marker("grid") and test in seen):
            item.add_marker("slow")
        seen.add(test)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say where pages were not looked at: a skip among many tests is not seen."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if MISSING in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests of pages were skipped: {MISSING}", yellow=True)
