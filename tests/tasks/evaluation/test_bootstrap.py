"""Recovery and its interval, against a slow bootstrap and closed forms."""

import math
import random

import numpy as np
import pytest

from tasks.evaluation.bootstrap import FEWEST, compare, sentence
from tasks.evaluation.lm_eval_harness import aggregate, curve_of, perplexity


def slow_interval(before, after, draws=4000):
    """Percentiles of mean(after)/mean(before), question by question in plain Python."""
    chance, ratios = random.Random(1), []
    for _ in range(draws):
        chosen = [chance.randrange(len(before)) for _ in before]
        ratios.append(sum(after[i] for i in chosen) / sum(before[i] for i in chosen))
    ratios.sort()
    return ratios[int(0.025 * draws)], ratios[int(0.975 * draws)]


def test_the_interval_is_that_of_a_slow_bootstrap():
    chance = np.random.default_rng(3)
    before = (chance.random(150) < 0.7).astype(float)
    after = np.where(chance.random(150) < 0.1, 1 - before, before)
    found = compare(before.mean(), after.mean(), (before.tolist(), after.tolist()), True, float)
    assert found["recovery"] == after.mean() / before.mean() and found["count"] == 150
    assert found["interval"] == pytest.approx(slow_interval(before, after), abs=0.012)
    assert (found["lost"], found["gained"]) == (int(((before == 1) & (after == 0)).sum()), int(((before == 0) & (after == 1)).sum()))


def test_pairing_keeps_what_is_hard_for_both_out_of_the_interval():
    before = [1.0, 0.0] * 100
    assert compare(0.5, 0.5, (before, before), True, float)["interval"] == [1.0, 1.0]
    shuffled = before[1:] + before[:1]
    low, high = compare(0.5, 0.5, (before, shuffled), True, float)["interval"]
    assert low < 0.85 and high > 1.15


def test_a_difference_beyond_the_noise_is_told_and_one_inside_is_not():
    worse = compare(0.9, 0.5, ([1.0] * 90 + [0.0] * 10, [1.0] * 50 + [0.0] * 50), True, float)
    same = compare(0.9, 0.89, ([1.0] * 90 + [0.0] * 10, [1.0] * 88 + [0.0] * 11 + [1.0]), True, float)
    assert worse["inside_noise"] is False and same["inside_noise"] is True
    row = {"name": "t", "metric": "acc", "original": 0.9, "quantized": 0.5, "unit": "questions"}
    assert "worse than the original" in sentence(row | worse) and "inside the noise" in sentence(row | same)


def test_perplexity_is_better_when_lower_and_is_drawn_by_weighted_windows():
    chance = np.random.default_rng(0)
    before = [[-float(x), 10 + i % 3] for i, x in enumerate(chance.uniform(20, 40, 64))]
    after = [[value - 1.0, weight] for value, weight in before]
    values = [aggregate("perplexity", pairs) for pairs in (before, after)]
    assert values[0] == pytest.approx(math.exp(-sum(v for v, _ in before) / sum(w for _, w in before)))
    found = compare(*values, (before, after), False, curve_of("perplexity"))
    # each window loses one nat on about eleven tokens: whatever is drawn, the ratio stays near e^(-1/11)
    expected = math.exp(-1 / 11)
    assert found["recovery"] == pytest.approx(expected, rel=0.01) and found["interval"] == pytest.approx([expected] * 2, rel=0.01)
    assert found["inside_noise"] is False and found["lost"] is None


@pytest.mark.parametrize(("metric", "value"), [("word_perplexity", math.exp(2)), ("bits_per_byte", 2 / math.log(2)), ("acc", -2.0)])
def test_what_becomes_of_pairs(metric, value):
    assert aggregate(metric, [[-4.0, 1.0], [-4.0, 3.0]]) == pytest.approx(value)


def test_scores_of_nothing_have_no_recovery():
    assert compare(0.0, 0.5, ([0.0, 0.0], [1.0, 0.0]), True, float)["recovery"] is None
    assert compare(2.0, math.inf, None, False, float)["recovery"] == 0.0, "a ruined model has recovered nothing"
    assert compare(2.0, 4.0, None, False, float)["recovery"] == 0.5 and compare(2.0, math.nan, None, True, float)["recovery"] == 0.0
    for original, quantized in ((-0.0101, -0.017), (0.2, -0.1), (math.nan, 1.0)):
        assert compare(original, quantized, None, True, float)["recovery"] is None
    assert compare(0.5, 0.0, None, True, float)["recovery"] == 0.0
    assert perplexity(-1000.0) == math.inf


def test_of_a_few_questions_nothing_is_said():
    few = [1.0] * (FEWEST - 1)
    found = compare(1.0, 1.0, (few, few), True, float)
    assert (found["interval"], found["inside_noise"], found["count"]) == (None, None, FEWEST - 1)
    row = {"name": "t", "metric": "acc", "original": 1.0, "quantized": 1.0, "unit": "windows"}
    assert sentence(row | found).endswith(f"(no interval: {FEWEST - 1} windows are too few).")
    assert compare(1.0, 1.0, (few * 2, few * 3), True, float)["interval"] is None, "other questions cannot be paired"
