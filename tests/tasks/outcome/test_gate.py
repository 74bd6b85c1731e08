"""The gate is arithmetic on a record: each limit alone, both ways, and what is missing."""

import math

import pytest
from report_records import run

from gptq_core.model.selection import NOT_LISTED
from tasks.config.run import LIMITS, GateConfig, from_dict
from tasks.outcome.gate import GateFailedError, demand, judge, limited
from tasks.outcome.parts import Evaluation, Sizes
from tasks.outcome.record import RunRecord

EVALUATION = Evaluation(original_perplexity=20.0, quantized_perplexity=25.0, kl=0.125, top1_agreement=None, recovery=0.75, digest="e")
SIZES = Sizes(
    bytes=1_500_000_000,
    bits_per_weight=4.0,
    fallback_layers=["a"],
    skipped=[
        {"name": "b", "reason": "in_features 100 is no multiple of 32"},
        {"name": "c", "reason": NOT_LISTED},
        {"name": "d", "reason": "dynamic: -:d"},
    ],
)
VALUES = {"max_perplexity_increase": 0.25, "max_kl": 0.125, "min_recovery": 0.75, "max_gb": 1.5, "max_fallback_layers": 2}
STRICTER = {"max_perplexity_increase": 0.24, "max_kl": 0.124, "min_recovery": 0.76, "max_gb": 1.49, "max_fallback_layers": 1}


def test_every_limit_is_tested_below():
    assert set(VALUES) == set(STRICTER) == set(LIMITS)


@pytest.mark.parametrize("limit", LIMITS)
def test_each_limit_alone_is_kept_at_its_value_and_not_beyond(limit):
    kept, missed = (judge(GateConfig(**{limit: bounds[limit]}), EVALUATION, SIZES) for bounds in (VALUES, STRICTER))
    assert kept.model_dump() == {
        "passed": True,
        "measure": "kl",
        "value": 0.125,
        "checks": [{"limit": limit, "limit_value": VALUES[limit], "value": VALUES[limit], "passed": True}],
    }
    assert not missed.passed and missed.checks[0].limit_value == STRICTER[limit] and kept.failures is None
    assert f"{limit}: {VALUES[limit]:g} is {'below' if limit == 'min_recovery' else 'above'} {STRICTER[limit]:g}" == missed.failures
    assert (str(kept), str(missed), kept.word, missed.word) == ("passed", f"failed: {missed.failures}", "passed", "failed")


@pytest.mark.parametrize("limit", ["max_perplexity_increase", "max_kl", "min_recovery"])
def test_what_was_not_measured_passes_no_limit(limit):
    nothing = Evaluation(original_perplexity=None, quantized_perplexity=None, kl=None, top1_agreement=None, digest="e")
    for evaluation in (None, nothing):
        found = judge(GateConfig(**{limit: 1}), evaluation, SIZES)
        assert not found.passed and found.value is None and found.failures == f"{limit} = 1: not measured"


def test_one_missed_limit_is_enough_and_every_one_is_told():
    found = judge(GateConfig(max_kl=0.2, max_gb=1.0, max_fallback_layers=0), EVALUATION, SIZES)
    assert [check.passed for check in found.checks] == [True, False, False]
    assert found.failures == "max_gb: 1.5 is above 1; max_fallback_layers: 2 is above 0"


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_broken_number_passes_nothing(wrong):
    evaluation = EVALUATION.model_copy(update={"quantized_perplexity": wrong, "kl": wrong})
    assert not any(check.passed for check in judge(GateConfig(max_kl=9, max_perplexity_increase=9), evaluation, SIZES).checks)


def test_the_measure_is_the_one_that_was_asked_for():
    found = judge(GateConfig(max_gb=2, measure="perplexity_increase"), EVALUATION, SIZES)
    assert (found.measure, found.value) == ("perplexity_increase", 0.25) and limited(EVALUATION, SIZES)["kl"] == 0.125


def test_a_failed_gate_names_limit_value_and_checkpoint():
    config = from_dict(
        {"model": {"path": "m"}, "quantization": {"bits": 4, "dataset": "t"}, "output": {"dir": "here"}, "gate": {"max_kl": 0.1}}
    )
    record = RunRecord.model_validate(run(gate=None))
    demand(config, record)
    record.gate = judge(GateConfig(max_kl=0.2), EVALUATION, SIZES)
    demand(config, record)
    record.gate = judge(config.gate, EVALUATION, SIZES)
    with pytest.raises(GateFailedError, match=r"max_kl: 0.125 is above 0.1\): the checkpoint here is kept and not registered"):
        demand(config, record)
