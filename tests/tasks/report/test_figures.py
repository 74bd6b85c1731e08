"""The numbers that the figures of a report show, in the plot and in the table below it."""

import math

import pytest
from report_records import blocks_of, experts, layer, measure, run, sweep, sweep_page

from tasks.outcome.parts import MeasureResult
from tasks.report import figures, layer_figures


def by_name(figure):
    return {trace.get("name"): trace for trace in figure.plot["data"]}


@pytest.fixture
def blocks():
    return run()["blocks"]


def test_errors_are_a_map_of_blocks_by_layers_on_a_logarithmic_scale(blocks):
    figure = layer_figures.errors(blocks_of(blocks))
    [trace] = figure.plot["data"]
    assert trace["x"] == ["0", "1"] and trace["y"] == ["self_attn.q_proj", "mlp.down_proj"]
    assert [[10**value for value in row] for row in trace["z"]] == [pytest.approx([0.001, 0.002]), pytest.approx([0.1, 0.1])]
    assert "model.layers.1.mlp.down_proj" in trace["hovertext"][1][1] and "not positive definite" in trace["hovertext"][1][1]
    assert "bits 4" in trace["hovertext"][0][0] and "0.00100" in trace["hovertext"][0][0]
    assert figure.table.header == ["layer", "block 0", "block 1"]
    assert figure.table.rows[0] == ["self_attn.q_proj", "0.00100", "0.00200"]
    assert "4 layers" in figure.description and "0.001 to 0.1" in figure.description


def test_layers_that_not_every_block_has_and_errors_that_are_none_leave_holes():
    blocks = [
        {"block": 0, "seconds": 1.0, "layers": [layer("model.layers.0.a", 0.1), layer("model.layers.0.b", None)]},
        {"block": 1, "seconds": 1.0, "layers": [layer("model.layers.1.a", 0.0), layer("model.layers.1.c", math.nan)]},
    ]
    [trace] = layer_figures.errors(blocks_of(blocks)).plot["data"]
    assert trace["y"] == ["a", "b", "c"]
    assert trace["z"] == [[-1.0, -1.0], [None, None], [None, None]]  # 0 has no logarithm: the lowest stands for it
    assert layer_figures.errors(blocks_of([])) is None


def test_a_long_name_leaves_room_for_the_plot():
    name = "a_very_long_name_of_a_module." * 3 + "proj"
    layers = [layer(f"model.layers.0.{name}", 0.1), layer("model.layers.0.b", 0.2)]
    figure = layer_figures.errors(blocks_of([{"block": 0, "seconds": 1.0, "layers": layers}]))
    axis = figure.plot["layout"]["yaxis"]
    assert axis["tickvals"] == [name, "b"] and axis["ticktext"] == ["a_very_long_n…_module.proj", "b"]
    assert name in figure.plot["data"][0]["hovertext"][0][0] and figure.table.rows[0][0] == name


def test_of_many_experts_the_worst_stands_for_all():
    few, many = layer_figures.errors(blocks_of(experts(4)["blocks"])), layer_figures.errors(blocks_of(experts(64)["blocks"]))
    assert len(few.plot["data"][0]["y"]) == 8
    [trace] = many.plot["data"]
    assert trace["y"] == ["mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"]
    assert 10 ** trace["z"][1][0] == pytest.approx(0.01 * 128) and "experts.63.up_proj" in trace["hovertext"][1][0]


def test_tokens_by_expert_and_block():
    found = experts(12)["blocks"]
    figure = layer_figures.experts(blocks_of(found))
    [trace] = figure.plot["data"]
    assert trace["y"] == [f"expert {number}" for number in range(12)]  # 2 before 10
    assert trace["z"][0] == [101.0, 0.0] and trace["z"][3] == [107.0, 107.0] and trace["zmin"] == 0
    assert figure.table.rows[0] == ["expert 0", "101", "0"]
    assert layer_figures.experts(blocks_of(run()["blocks"])) is None


def test_scales_are_counted_by_octave_over_all_layers(blocks):
    figure = layer_figures.scales(blocks_of(blocks))
    [trace] = figure.plot["data"]
    assert trace["x"] == ["2<sup>-7</sup>", "2<sup>-6</sup>"] and trace["y"] == [0.75, 0.25]  # empty octaves at the ends are left out
    assert [row[2] for row in figure.table.rows] == ["12", "4"]


def test_codes_of_one_width_are_shares_and_of_several_are_on_one_scale(blocks):
    [trace] = layer_figures.codes(blocks_of(blocks)).plot["data"]
    assert trace["type"] == "bar" and sum(trace["y"]) == pytest.approx(1) and trace["y"][7] == pytest.approx(2 / 18)
    blocks[0]["layers"][0] = layer("model.layers.0.self_attn.q_proj", 0.1, bits=2)
    figure = layer_figures.codes(blocks_of(blocks))
    two, four = figure.plot["data"]
    assert (two["name"], four["name"]) == ("2 bits", "4 bits")
    assert sum(two["y"]) / 4 == pytest.approx(1) and sum(four["y"]) / 16 == pytest.approx(1)
    assert two["x"] == [0.125, 0.375, 0.625, 0.875] and len(figure.table.rows) == 20


def test_stages_longest_first_and_what_none_counted():
    figure = figures.stages({"forward": 1.0, "sweep": 3.0}, 6.0)
    [trace] = figure.plot["data"]
    assert trace["y"] == ["sweep", "other", "forward"] and trace["x"] == [3.0, 2.0, 1.0]
    assert figure.table.rows[0] == ["sweep", "3.000", "50 %"]
    assert figures.stages({}, 6.0) is None


def test_recovery_with_intervals_tells_noise_by_colour_and_symbol():
    rows = [measure("a", 0.5, 0.45, [0.8, 0.98], False), measure("b", 0.5, 0.5, [0.9, 1.1], True), measure("c", 0.5, 0.4, None, None)]
    figure = figures.recovery([MeasureResult.model_validate(row) for row in rows])
    inside, outside, unknown = (by_name(figure)[name] for name in ("inside the noise", "outside the noise", "noise not known"))
    assert outside["y"] == ["a (acc)"] and outside["x"] == [0.9]
    assert outside["error_x"]["array"] == pytest.approx([0.08]) and outside["error_x"]["arrayminus"] == pytest.approx([0.1])
    assert unknown["error_x"]["array"] == [0] and inside["marker"]["symbol"] != outside["marker"]["symbol"]
    assert figure.table.rows[0] == ["a (acc)", "90.0 %", "80.0 % to 98.0 %"] and figure.table.rows[2][2] == "no interval"
    assert figures.recovery([]) is None


def test_the_front_the_choice_and_the_original_are_points_of_their_own():
    found = sweep()
    page = sweep_page(found)
    kl, perplexity = (part for part in page.figures if part.key.startswith("front"))
    traces = by_name(kl)
    assert traces["Pareto front"]["x"] == [1.5, 2.2, 2.5, 3.0] and traces["Pareto front"]["y"] == [0.9, 0.17, 0.12, 0.03]
    assert traces["cells"]["x"] == [2.3] and traces["recommended"]["x"] == [3.0]
    assert kl.plot["layout"]["yaxis"]["type"] == "log" and kl.plot["layout"]["xaxis"]["title"]["text"] == "size (MB)"
    # a KL of 0 has no place on a logarithmic axis: at its edge, and told
    assert traces["original"]["x"] == [12.0] and 0 < traces["original"]["y"][0] < 0.03
    assert "KL per token (nats) 0 " in traces["original"]["hovertext"][0]
    assert kl.table.rows[-1] == ["original", "12.00 MB", "0", ""]
    assert by_name(perplexity)["original"]["y"] == [20.0]
    # the number at a point is its place in the table of the cells
    [cells] = [part for section in page.sections for part in section.parts if part.kind == "table" and part.header[0] == "cell"]
    assert [row[0] for row in cells.rows] == ["b2g128", "b3g128", "b2g32", "b3g32", "b4g32", "b7"]
    assert [row[1] for row in cells.rows] == ["1", "2", "3", "4", "5", "6"]
    assert traces["Pareto front"]["text"] == ["1", "2", "4", "5"]


def test_cells_of_several_models_have_a_front_each():
    cells = [{**row, "judged_on": row["name"][:2], "original_perplexity": 20.0 + int(row["name"][1])} for row in sweep()["cells"][:5]]
    page = sweep_page(sweep(cells=cells, front=[row["name"] for row in cells]))
    fronts = [trace for trace in page.figures[0].plot["data"] if trace["name"] == "Pareto front"]
    assert sorted(len(trace["x"]) for trace in fronts) == [1, 2, 2] and sum(trace["showlegend"] for trace in fronts) == 1
    assert len([trace for trace in page.figures[1].plot["data"] if trace["name"] == "original"]) == 3


def test_the_unit_of_the_axis_fits_the_largest():
    def unit(size):
        points = [figures.Point("a", size, 1.0)]
        figure = figures.quality_against_size(points, key="k", title="t", label="l", front=[], chosen=None, originals=[], what="run")
        return figure.plot["data"][0]["x"], figure.plot["layout"]["xaxis"]["title"]["text"]

    assert unit(2_500_000_000) == ([2.5], "size (GB)") and unit(2_500_000) == ([2.5], "size (MB)")


def test_the_difference_of_two_runs_by_layer(blocks):
    other = run()["blocks"]
    other[0]["layers"][0]["relative_error"] = 0.004
    figure = layer_figures.difference(blocks_of(blocks), blocks_of(other))
    [trace] = figure.plot["data"]
    assert trace["z"][0] == [2.0, 0.0] and (trace["zmin"], trace["zmax"]) == (-2.0, 2.0) and "higher in 1 of them" in figure.description
    assert figure.table.rows[0][1] == "4.00 x"
    assert layer_figures.difference(blocks_of(blocks), []) is None
