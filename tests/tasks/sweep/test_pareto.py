"""The front against a slow oracle, and the rules of the choice."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.outcome.parts import SweptCell
from tasks.sweep.pareto import pareto_front, recommend


def row(name, size, kl, *, perplexity=10.0, gate=None, judged_on=None):
    return SweptCell(
        name=name,
        status="done",
        bytes=size,
        kl=kl,
        perplexity=perplexity,
        original_perplexity=10.0,
        gate=gate,
        bits_per_weight=4.0,
        judged_on=judged_on,
    )


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=8))
def test_the_front_has_for_each_point_that_nothing_dominates_one_cell(points):
    rows = [row(str(index), size, float(kl)) for index, (size, kl) in enumerate(points)]
    best = {(a, b) for a, b in points if not any((c <= a and d <= b) and (c, d) != (a, b) for c, d in points)}
    found = [points[int(name)] for name in pareto_front(rows, "kl")]
    assert sorted(best) == found


def test_cells_without_numbers_are_on_no_front():
    assert pareto_front([row("a", None, None), row("b", 1, 0.5), row("c", 1, None)], "kl") == ["b"]


def test_cells_of_several_models_or_texts_are_compared_only_with_their_like():
    rows = [row("a", 1, 0.5, judged_on="x"), row("b", 2, 0.9, judged_on="y"), row("c", 3, 0.6, judged_on="x")]
    assert pareto_front(rows, "kl") == ["a", "b"]
    assert "cannot be compared" in pick(rows).reason and "cannot be compared" not in pick(rows[::2]).reason


def pick(rows, **keys):
    return recommend(rows, **{"rule": "smallest_within_gate", "measure": "kl", "max_gb": None, "gated": False, "max_increase": 0.05} | keys)


CELLS = [
    row("w2", 2e9, 0.5, perplexity=15.0, gate="failed"),
    row("w3", 3e9, 0.1, perplexity=10.6, gate="passed"),
    row("w4", 4e9, 0.02, perplexity=10.2, gate="passed"),
    row("w4b", 4e9, 0.01, perplexity=10.1, gate="passed"),
]


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({}, "w4b"),
        ({"max_increase": 0.06}, "w3"),
        ({"max_increase": 0.001}, None),
        ({"gated": True}, "w3"),
        ({"rule": "best_within_size", "max_gb": 3.5}, "w3"),
        ({"rule": "best_within_size", "max_gb": 9}, "w4b"),
        ({"rule": "best_within_size", "max_gb": 1}, None),
        ({"rule": "best_within_size", "max_gb": 2.5, "gated": True}, None),
    ],
)
def test_each_rule_picks_its_cell(keys, name):
    found = pick(CELLS, **keys)
    assert found.name == name and found.rule


def test_a_perplexity_of_nan_fits_nothing():
    rows = [row("a", 1, math.nan, perplexity=math.nan), row("b", 2, 0.1)]
    assert pick(rows[:1]).name is None and pareto_front(rows, "kl") == ["b"]
    assert pick(rows, rule="best_within_size", max_gb=1).name == "b"
