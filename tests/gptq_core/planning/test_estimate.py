"""What a plan foretells, held against what runs take."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import quantize, save_model, windows

from gptq_core import Quantization, QuantizeConfig
from gptq_core.errors import InputError
from gptq_core.method import solver
from gptq_core.method.hessian import Hessian
from gptq_core.model.architecture import own_dtype
from gptq_core.planning import estimate, plan, rates
from gptq_core.planning.estimate import Texts
from gptq_core.planning.rates import Rates

W4 = {"bits": 4, "group_size": 32}
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def estimated(model, windows=64, seqlen=32, process_bytes=0, rates=False, device="cpu", **fields):
    config = QuantizeConfig(**W4 | fields)
    found = plan.plan(str(model), config)
    texts = Texts(windows, seqlen, seqlen, 4)
    return estimate.estimate(found, config, texts, device=device, process_bytes=process_bytes, rates=rates)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("model"), hidden_size=128)


@pytest.fixture(scope="module")
def giant(tmp_path_factory):
    """A folder with nothing but the config.json of Llama-3-70B's shape."""
    folder = tmp_path_factory.mktemp("giant")
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    return folder


# -- size -----------------------------------------------------------------------------------------------------------------


@pytest.mark.grid
@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("llama", {}),
        ("llama", {"bits": 2, "group_size": -1, "lm_head": True}),
        ("llama", {"bits": 3, "dynamic": {".*down": {"bits": 8}, r"-:model\.layers\.0\.self_attn": {}}}),
        ("qwen2_tied_with_bias", {}),
        ("opt", {}),
        ("gemma3", {"group_size": 16}),
    ],
    ids=str,
)
def test_the_size_is_that_of_the_files(architecture, fields, tmp_path):
    model, config = save_model(architecture, tmp_path / "model"), QuantizeConfig(**W4 | fields)
    found = plan.plan(str(model), config)
    made = quantize(model, tmp_path / "out", config)
    assert found.bytes == pytest.approx(made["bytes"], rel=0.002)  # where a header's padding falls is not foretold
    folder = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert found.bytes + found.other_bytes == pytest.approx(folder, rel=0.1)  # of so small a model reports are most of the folder


def test_a_config_alone_gives_the_plan_that_its_weights_would(llama, tmp_path):
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    config = QuantizeConfig(**W4)
    whole, alone = plan.plan(str(llama), config), plan.plan(str(tmp_path), config)
    assert (alone.bytes, alone.bits_per_weight, alone.verdicts) == (whole.bytes, whole.bits_per_weight, whole.verdicts)
    assert alone.original_bytes == pytest.approx(whole.original_bytes, rel=0.01)
    assert whole.notes == () and "config.json only" in alone.notes[0]


def test_a_folder_of_pickles_is_no_config_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pickle"):
        plan.plan(str(tmp_path), QuantizeConfig(**W4))


def test_the_shape_of_llama_3_70b(giant):
    config = QuantizeConfig(bits=4, recipe="best")
    found = plan.plan(str(giant), config)
    assert len(found.selection.layers) == 560 and found.original_bytes == pytest.approx(141.1e9, rel=0.001)
    assert found.bytes == pytest.approx(39.8e9, rel=0.01)
    costs = estimate.estimate(found, config, Texts(128, 2048, 2048, 10), process_bytes=0)
    # two models of 70.55e9 weights, judged in float32, two streams of hidden states, and logits
    streams = 2 * 128 * 2048 * 8192 * (2 if costs.dtype == "bfloat16" else 4)
    assert costs.blocks == 80 and costs.stage_bytes["evaluation"] == pytest.approx(2 * 70.55e9 * 4 + streams, rel=0.02)


def test_a_run_still_needs_weights(giant, tmp_path):
    with pytest.raises(InputError, match="no \\*.safetensors"):
        Quantization.open(str(giant), QuantizeConfig(bits=4), windows(), tmp_path / "out")


# -- memory ---------------------------------------------------------------------------------------------------------------

REAL = """
import resource, sys
from pathlib import Path
import torch
from gptq_core import Quantization, QuantizeConfig, Windows, evaluate_pair
from gptq_core.planning.estimate import Texts, estimate
from gptq_core.planning.plan import plan

model, out, recipe, windows, seqlen = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
first = sys.argv[6]

def quantize(model, out, tokens):
    with Quantization.open(model, config, Windows(tokens, "random", len(tokens)), out, device="cpu") as run:
        for index in range(run.block_count):
            run.quantize_block(index)
        run.assemble()

torch.set_num_threads(1)
config = QuantizeConfig(bits=4, group_size=32, recipe=recipe)
tokens = torch.randint(0, 90, (windows, seqlen), generator=torch.Generator().manual_seed(0))
import transformers.models.llama.modeling_llama
if first:
    quantize(first, out.with_name("first"), tokens[:1, :32])
resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
costs = estimate(plan(model, config), config, Texts(windows, seqlen, seqlen, 8), device="cpu", process_bytes=resident)
foretold = resident + costs.mapped_bytes + costs.stage_bytes["walk"] if first else costs.host_bytes
quantize(model, out, tokens)
if not first:
    evaluate_pair(model, str(out), Windows(tokens[:8], "random", 8), device="cpu")
# not getrusage: its peak begins with that of the process which forked this one
[peak] = [int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(foretold, peak, resident)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("changes", "recipe", "windows"),
    [
        ({"hidden_size": 256, "intermediate_size": 512}, "tuned", 160),  # activations
        ({"hidden_size": 128, "intermediate_size": 384}, "best", 160),  # two streams
        ({"hidden_size": 768, "intermediate_size": 1536, "vocab_size": 8192}, "tuned", 8),  # Hessians, and both models
        ({"hidden_size": 256, "intermediate_size": 1024, "dtype": torch.bfloat16}, "tuned", 256),  # in bfloat16 where auto says so
    ],
    ids=["activations", "two streams", "weights", "bfloat16"],
)
def test_the_peak_is_that_of_a_run(changes, recipe, windows, tmp_path):
    foretold, real, resident = foretold_and_real(tmp_path, changes, recipe, windows)
    assert real > 1.3 * resident, "the run is too small to tell"
    assert foretold == pytest.approx(real, rel=0.2)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux's /proc")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_the_peak_of_a_solve(stored, tmp_path):
    """Of inputs whose Hessian is large beside all else: held against what the run adds to a process that has made another one."""
    changes = {"hidden_size": 128, "intermediate_size": 3072, "num_hidden_layers": 1, "dtype": stored}
    first = save_model("llama", tmp_path / "small", dtype=stored)
    foretold, real, resident = foretold_and_real(tmp_path, changes, "tuned", 2, first)
    assert foretold - resident == pytest.approx(real - resident, rel=0.2)  # a square more or less is 0.3


def foretold_and_real(tmp_path, changes, recipe, windows, first=""):
    """Highest bytes by the estimate and of a run in a process of its own, and what the process held before.

    first: a model that is quantized before that, so that what is loaded or built once does not count; then nothing is evaluated.
    """
    model = save_model("llama", tmp_path / "model", max_position_embeddings=256, **changes)
    done = subprocess.run(
        [sys.executable, "-c", REAL, model, tmp_path / "out", recipe, str(windows), "256", first],
        capture_output=True,
        text=True,
        check=True,
    )
    return map(int, done.stdout.split())


@pytest.mark.slow
def test_what_makes_memory_grow(llama):
    def stage(name, **changes):
        return estimated(llama, **changes).stage_bytes[name]

    base = stage("walk")
    assert stage("walk", windows=128) > 1.5 * base
    assert stage("walk", recipe="best") > 1.5 * base
    assert stage("walk", windows=2048, true_sequential=False) < stage("walk", windows=2048)  # one batch at a time on its way
    assert "tuning" not in estimated(llama).stage_bytes and stage("tuning", recipe="max") > 0
    assert stage("head", lm_head=True) > 0
    assert stage("allocation", allocate={"bits": [3, 4], "budget_bpw": 3.5}) > base
    assert stage("evaluation", windows=64) - stage("evaluation", windows=32) == 32 * 32 * 128 * 4  # the engine's hidden states


def test_a_config_that_names_no_dtype_is_float32(llama, tmp_path):
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    fields = json.loads((model / "config.json").read_text())
    assert fields.pop("dtype") == "float32"
    (model / "config.json").write_text(json.dumps(fields))
    config = QuantizeConfig(**W4)
    named, unnamed = (plan.plan(str(path), config) for path in (llama, model))
    assert own_dtype(unnamed.model.config) is None
    took = [
        estimate.estimate(found, config, Texts(4, 32, 32, 4), device="cpu", dtype="float32", process_bytes=0) for found in (named, unnamed)
    ]
    assert dataclasses.replace(took[0], write_bytes=0) == dataclasses.replace(took[1], write_bytes=0)  # config.json is shorter


def test_a_gpu_that_is_not_here(llama):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    found = estimated(llama, device="cuda", rates=True)
    assert found.device_bytes > max(found.stage_bytes.values()) and found.seconds == {} and found.dtype == "float32"  # as it is stored
    assert estimated(llama).device_bytes == 0


# -- seconds --------------------------------------------------------------------------------------------------------------

UNIT = Rates(product=1e9, exact=5e8, elementwise=1e30, digest=1e6, column=0.0, weight=0.0)


def test_seconds_are_operations_over_rates(llama, monkeypatch):
    monkeypatch.setattr(estimate, "measure", lambda *_: UNIT)
    once, twice = estimated(llama, rates=True).seconds, estimated(llama, windows=128, rates=True).seconds
    assert all(twice[stage] == pytest.approx(2 * once[stage]) for stage in ("forward", "hessian"))
    assert all(twice[stage] == once[stage] for stage in ("factor", "solve", "pack", "write"))
    assert once["read"] == pytest.approx((llama / "model.safetensors").stat().st_size / 1e6)
    # 2 blocks of q, o (128 × 64), k, v (128 × 32), gate, up, down (128 × 128) and two norms; attention on half of 32 tokens
    weights = 2 * (2 * 128 * 64 + 2 * 128 * 32 + 3 * 128 * 128 + 2 * 128)
    forward = 64 * 32 * (2 * weights + 2 * 32 * 128 * 2)
    hessians = 2 * 2 * 64 * 32 * (3 * 128 * 128 + 64 * 64)
    assert once["forward"] == pytest.approx(forward / 1e9) and once["hessian"] == pytest.approx(hessians / 5e8)
    shifted = estimated(llama, recipe="best", rates=True).seconds
    assert shifted["forward"] == pytest.approx(2 * once["forward"]) and shifted["hessian"] == once["hessian"]
    assert shifted["shift"] > once["hessian"] and "shift" not in once
    head = estimated(llama, lm_head=True, rates=True).seconds  # its inputs are the hidden states
    assert head["hessian"] == pytest.approx((hessians + 2 * 64 * 32 * 128 * 128) / 5e8)


def test_solving_grows_with_the_squares_of_the_columns_beyond_the_probe(llama):
    """The measured rates hold for a few columns; the sweep, its slope and the passes of the descent make so many tall products."""

    def products(**fields):
        config = QuantizeConfig(**W4 | fields)
        costs = estimate._Costs(plan.plan(str(llama), config), config, Texts(1, 32, 32, 1), torch.device("cpu"), torch.float32)
        columns = rates.PROBED + 1000
        return costs._solve(columns, 10, UNIT) * UNIT.product / (columns * 10 * 1000)

    counted = [products(recipe="classic", descent=passes) for passes in (0, 1, 2)]
    assert [*counted, products()] == pytest.approx([1, 3, 5, 3])  # what is not said is tuned, with one pass


def test_rows_are_shared_by_as_many_threads_as_solve_them(llama, monkeypatch):
    config = QuantizeConfig(**W4)
    costs = estimate._Costs(plan.plan(str(llama), config), config, Texts(1, 32, 32, 1), torch.device("cpu"), torch.float32)
    weighted = dataclasses.replace(UNIT, weight=1.0)
    spent = {}
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        spent[threads] = [costs._solve(rates.PROBED, rows, weighted) for rows in (solver.FEWEST_ROWS - 1, 2 * solver.FEWEST_ROWS, 1 << 20)]
    assert [one / four for one, four in zip(spent[1], spent[4], strict=True)] == pytest.approx([1, 2, 4])


def test_a_forward_in_bfloat16(llama, monkeypatch):
    """Half the hidden states, forwards at that dtype's rate, Hessians at it too, or else in float32; judged in float32."""
    monkeypatch.setattr(estimate, "measure", lambda *_: dataclasses.replace(UNIT, product=4 * UNIT.exact))
    monkeypatch.setattr("gptq_core.kernels.dispatch.compiles_products", lambda: compiles)
    compiles = True

    def costs(dtype):
        config = QuantizeConfig(**W4)
        return estimate.estimate(
            plan.plan(str(llama), config), config, Texts(64, 32, 32, 4), device="cpu", dtype=dtype, process_bytes=0, rates=True
        )

    exact, fast = costs("float32"), costs("bfloat16")
    assert (exact.dtype, fast.dtype) == ("float32", "bfloat16")
    assert fast.stage_bytes["capture"] < 0.6 * exact.stage_bytes["capture"] and fast.stage_bytes["walk"] < exact.stage_bytes["walk"]
    models = 2 * (llama / "model.safetensors").stat().st_size
    assert fast.stage_bytes["evaluation"] > models and fast.seconds["hessian"] == pytest.approx(exact.seconds["hessian"] / 4)
    compiles = False
    assert costs("bfloat16").seconds["hessian"] == exact.seconds["hessian"]


def costs_of(llama, dtype=torch.float32, **fields):
    config = QuantizeConfig(**W4 | fields)
    return estimate._Costs(plan.plan(str(llama), config), config, Texts(64, 32, 32, 1), torch.device("cpu"), dtype)


def test_rows_that_are_solved_at_once(llama, monkeypatch):
    """Beyond a chunk for each thread, rows take what outlives their chunk alone."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    costs = costs_of(llama, recipe="tuned")
    one, two, three, four = (costs._solving(512, chunks * costs.chunk) for chunks in (1, 2, 3, 4))
    assert two - one > 4 * (four - three) and four - three == (4 + 2) * 512 * costs.chunk


@pytest.mark.parametrize(
    ("dtype", "fields", "prepared", "swept"),
    [
        (torch.float32, {"recipe": "classic"}, 2, 2),  # H and L, which is the operand
        (torch.float32, {}, 2, 2),  # H descends as it is
        (torch.float32, {"desc_act": True}, 4, 3),  # beside it in another order, and while that is made once more
        (torch.bfloat16, {"recipe": "classic"}, 2.5, 1.5),  # L in half the bytes, and then alone
        (torch.bfloat16, {}, 3, 2),  # and H so too
        (torch.bfloat16, {"desc_act": True}, 4, 3),
    ],
    ids=str,
)
def test_squares_that_are_held_at_once(dtype, fields, prepared, swept, llama, monkeypatch):
    """In float32's bytes: while one row's operands are made, and while it is solved, if rows took the most."""
    costs, n = costs_of(llama, dtype, **fields), 2**20
    square = 4 * n * n
    assert costs._solving(n, 1) == pytest.approx(prepared * square, rel=0.01)
    assert costs._solving(n, 1, residual=128) == pytest.approx(6 * square, rel=0.01)  # ΔC twice, H, damped, its factor, a copy
    monkeypatch.setattr(costs, "_rows_in_flight", lambda *_: 100 * square)
    assert costs._solving(n, 1) == pytest.approx((100 + swept) * square, rel=0.001)


@pytest.mark.parametrize(
    ("dtype", "fields", "descends", "bytes_each"),
    [
        (torch.float32, {"recipe": "classic"}, False, 4 + 4),  # target, δ
        (torch.float32, {"recipe": "classic", "static_groups": True}, False, 4 + 4 + 4),  # all groups at once
        (torch.float32, {"static_groups": False}, True, 4 + 4 + 4),  # errors, to descend from
        (torch.bfloat16, {"recipe": "classic"}, False, 4 + 2 + 2),  # what is laid out anew for a product
        (torch.bfloat16, {"static_groups": False}, True, 4 + 2 + 2 + 2),
        (torch.float32, {"recipe": "max"}, True, 7 * 4 + 4),  # latents
    ],
    ids=str,
)
def test_what_a_weight_takes_while_its_row_is_solved(dtype, fields, descends, bytes_each, llama):
    """In a row so long that what a step makes of a few columns is next to nothing; a scale and a zero for 32 of them stay."""
    n, rows = 2**20, 10
    found = costs_of(llama, dtype, **fields)._rows_in_flight(n, rows, descends)
    assert found == pytest.approx((bytes_each + 8 / 32) * n * rows, rel=0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_take_the_most_when_weights_are_made_of_their_codes(dtype, llama):
    """H, the weights before and after, and the codes; not the factor any more."""
    n, rows = 512, 2**20
    assert costs_of(llama, dtype)._solving(n, rows) == 4 * n * n + (2 * dtype.itemsize + 1) * n * rows


def test_a_batch_that_is_cast_for_its_hessian(llama, monkeypatch):
    """2048 tokens at once, in float32 beside what they were; with targets shifted the difference too, in both."""
    monkeypatch.setattr("gptq_core.kernels.dispatch.compiles_products", lambda: compiles)
    costs, n, tokens = costs_of(llama, torch.bfloat16), 256, 2048
    square, found = 4 * n * n, {}
    for compiles in (True, False):
        found[compiles] = costs._solving(n, 1), costs._solving(n, 1, residual=128)
    assert found[False] == (square + 4 * tokens * n, 2 * square + 4 * 128 * n + (4 + 4 + 2) * tokens * n)
    assert found[True][0] < 4 * square + tokens * n  # the squares of what comes after
    assert costs_of(llama)._solving(n, 1) < 4 * square + tokens * n


def test_the_count_of_a_hessians_panels(monkeypatch, llama):
    """The share of the square that is computed, counted in the products that are made."""
    counted = []
    monkeypatch.setattr("gptq_core.method.hessian._accumulate", lambda products, lower: counted.extend(p[0].numel() for p in products))
    for n in (128, 512, 1024, 2816):
        counted.clear()
        Hessian(n, "cpu").add(torch.zeros(1, n))
        config = QuantizeConfig(**W4)
        costs = estimate._Costs(plan.plan(str(llama), config), config, Texts(1, 32, 32, 1), torch.device("cpu"), torch.float32)
        assert costs._hessian(n) == pytest.approx(2 * 32 * sum(counted), rel=0.01)


def test_rates_are_of_this_machine():
    found = rates.measure(QuantizeConfig(bits=4), torch.device("cpu"), torch.float32)
    assert found.product > 1e8 and found.elementwise > 1e7 and found.digest > 1e6 and found.column + found.weight > 0
