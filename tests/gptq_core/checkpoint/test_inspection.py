from pathlib import Path

from tiny import quantize, save_model

from gptq_core import QuantizeConfig, inspect_checkpoint


def test_what_the_headers_say(tmp_path: Path):
    model = save_model("llama", tmp_path / "model")
    summary = quantize(model, tmp_path / "out", QuantizeConfig(bits=3, group_size=32, sym=False, format="gptq_v2"))
    found = inspect_checkpoint(tmp_path / "out")
    assert {key: found[key] for key in ("format", "bits", "group_size", "sym", "desc_act")} == {
        "format": "gptq_v2",
        "bits": 3,
        "group_size": 32,
        "sym": False,
        "desc_act": False,
    }
    assert len(found["layers"]) == summary["quantized_layers"] == 14
    down = next(layer for layer in found["layers"] if layer["name"].endswith("1.mlp.down_proj"))
    # 128 x 64 codes of 3 bits, 4 groups of 64 scales (2 bytes) and zeros (3 bits), 128 indices of 4 bytes
    assert down == {"name": down["name"], "in_features": 128, "out_features": 64, "groups": 4, "bits": 3, "bytes": 3072 + 512 + 96 + 512}
    assert found["bits_per_weight"] == summary["bits_per_weight"]
    assert {item["name"] for item in found["dense"]} >= {"model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"}
