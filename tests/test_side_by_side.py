"""What a side-by-side bench concludes from its runs. The bench itself is started by hand: it needs the peers, and minutes."""

import pytest
from bench.side_by_side_tables import cpu, document, main_table, of, ratio, stage_table


def run(engine, index, seconds, others=0.0, **more):
    step = {"seconds": 2 * seconds, "cpu_seconds": seconds, "start_bytes": 300e6, "peak_bytes": 500e6}
    return {"engine": engine, "round": index, "quantize": step, "others": others, **more}


def peer(index, seconds):
    around = {"seconds": 1.0, "cpu_seconds": 0.5}
    return run("gptqmodel", index, seconds, load=around, save=around)


def ours(index, seconds):
    load, save = ({"seconds": 1.0, "cpu_seconds": value} for value in (0.2, 0.1))
    return run("ours: tuned", index, seconds, load=load, save=save, stages={"forward": seconds, "sweep": seconds / 2})


@pytest.fixture
def results():
    """Two of three rounds of ours were slow, one of them because everything was: the peer's ratios are 2, 4 and 4."""
    return {
        "date": "2026-11-21T08:00",
        "engines": ["ours: tuned", "gptqmodel", "optimum"],
        "ours": "ours: tuned",
        "machine": {"processor": "Some CPU", "architecture": "x86_64", "cores": 2, "memory_bytes": 2**34, "instructions": ["avx2"]},
        "setting": {
            "model": "tiny",
            "bits": 4,
            "group_size": 128,
            "threads": 1,
            "dtype": "float32",
            "own_dtype": "auto",
            "windows": 8,
            "seqlen": 32,
            "calibration": "random ids",
            "rounds": 3,
            "warmup": 1,
        },
        "heldout": 992,
        "versions": {"ours: tuned": {"torch": "2.13.0"}, "gptqmodel": {"torch": "2.12.0"}},
        "runs": [ours(-1, 50.0), peer(-1, 900.0), ours(0, 4.0), peer(0, 8.0), ours(1, 4.0), peer(1, 16.0), ours(2, 1.0), peer(2, 4.0)],
        "quality": {"ours: tuned": {"quantized_perplexity": 10.25, "kl": 0.007}},
        "failures": {"optimum": "failed, exit status 1"},
    }


def row(table, name):
    [line] = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_ratio_is_taken_within_a_round_and_the_warm_up_is_in_none(results):
    # of the medians it would be 8 / 4; with the warm-up other again
    assert ratio(of(results, "gptqmodel"), of(results, "ours: tuned"), cpu) == 4
    assert row(main_table(results), "gptqmodel")[1:3] == ["8.0", "4.00"]


def test_a_peer_that_finished_fewer_rounds_is_compared_in_those(results):
    results["runs"] = [found for found in results["runs"] if (found["engine"], found["round"]) not in {("gptqmodel", 1), ("gptqmodel", 2)}]
    assert row(main_table(results), "gptqmodel")[1:3] == ["8.0", "2.00"]


def test_every_row_has_all_cells_and_a_failure_says_so(results):
    table = main_table(results)
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert row(table, "optimum")[1] == "failed, exit status 1"
    assert row(table, "ours: tuned")[-3:] == ["0.3", "10.2500", "0.00700"]
    assert row(table, "gptqmodel")[-3:] == ["1.0", "", ""]


def test_stages_have_their_share_and_the_rest_is_named(results):
    table = stage_table(results)
    assert row(table, "forward") == ["forward", "4.00 (50%)"]
    assert row(table, "outside the stages") == ["outside the stages", "2.00 (25%)"]


@pytest.mark.parametrize("others, said", [(0.02, False), (1.3, True)])
def test_the_head_says_when_wall_seconds_are_not_to_be_compared(results, others, said):
    for found in results["runs"]:
        found["others"] = others
    assert ("compare the CPU seconds" in document(results)) is said
    assert "torch 2.12.0, torch 2.13.0" in document(results)
