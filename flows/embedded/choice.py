"""Make a multiple-choice task of the held-out text: which of four continuations is the one that stands there.

    python -m flows.embedded.choice

A question is some words of a document and the words that follow; the other three answers are as many words from other places of the
held-out text. lm-eval runs it offline, by `tasks/embedded_choice.yaml`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow.parquet as pq

HERE = Path(__file__).parent
QUESTIONS, CONTEXT, ANSWER, CHOICES, SEED = 200, 24, 6, 4, 0


def questions(documents: list[str]) -> list[dict[str, object]]:
    """{"context", "choices", "answer": index of the right one}, drawn from the documents; words are what spaces part."""
    chance = random.Random(SEED)
    texts = [words for words in (document.split() for document in documents) if len(words) >= CONTEXT + ANSWER]
    found: list[dict[str, object]] = []
    while len(found) < QUESTIONS:
        words = chance.choices(texts, [len(text) for text in texts])[0]
        start = chance.randrange(len(words) - CONTEXT - ANSWER + 1)
        right = " ".join(words[start + CONTEXT : start + CONTEXT + ANSWER])
        choices = {right}
        while len(choices) < CHOICES:
            other = chance.choices(texts, [len(text) for text in texts])[0]
            place = chance.randrange(len(other) - ANSWER + 1)
            choices.add(" ".join(other[place : place + ANSWER]))
        order = sorted(choices)
        chance.shuffle(order)
        found.append({"context": " ".join(words[start : start + CONTEXT]), "choices": order, "answer": order.index(right)})
    return found


def main() -> None:
    documents = pq.read_table(HERE / "heldout.parquet").column("text").to_pylist()
    lines = [json.dumps(question, ensure_ascii=False) for question in questions(documents)]
    (HERE / "tasks" / "choice.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
