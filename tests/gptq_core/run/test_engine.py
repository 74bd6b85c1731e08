"""The engine end to end on tiny models: files, refusals, resuming after kill -9."""

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, bytes_of, dense_twin, logits, quantize, save_model, windows
from torch.multiprocessing.reductions import StorageWeakRef

from gptq_core import Quantization, QuantizeConfig, load_quantized
from gptq_core.errors import CorruptCheckpointError, FactorizationError, InputError, OutputHeldError
from gptq_core.run import block_work, engine, identity

W4 = QuantizeConfig(bits=4, group_size=32)


@pytest.mark.grid
@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name not in ("gpt2", "mixtral")])
@pytest.mark.parametrize(
    "config",
    [QuantizeConfig(bits=4, group_size=32), QuantizeConfig(bits=3, group_size=-1, sym=False, format="gptq_v2", desc_act=True)],
    ids=["w4", "w3_asym_v2_desc_act"],
)
def test_load_quantized_gives_the_logits_of_the_dequantized_weights(architecture, config, tmp_path):
    model = save_model(architecture, tmp_path / "model")
    quantize(model, tmp_path / "out", config)
    quantized = load_quantized(tmp_path / "out")
    twin = dense_twin(model, quantized)
    torch.testing.assert_close(logits(quantized, windows().tokens), logits(twin, windows().tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.grid
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("fields", [{}, {"sym": False}, {"desc_act": True}, {"static_groups": True}, {"act_group_aware": False}], ids=str)
@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_files_say_what_the_walk_computed(bits, fields, format, tmp_path):
    """The last block's output during the walk equals that of the packed files, for every layout."""
    model = save_model("llama", tmp_path / "model")
    result = quantize(model, tmp_path / "out", QuantizeConfig(bits=bits, group_size=16, format=format, **fields))
    quantized = load_quantized(tmp_path / "out")
    seen = []
    quantized.model.layers[-1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    logits(quantized, windows().tokens)
    torch.testing.assert_close(result["hidden"], seen[0], rtol=1e-5, atol=1e-6)


def test_the_folder(tmp_path):
    model = save_model("qwen2_tied_with_bias", tmp_path / "model")
    (model / "tokenizer_config.json").write_text("{}")
    summary = quantize(model, tmp_path / "out", W4)
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    quantization = json.loads((out / "quantize_config.json").read_text())
    assert config.pop("quantization_config") == quantization
    assert config == json.loads((model / "config.json").read_text())
    expected = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "format": "gptq",
        "checkpoint_format": "gptq",
    }
    assert expected.items() <= quantization.items()
    assert "dataset" not in quantization
    assert "modules_in_block_to_quantize" not in quantization
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {}
    for shard in set(index["weight_map"].values()):
        with safe_open(out / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            held |= {name: shard for name in file.keys()}
    assert held == index["weight_map"]
    tensors = {name: load_file(out / shard)[name] for name, shard in held.items()}
    stem = "model.layers.1.mlp.down_proj"
    assert f"{stem}.weight" not in tensors
    packed = {leaf: tensors[f"{stem}.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx")}
    assert {leaf: (tensor.dtype, tuple(tensor.shape)) for leaf, tensor in packed.items()} == {
        "qweight": (torch.int32, (16, 64)),
        "qzeros": (torch.int32, (4, 8)),
        "scales": (torch.float16, (4, 64)),
        "g_idx": (torch.int32, (128,)),
    }
    assert tensors["model.layers.0.self_attn.q_proj.bias"].dtype == torch.float16
    assert tensors[f"{stem}.g_idx"].tolist() == [k // 32 for k in range(128)]
    original = load_file(model / "model.safetensors")
    assert torch.equal(tensors["model.norm.weight"], original["model.norm.weight"])
    assert "lm_head.weight" not in tensors  # tied
    assert (out / "tokenizer_config.json").read_text() == "{}"
    assert (out / "model-00001-of-00003.safetensors").stat().st_mode & 0o777 == 0o644
    assert summary["bytes"] == sum((out / shard).stat().st_size for shard in set(held.values()))
    assert str(tmp_path) not in "".join(p.read_text() for p in out.iterdir() if p.suffix != ".safetensors")
    assert not (tmp_path / "out.partial").exists()


def test_reported_loss_is_measured_on_what_is_written(tmp_path):
    """relative_error against an independent computation from the layer's real inputs."""
    model = save_model("llama", tmp_path / "model")
    with Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu") as run:
        record = run.quantize_block(0)
        run.quantize_block(1)
        run.assemble()
    layer = next(item for item in record["layers"] if item["name"].endswith("0.self_attn.q_proj"))
    quantized = load_quantized(tmp_path / "out")
    twin = dense_twin(model, quantized)
    inputs = []
    twin.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    logits(twin, windows().tokens)
    x = inputs[0].flatten(0, 1).double()
    damped = x.T @ x / x.shape[0]
    damped += 0.1 * damped.diagonal().mean() * torch.eye(64)
    original = load_file(model / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].double()
    error = original - quantized.model.layers[0].self_attn.q_proj.weight_in(torch.float64)
    loss = float(((error @ damped) * error).sum())
    assert layer["loss"] == pytest.approx(loss, rel=1e-3)
    assert layer["relative_error"] == pytest.approx(loss / float(((original @ damped) * original).sum()), rel=1e-3)
    assert layer["tokens"] == windows().tokens.numel()


# -- durable work ---------------------------------------------------------------------------------------------------------

KILLED = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from tiny import windows
    from gptq_core import Quantization, QuantizeConfig
    from gptq_core.run import block_work, engine
    from gptq_core.checkpoint import writer
    model, out, block, moment = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    run = Quantization.open(str(model), QuantizeConfig(bits=4, group_size=32), windows(), out, device="cpu")
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    if moment == "before the rename":
        rename = os.rename
        writer.os.rename = lambda a, b: die() if f"model-{block + 1:05d}" in str(b) else rename(a, b)
    elif moment == "before the manifest line":
        append = run.output._append
        run.output._append = lambda record: die() if record.get("block") == block else append(record)
    else:
        solve = block_work.solve_group
        block_work.solve_group = lambda members, *rest: die() if f".{block}." in members[0].name else solve(members, *rest)
    for index in range(run.block_count):
        run.quantize_block(index)
    run.assemble()
""")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in the sweep", "before the rename", "before the manifest line"])
@pytest.mark.parametrize("block", [0, 1])
def test_kill_and_resume_gives_the_same_bytes(block, moment, tmp_path):
    model = save_model("qwen2_tied_with_bias", tmp_path / "model")
    quantize(model, tmp_path / "whole" / "out", W4)
    out = tmp_path / "killed" / "out"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.run([sys.executable, "-c", KILLED, model, out, str(block), moment], env=env, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not out.exists()
    with Quantization.open(str(model), W4, windows(), out, device="cpu") as run:
        resumed = [run.quantize_block(index)["resumed"] for index in range(2)]
        run.assemble()
    assert resumed == [block > 0, False]
    assert bytes_of(out) == bytes_of(tmp_path / "whole" / "out")


@pytest.mark.grid
@pytest.mark.parametrize("harm", ["flip a bit", "delete"])
@pytest.mark.parametrize("damaged", [0, 2, 3])
def test_a_damaged_block_file_is_done_again_on_its_own_inputs(damaged, harm, tmp_path):
    model = save_model("llama", tmp_path / "model", num_hidden_layers=4)
    quantize(model, tmp_path / "whole" / "out", W4)
    out = tmp_path / "damaged" / "out"
    with Quantization.open(str(model), W4, windows(), out, device="cpu") as run:
        for index in range(4):
            run.quantize_block(index)
    shard = tmp_path / "damaged" / "out.partial" / f"model-{damaged + 1:05d}-of-00005.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data) if harm == "flip a bit" else shard.unlink()
    with Quantization.open(str(model), W4, windows(), out, device="cpu") as run:
        assert [run.quantize_block(index)["resumed"] for index in range(4)] == [index != damaged for index in range(4)]
        run.assemble()
    assert bytes_of(out) == bytes_of(tmp_path / "whole" / "out")


@pytest.mark.slow
def test_memory_does_not_grow_with_depth(tmp_path):
    """After every block only the activations and the model's small parts are alive: all parameters are back on meta."""
    model = save_model("llama", tmp_path / "model", num_hidden_layers=5)
    live = []
    with Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu") as run:
        for index in range(5):
            run.quantize_block(index)
            assert all(p.is_meta for p in run.stream.decoder.model.parameters())
            gc.collect()
            live.append(sum(t.nbytes for t in gc.get_objects() if isinstance(t, torch.Tensor) and not t.is_meta))
    # the last block has no next one to prefetch
    assert max(live[1:4]) - min(live[1:4]) < 4096
    assert live[4] <= live[3]


def test_the_next_block_is_told_to_the_reader_on_a_cpu(tmp_path, monkeypatch):
    model = save_model("llama", tmp_path / "model", num_hidden_layers=3)
    expected = []
    monkeypatch.setattr("gptq_core.checkpoint.reader.Checkpoint.expect", lambda self, names: expected.append(sorted(names)))
    quantize(model, tmp_path / "out", W4)
    names = sorted(load_file(model / "model.safetensors"))
    assert expected == [[name for name in names if name.startswith(f"model.layers.{index}.")] for index in (1, 2)]


def test_a_weight_leaves_when_it_is_solved(tmp_path, monkeypatch):
    """Not with its block: the tensor that was read is gone when the next input group comes."""
    model = save_model("llama", tmp_path / "model")
    read, alive = {}, []
    with Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu") as run:
        run.capture()
        read_block, solve = run.stream.read_block, block_work.solve_group

        def reading(index):
            found = read_block(index)
            read.update({name: StorageWeakRef(tensor.untyped_storage()) for name, tensor in found.items()})
            return found

        def solving(members, *rest):
            alive.append({name.split(".")[-2] for name, storage in read.items() if name.endswith("proj.weight") and not storage.expired()})
            return solve(members, *rest)

        monkeypatch.setattr(run.stream, "read_block", reading)
        monkeypatch.setattr(block_work, "solve_group", solving)
        run.quantize_block(0)
    mlp = {"gate_proj", "up_proj", "down_proj"}
    assert alive == [{"q_proj", "k_proj", "v_proj", "o_proj"} | mlp, {"o_proj"} | mlp, mlp, {"down_proj"}]


@pytest.mark.parametrize(("inputs", "times"), [(block_work.LARGE_GROUP, 0), (128, 2)])
def test_free_pages_are_given_back_before_large_groups(inputs, times, tmp_path, monkeypatch):
    """Of the tiny model's groups one in each of its two blocks, down_proj's, has 128 inputs, and none has more."""
    given = []
    monkeypatch.setattr(block_work, "LARGE_GROUP", inputs)
    monkeypatch.setattr(block_work.heap, "give_back", lambda: given.append(True))
    monkeypatch.setattr(block_work.heap, "let_go", lambda: None)  # which gives them back at the end
    quantize(save_model("llama", tmp_path / "model"), tmp_path / "out", W4)
    assert len(given) == times


def test_a_block_asked_for_again_is_answered_from_disk(tmp_path):
    model = save_model("llama", tmp_path / "model", num_hidden_layers=3)
    quantize(model, tmp_path / "whole" / "out", W4)
    with Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu") as run:
        assert [run.quantize_block(index)["resumed"] for index in (0, 1, 0, 2)] == [False, False, True, False]
        run.assemble()
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole" / "out")


def test_a_failure_inside_a_block_can_be_retried(tmp_path, monkeypatch):
    model = save_model("llama", tmp_path / "model")
    quantize(model, tmp_path / "whole" / "out", W4)
    with Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu") as run:
        run.quantize_block(0)
        monkeypatch.setattr(block_work, "solve_group", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(OSError, match="the disk is full"):
            run.quantize_block(1)
        monkeypatch.undo()
        assert run.quantize_block(1)["resumed"] is False
        run.assemble()
    whole, retried = bytes_of(tmp_path / "whole" / "out"), bytes_of(tmp_path / "out")
    assert whole == retried


@pytest.mark.slow
def test_blocks_that_are_written_beside_the_next_one_are_the_same_and_a_failure_is_made_good(tmp_path, monkeypatch):
    """The way of a GPU: what goes wrong in writing is told by a later call, and doing that again also writes the block."""
    model = save_model("llama", tmp_path / "model")
    quantize(model, tmp_path / "whole" / "out", W4)
    for failing in (None, 0, 1):
        out = tmp_path / str(failing) / "out"
        with Quantization.open(str(model), W4, windows(), out, device="cpu") as run:
            run._writes_beside = True
            write, failures = run.output.write_shard, [] if failing is None else [OSError("the disk is full")]

            def once(file, tensors, record, write=write, failures=failures, failing=failing):
                if record.get("block") == failing and failures:
                    raise failures.pop()
                return write(file, tensors, record)

            monkeypatch.setattr(run.output, "write_shard", once)
            raised = 0
            for work in (*(lambda i=i: run.quantize_block(i) for i in range(run.block_count)), run.assemble):
                try:
                    work()
                except OSError:
                    raised += 1
                    work()
            assert raised == (failing is not None)
            assert run.stage_seconds["write"] > 0
        assert bytes_of(out) == bytes_of(tmp_path / "whole" / "out")


def test_unchanged_work_is_not_done_twice_and_other_work_is_not_overwritten(tmp_path):
    model = save_model("llama", tmp_path / "model")
    summary = quantize(model, tmp_path / "out", W4)
    del summary["hidden"]
    with Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu") as run:
        assert run.finished
        assert run.assemble() == summary
    other = QuantizeConfig(bits=3, group_size=32)
    with pytest.raises(InputError, match="bits 4 there, 3 asked for"):
        Quantization.open(str(model), other, windows(), tmp_path / "out", device="cpu")
    with pytest.raises(InputError, match="another calibration text"):
        Quantization.open(str(model), W4, windows(seed=5), tmp_path / "out", device="cpu")
    with Quantization.open(str(model), other, windows(), tmp_path / "out", device="cpu", overwrite=True) as run:
        run.quantize_block(0)
        assert load_quantized(tmp_path / "out").model.layers[0].mlp.up_proj.bits == 4  # the old one stands until the new is whole
        run.quantize_block(1)
        run.assemble()
    assert load_quantized(tmp_path / "out").model.layers[0].mlp.up_proj.bits == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "out.lock"]


def test_unfinished_work_of_another_config_is_not_thrown_away(tmp_path):
    model = save_model("llama", tmp_path / "model")
    with Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu") as run:
        run.quantize_block(0)
    with pytest.raises(InputError, match=r"1 finished blocks of another run \(bits 4 there, 2 asked for\)"):
        Quantization.open(str(model), QuantizeConfig(bits=2, group_size=32), windows(), tmp_path / "out", device="cpu")
    with Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu") as run:
        assert run.quantize_block(0)["resumed"]


def test_a_finished_folder_with_a_missing_file_is_noticed(tmp_path):
    model = save_model("llama", tmp_path / "model")
    quantize(model, tmp_path / "out", W4)
    (tmp_path / "out" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CorruptCheckpointError, match="model-00002-of-00003"):
        Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu")


def test_the_output_is_held(tmp_path):
    model = save_model("llama", tmp_path / "model")
    with (
        Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu"),
        pytest.raises(OutputHeldError, match=str(os.getpid())),
    ):
        Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu")


# -- refusals -------------------------------------------------------------------------------------------------------------


def test_group_size_that_does_not_divide(tmp_path):
    model = save_model("llama", tmp_path / "model")
    with pytest.raises(
        InputError, match=r"model\.layers\.0\.self_attn\.q_proj: group_size 128 does not divide in 64.*16, 32, 64 or -1.*strict"
    ):
        Quantization.open(str(model), QuantizeConfig(bits=4), windows(), tmp_path / "out", device="cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_not_strict_leaves_what_cannot_be_packed_and_says_so(tmp_path):
    model = save_model("llama", tmp_path / "model")
    config = QuantizeConfig(bits=4, group_size=128, strict=False)
    summary = quantize(model, tmp_path / "out", config)
    assert summary["quantized_layers"] == 2
    assert {"name": "model.layers.0.mlp.up_proj", "reason": "group_size 128 does not divide in 64"} in summary["skipped"]
    quantized = load_quantized(tmp_path / "out")
    assert isinstance(quantized.model.layers[0].mlp.up_proj, torch.nn.Linear)
    torch.testing.assert_close(logits(quantized, windows().tokens), logits(dense_twin(model, quantized), windows().tokens))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_in_block_to_quantize"] == [
        ["mlp.down_proj"]
    ]


def test_pickle_weights_missing_tensors_and_quantized_sources(tmp_path):
    model = save_model("llama", tmp_path / "model")
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu")
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight": gone[:32].contiguous()}, weights, {"format": "pt"})
    with pytest.raises(InputError, match=r"shape \(32, 64\) on disk, \(128, 64\) by config.json"):
        Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu")
    save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"} | {"model.layers.1.mlp.up_proj.weight": gone}, weights)
    with pytest.raises(InputError, match=r"1 tensors of the model are missing, the first is 'lm_head\.weight'"):
        Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu")
    weights.rename(model / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu")
    other = save_model("llama", tmp_path / "other")
    quantize(other, tmp_path / "quantized", W4)
    with pytest.raises(InputError, match="already quantized"):
        Quantization.open(str(tmp_path / "quantized"), W4, windows(), tmp_path / "out2", device="cpu")


@pytest.mark.parametrize("on_failure", ["error", "round"])
def test_a_layer_without_a_usable_hessian(on_failure, tmp_path):
    model = save_model("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()  # nothing reaches down_proj: its Hessian is zero
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config = QuantizeConfig(bits=4, group_size=32, on_failure=on_failure)
    if on_failure == "error":
        with pytest.raises(FactorizationError, match=r"model\.layers\.1\.mlp\.down_proj"):
            quantize(model, tmp_path / "out", config)
    else:
        assert quantize(model, tmp_path / "out", config)["fallback_layers"] == ["model.layers.1.mlp.down_proj"]


def test_names_without_the_base_prefix_are_found(tmp_path):
    """Some checkpoints (BLOOM's own) store the tensors of the base model."""
    model = save_model("bloom", tmp_path / "model")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    quantize(model, tmp_path / "out", W4)
    quantized = load_quantized(tmp_path / "out")
    torch.testing.assert_close(
        logits(quantized, windows().tokens), logits(dense_twin(model, quantized), windows().tokens), rtol=1e-4, atol=1e-4
    )


def test_tied_by_config_but_two_tensors_on_disk(tmp_path):
    model = save_model("qwen2_tied_with_bias", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, model / "model.safetensors", {"format": "pt"})
    quantize(model, tmp_path / "out", W4)  # stored twice but equal: fine
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="ties lm_head.weight to model.embed_tokens.weight"):
        Quantization.open(str(model), W4, windows(), tmp_path / "out2", device="cpu")


def test_the_same_tokens_by_another_name_are_the_same_work(tmp_path):
    model = save_model("llama", tmp_path / "model")
    quantize(model, tmp_path / "out", W4)
    renamed = dataclasses.replace(windows(), source="another name")
    with Quantization.open(str(model), W4, renamed, tmp_path / "out", device="cpu") as run:
        assert run.finished


def test_other_code_is_other_work(tmp_path, monkeypatch):
    model = save_model("llama", tmp_path / "model")
    quantize(model, tmp_path / "out", W4)
    monkeypatch.setattr("gptq_core.run.identity.code_sha256", lambda: "changed")
    with pytest.raises(InputError, match=r"code_sha256 [0-9a-f]{8} there, changed now"):
        Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu")


def test_the_loops_in_c_are_code_too(monkeypatch):
    digested = []

    def digest(path):
        digested.append(path.relative_to(Path(engine.__file__).parents[1]).as_posix())
        return ""

    monkeypatch.setattr(identity, "file_sha256", digest)
    identity.code_sha256.cache_clear()
    identity.code_sha256()
    identity.code_sha256.cache_clear()
    assert {"run/engine.py", "kernels/loops.c", "kernels/products.c", "checkpoint/packing.py"} <= set(digested)


def test_other_kernels_are_other_work(tmp_path, monkeypatch):
    """They sum up in another order."""
    model = save_model("llama", tmp_path / "model")
    monkeypatch.setattr(identity.dispatch, "implementation", lambda device, dtype: "c")
    quantize(model, tmp_path / "out", W4)
    monkeypatch.setattr(identity.dispatch, "implementation", lambda device, dtype: "torch")
    with pytest.raises(InputError, match="kernels c there, torch now"):
        Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu")


def test_ids_beyond_the_vocabulary(tmp_path):
    tokens = dataclasses.replace(windows(), tokens=windows().tokens + 5)
    with pytest.raises(InputError, match="the model's vocabulary ends at 95"):
        Quantization.open(str(save_model("llama", tmp_path / "model")), W4, tokens, tmp_path / "out", device="cpu")


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors.index.json", "output"])
def test_broken_folders_get_one_line(broken, tmp_path):
    model = save_model("llama", tmp_path / "model")
    if broken == "output":
        (tmp_path / "out").write_text("a file")
    elif broken == "config.json":
        (model / broken).write_text((model / broken).read_text().replace('"hidden_size": 64', '"hidden_size": "abc"'))
    else:
        (model / broken).write_text("{}")
    with pytest.raises(InputError, match="out is a file" if broken == "output" else broken):
        Quantization.open(str(model), W4, windows(), tmp_path / "out", device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_in_a_model_folder_is_never_run(part, tmp_path):
    """Not even when somebody, or a pipe, answers yes to the question that transformers would ask."""
    model = save_model("llama", tmp_path / "model")
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    if part == "model":
        config = json.loads((model / "config.json").read_text())
        auto = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
        (model / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of", "auto_map": auto}))
        call = "from gptq_core.model.architecture import load_config; load_config(Path(sys.argv[1]))"
    else:
        auto = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
        (model / "tokenizer_config.json").write_text(json.dumps(auto))
        call = "from gptq_core.data.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1])"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    program = f"import sys; from pathlib import Path; {call}"
    process = subprocess.run([sys.executable, "-c", program, model], env=env, input="y\n" * 9, capture_output=True, text=True)
    assert "InputError" in process.stderr
    assert not (tmp_path / "ran").exists()
