"""Every field of the schema acts: two configs that differ in it alone give results that differ, and both are right.

An entry names the two configs, what is found in the result of each, and what would be right, computed apart from the engine.
Since the two results must differ in every point, an engine that ignored the field would be wrong in every point.
"""

import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracles import textbook_gptq
from safetensors.torch import load_file, save_file
from tiny import dense_twin, logits, quantize, save_model, windows

from gptq_core import GPTQQuantizer, QuantizeConfig, QuantizedLinear, allocate, load_quantized
from gptq_core.checkpoint.packing import unpack, unpack_zeros
from gptq_core.errors import FactorizationError, InputError

pytestmark = pytest.mark.usefixtures("one_thread")

Q, ATTENDED, UP, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"))
COLUMNS = 64
PLAIN = {"recipe": "classic", "bits": 4, "group_size": 16, "act_group_aware": False}
STATIC = {**PLAIN, "static_groups": True}
SHIFTED = {**PLAIN, "bits": 3, "target_shift": 1.0, "shift_damp_percent": 0.05}


@dataclass
class Written:
    """A checkpoint, read back without the engine's loader."""

    model: Path
    out: Path
    summary: dict[str, Any]
    json: dict[str, Any] = field(init=False)
    tensors: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self):
        self.json = json.loads((self.out / "config.json").read_text())["quantization_config"]
        self.tensors = {name: tensor for shard in self.out.glob("*.safetensors") for name, tensor in load_file(shard).items()}

    def packed(self) -> list[str]:
        return sorted(name.removesuffix(".qweight") for name in self.tensors if name.endswith(".qweight"))

    def bits(self, name: str) -> int:
        return self.tensors[f"{name}.qzeros"].shape[1] * 32 // self.tensors[f"{name}.scales"].shape[1]

    def codes(self, name: str = Q) -> torch.Tensor:
        return unpack(self.tensors[f"{name}.qweight"], self.bits(name))

    def zeros(self, name: str = Q) -> torch.Tensor:
        return unpack_zeros(self.tensors[f"{name}.qzeros"], self.bits(name), self.json["format"])

    def scales(self, name: str = Q) -> torch.Tensor:
        return self.tensors[f"{name}.scales"]

    def layer(self, name: str) -> dict[str, Any]:
        records = [json.loads(line) for line in (self.out / "manifest.jsonl").read_text().splitlines()]
        return next(layer for record in records for layer in record.get("layers", []) if layer["name"] == name)


def write(config: QuantizeConfig, model: Path, out: Path) -> Written:
    return Written(model, out, quantize(model, out, config))


def write_from_many_windows(config: QuantizeConfig, model: Path, out: Path) -> Written:
    """Few windows would be learned by heart, and the tuning not kept."""
    return Written(model, out, quantize(model, out, config, windows(400)))


def write_with_chosen_widths(config: QuantizeConfig, model: Path, out: Path) -> Written:
    return write(allocate(str(model), config, windows(), device="cpu").apply(config), model, out)


@dataclass(frozen=True)
class Entry:
    one: dict[str, Any]
    other: dict[str, Any]
    found: Callable[[Any], dict[str, Any]]
    """What is seen in what `run` gives."""
    right: Callable[[dict[str, Any], Any], dict[str, Any]]
    """The same, as it must be for these fields."""
    run: Callable[[QuantizeConfig, Path, Path], Any] = write
    """Config, original model and output folder."""
    brings: tuple[str, ...] = ()
    """Fields that change with this one."""


# -- what is right, without the engine --------------------------------------------------------------------------------------


@functools.cache
def inputs_of(name: str, model: Path, quantized: Path | None = None) -> torch.Tensor:
    """Inputs (tokens, in) of a linear in the original model, or in its dequantized twin."""
    original = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    twin = dense_twin(model, load_quantized(quantized)) if quantized else original
    seen = []
    twin.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    logits(twin, windows().tokens)
    return seen[0].flatten(0, 1).double()


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / x.shape[0]


def damped(hessian: torch.Tensor, damp_percent: float = 0.1) -> torch.Tensor:
    return hessian + damp_percent * hessian.diagonal().mean() * torch.eye(hessian.shape[0])


def weight_of(name: str, model: Path) -> torch.Tensor:
    return load_file(model / "model.safetensors")[f"{name}.weight"].double()


def order_of(diagonal: list[float], fields: dict[str, Any]) -> torch.Tensor:
    columns = range(len(diagonal))
    if fields.get("desc_act") or (fields["act_group_aware"] and fields.get("static_groups")):
        return torch.tensor(sorted(columns, key=lambda i: -diagonal[i]))
    if not fields["act_group_aware"]:
        return torch.tensor(list(columns))
    size = fields["group_size"]
    groups = [sorted(columns[start : start + size], key=lambda i: -diagonal[i]) for start in columns[::size]]
    return torch.tensor([i for group in sorted(groups, key=lambda group: -diagonal[group[0]]) for i in group])


def textbook(fields: dict[str, Any], w: Written) -> dict[str, torch.Tensor]:
    """The reference result for q_proj of the first block."""
    return _textbook(json.dumps(fields), w.model)


@functools.cache
def _textbook(fields: str, model: Path) -> dict[str, torch.Tensor]:
    fields = json.loads(fields)
    hessian = hessian_of(inputs_of(Q, model))
    return textbook_gptq(
        weight_of(Q, model),
        hessian,
        bits=fields["bits"],
        group_size=fields["group_size"],
        sym=fields.get("sym", True),
        damp_percent=fields.get("damp_percent", 0.1),
        order=order_of(hessian.diagonal().tolist(), fields),
        groups_follow_order=fields.get("desc_act", False),
        static_groups=fields.get("static_groups", False),
    )


def grouped_weight(w: Written) -> torch.Tensor:
    return weight_of(Q, w.model).T.reshape(COLUMNS // 16, 16, -1)  # (groups, 16, out)


def extreme_scales(w: Written) -> torch.Tensor:
    return (2 * grouped_weight(w).abs().amax(1) / 15).half()


def weighted_error(scales: torch.Tensor, w: Written) -> torch.Tensor:
    """Σ diag(H + λI) (w - w~)² of each group (groups, out), rounding to nearest on symmetric scales."""
    weight, scales = grouped_weight(w), scales.double().unsqueeze(1)
    rounded = (torch.round(weight / scales) + 8).clamp(0, 15) - 8
    importance = damped(hessian_of(inputs_of(Q, w.model))).diagonal().view(-1, 16, 1)
    return (importance * (weight - rounded * scales) ** 2).sum(1)


def least_weighted_error(w: Written) -> float:
    tried = [share * sign * extreme_scales(w) for share in torch.linspace(0.35, 1.15, 81) for sign in (1, -1)]
    return float(torch.stack([weighted_error(scales, w) for scales in tried]).amin(0).sum())


def refitted_scales(w: Written) -> torch.Tensor:
    """From the extremes, each group's scale in turn to the least (w - q)(H + λI)(w - q)ᵀ for the codes on disk."""
    h = damped(hessian_of(inputs_of(Q, w.model)))
    weight, centred = weight_of(Q, w.model), w.codes().double() - 8
    scales = extreme_scales(w).double()
    for row in range(weight.shape[0]):
        spread = torch.block_diag(*centred[:, row].view(-1, 16, 1))  # (columns, groups)
        for g in range(scales.shape[0]):
            one = spread[:, g]
            rest = weight[row] - spread @ scales[:, row] + one * scales[g, row]
            scales[g, row] = ((one @ h @ rest) / (one @ h @ one)).half().double()
    return scales


def can_be_bettered(w: Written) -> float:
    """Share of the codes of q_proj that one step up or down would bring nearer, all others as they are."""
    h = damped(hessian_of(inputs_of(Q, w.model)))
    error = weight_of(Q, w.model).T - (w.codes().double() - 8) * w.scales().double().repeat_interleave(16, 0)
    pull, step = h @ error, w.scales().double().repeat_interleave(16, 0)
    better = torch.zeros_like(error, dtype=torch.bool)
    for direction in (1, -1):
        inside = (w.codes().int() + direction).clamp(0, 15) == w.codes().int() + direction
        better |= inside & (-2 * direction * step * pull + step**2 * h.diagonal()[:, None] < -1e-6 * step**2 * h.diagonal()[:, None])
    return float(better.double().mean())


def stream_before_down(model: Path, quantized: Path | None) -> torch.Tensor:
    """The residual stream of the first block after attention."""
    return inputs_of("model.layers.0.post_attention_layernorm", model, quantized)


def shifted_codes_of_down(fields: dict[str, Any], w: Written) -> torch.Tensor:
    """The textbook on the target that least squares gives, from the inputs of the original and of the checkpoint."""
    x, now = inputs_of(DOWN, w.model), inputs_of(DOWN, w.model, w.out)
    weight, hessian = weight_of(DOWN, w.model), hessian_of(now)
    lost = (x - now) @ weight.T
    lost += fields.get("residual_shift", 0) * (stream_before_down(w.model, None) - stream_before_down(w.model, w.out))
    ridge = (len(now) * fields["shift_damp_percent"] * hessian.diagonal().mean()).sqrt() * torch.eye(now.shape[1])
    change = torch.linalg.lstsq(torch.cat([now, ridge]), torch.cat([lost, torch.zeros(now.shape[1], lost.shape[1])])).solution.T
    target = weight + fields["target_shift"] * change
    order = order_of(hessian.diagonal().tolist(), fields)
    return textbook_gptq(target, hessian, bits=3, group_size=16, sym=True, damp_percent=0.1, order=order, groups_follow_order=False)[
        "codes"
    ]


def tuning_of(w: Written) -> dict[str, Any]:
    records = [json.loads(line) for line in (w.out / "manifest.jsonl").read_text().splitlines()]
    tunings = [record["tuning"] for record in records if "tuning" in record]
    untuned = write_from_many_windows(QuantizeConfig(**SHIFTED | {"bits": 2}), w.model, w.out.with_name(f"{w.out.name}-untuned"))
    return {
        "steps": [tuning["steps"] for tuning in tunings],
        "as solved": all(torch.equal(w.scales(name), untuned.scales(name)) for name in w.packed()),
    }


def loss_of_down(true_sequential: bool, w: Written) -> float:
    x = inputs_of(DOWN, w.model, w.out if true_sequential else None)
    error = weight_of(DOWN, w.model) - load_quantized(w.out).get_submodule(DOWN).weight_in(torch.float64)
    return float(((error @ damped(hessian_of(x))) * error).sum())


def without_recipe(fields: dict[str, Any], w: Written) -> Written:
    spelled = {"static_groups": True, "scale_search": "weighted", "refit": True, "descent": 1}
    config = QuantizeConfig(bits=4, group_size=16, recipe="classic", **(spelled if fields["recipe"] == "tuned" else {}))
    return write(config, w.model, w.out.with_name(f"{w.out.name}-spelled"))


def bits_by_rules(w: Written) -> dict[str, int]:
    """Bits of every linear of the blocks as a reader of the JSON expects them; 16 where it expects a plain one."""
    found = {}
    for name in load_file(w.model / "model.safetensors"):
        name = name.removesuffix(".weight")
        if not name.endswith("_proj"):
            continue
        rules = w.json.get("dynamic", {})
        left_out = any(rule.startswith("-:") and re.match(rule[2:], name) for rule in rules)
        changes = next((change for rule, change in rules.items() if re.match(rule.removeprefix("+:"), name)), {})
        found[name] = 16 if left_out else changes.get("bits", w.json["bits"])
    return found


def bits_on_disk(w: Written) -> dict[str, int]:
    return {name: w.bits(name) if f"{name}.qweight" in w.tensors else 16 for name in bits_by_rules(w)}


def mean_bits(w: Written) -> float:
    """A weight of the blocks."""
    sizes = {name: weight_of(name, w.model).numel() for name in bits_on_disk(w)}
    return sum(bits * sizes[name] for name, bits in bits_on_disk(w).items()) / sum(sizes.values())


# -- runs that are no plain quantization --------------------------------------------------------------------------------------


def prepared_tokens(config: QuantizeConfig, model: Path, out: Path) -> torch.Tensor:
    from tasks.config.run import from_dict
    from tasks.request.request import Requests

    quantization = {"bits": config.bits, "dataset": config.dataset}
    request = {"model": {"path": str(model)}, "quantization": quantization, "calibration": {"seqlen": 16}, "evaluation": {"seqlen": 16}}
    return Requests().of(from_dict(request | {"output": {"dir": str(out)}})).texts.calibration.tokens


def outcome(config: QuantizeConfig, model: Path, out: Path) -> str | list[str]:
    try:
        return write(config, model, out).packed()
    except InputError as error:
        return str(error).split(":")[0]


def without_a_hessian(config: QuantizeConfig, model: Path, out: Path) -> str | list[str]:
    """down_proj of the first block has no inputs but zeros."""
    tensors = load_file(model / "model.safetensors")
    tensors[f"{UP}.weight"].zero_()
    silent = out.with_name(f"{out.name}-model")
    silent.mkdir()
    save_file(tensors, silent / "model.safetensors", {"format": "pt"})
    (silent / "config.json").write_bytes((model / "config.json").read_bytes())
    try:
        return quantize(silent, out, config)["fallback_layers"]
    except FactorizationError as error:
        return str(error).split(":")[0]


def runner(config: QuantizeConfig, model: Path, out: Path) -> str:
    """The package whose linear runs q_proj after quantize_model; where gptqmodel is missing, the error asks for it."""
    quantizer = GPTQQuantizer(config.bits, dataset=windows().tokens.tolist(), group_size=config.group_size, backend=config.backend)
    try:
        quantized = quantizer.quantize_model(transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    except InputError as error:
        return "gptqmodel" if "gptqmodel" in str(error) else str(error)
    return type(quantized.get_submodule(Q)).__module__.split(".")[0]


RULES = {r".*\.1\.mlp\.down_proj": {"bits": 8}, r"-:.*\.0\.self_attn\.": {}}

ENTRIES = {
    "bits": Entry(
        PLAIN,
        PLAIN | {"bits": 3},
        lambda w: {"json": w.json["bits"], "codes": w.codes(), "rows": w.tensors[f"{Q}.qweight"].shape[0]},
        lambda fields, w: {"json": fields["bits"], "codes": textbook(fields, w)["codes"], "rows": COLUMNS * fields["bits"] // 32},
    ),
    "dataset": Entry(
        {"bits": 4, "dataset": [[5] * 64]},
        {"bits": 4, "dataset": [[7] * 64]},
        lambda tokens: {"tokens": tokens.unique().tolist()},
        lambda fields, _: {"tokens": fields["dataset"][0][:1]},
        run=prepared_tokens,
    ),
    "group_size": Entry(
        PLAIN,
        PLAIN | {"group_size": -1},
        lambda w: {"json": w.json["group_size"], "groups": w.scales().shape[0], "codes": w.codes()},
        lambda fields, w: {
            "json": fields["group_size"],
            "groups": {16: 4, -1: 1}[fields["group_size"]],
            "codes": textbook(fields, w)["codes"],
        },
    ),
    "damp_percent": Entry(
        PLAIN | {"damp_percent": 0.01},
        PLAIN | {"damp_percent": 0.9},
        lambda w: {"json": w.json["damp_percent"], "codes": w.codes()},
        lambda fields, w: {"json": fields["damp_percent"], "codes": textbook(fields, w)["codes"]},
    ),
    "desc_act": Entry(
        PLAIN | {"desc_act": False},
        PLAIN | {"desc_act": True},
        lambda w: {"json": w.json["desc_act"], "g_idx": w.tensors[f"{Q}.g_idx"], "codes": w.codes()},
        lambda fields, w: {"json": fields["desc_act"]} | {key: textbook(fields, w)[key] for key in ("g_idx", "codes")},
    ),
    "act_group_aware": Entry(
        PLAIN,
        PLAIN | {"act_group_aware": True},
        lambda w: {"json": w.json["act_group_aware"], "codes": w.codes()},
        lambda fields, w: {"json": fields["act_group_aware"], "codes": textbook(fields, w)["codes"]},
    ),
    "static_groups": Entry(
        STATIC | {"static_groups": False},
        STATIC,
        lambda w: {"json": w.json["static_groups"], "scales": w.scales(), "codes": w.codes()},
        lambda fields, w: {"json": fields["static_groups"]} | {key: textbook(fields, w)[key] for key in ("scales", "codes")},
    ),
    "sym": Entry(
        PLAIN | {"sym": True},
        PLAIN | {"sym": False},
        lambda w: {"json": w.json["sym"], "zeros": w.zeros(), "codes": w.codes()},
        lambda fields, w: {"json": fields["sym"]} | {key: textbook(fields, w)[key] for key in ("zeros", "codes")},
    ),
    "true_sequential": Entry(
        {"recipe": "classic", "bits": 2, "group_size": 32, "true_sequential": True},
        {"recipe": "classic", "bits": 2, "group_size": 32, "true_sequential": False},
        lambda w: {"json": w.json["true_sequential"], "loss": w.layer(DOWN)["loss"]},
        lambda fields, w: {"json": fields["true_sequential"], "loss": loss_of_down(fields["true_sequential"], w)},
    ),
    "modules_in_block_to_quantize": Entry(
        {"bits": 4, "group_size": 32},
        {"bits": 4, "group_size": 32, "modules_in_block_to_quantize": [["self_attn.o_proj"], ["mlp.down_proj"]]},
        lambda w: {"packed": [name for name in w.packed() if ".0." in name], "json": w.json.get("modules_in_block_to_quantize")},
        lambda fields, w: {
            "packed": [DOWN, ATTENDED] if len(fields) == 3 else sorted(name for name in bits_by_rules(w) if ".0." in name),
            "json": fields.get("modules_in_block_to_quantize"),
        },
    ),
    "lm_head": Entry(
        {"bits": 4, "group_size": 32, "lm_head": False},
        {"bits": 4, "group_size": 32, "lm_head": True},
        lambda w: {
            "json": w.json["lm_head"],
            "packed": "lm_head" in w.packed(),
            "dense": "lm_head.weight" in w.tensors,
            "loaded": isinstance(load_quantized(w.out).lm_head, QuantizedLinear),
        },
        lambda fields, _: dict.fromkeys(("json", "packed", "loaded"), fields["lm_head"]) | {"dense": not fields["lm_head"]},
    ),
    "dynamic": Entry(
        {"bits": 4, "group_size": 32, "dynamic": None},
        {"bits": 4, "group_size": 32, "dynamic": RULES},
        lambda w: {"disk": bits_on_disk(w), "json": bits_by_rules(w)},
        lambda fields, w: dict.fromkeys(
            ("disk", "json"),
            {
                name: 4 if not fields["dynamic"] else 8 if ".1.mlp.down" in name else 16 if ".0.self_attn." in name else 4
                for name in bits_by_rules(w)
            },
        ),
    ),
    "allocate": Entry(
        {"bits": 4, "group_size": 32, "allocate": {"bits": [2, 4], "budget_bpw": 3}},
        {"bits": 4, "group_size": 32, "allocate": {"bits": [4, 8], "budget_bpw": 6}},
        lambda w: {"average": math.ceil(mean_bits(w)), "widths": set(bits_on_disk(w).values()), "json": bits_by_rules(w)},
        lambda fields, w: {
            "average": fields["allocate"]["budget_bpw"],  # no more, and less by less than one unit
            "widths": set(fields["allocate"]["bits"]),
            "json": bits_on_disk(w),
        },
        run=write_with_chosen_widths,
    ),
    "format": Entry(
        PLAIN | {"format": "gptq"},
        PLAIN | {"format": "gptq_v2"},
        lambda w: {"labels": (w.json["format"], w.json["checkpoint_format"]), "word": int(w.tensors[f"{Q}.qzeros"][0, 0]) % 2**32},
        lambda fields, _: {"labels": (fields["format"],) * 2, "word": {"gptq": 0x77777777, "gptq_v2": 0x88888888}[fields["format"]]},
    ),
    "backend": Entry(
        {"bits": 4, "group_size": 32, "backend": "torch"},
        {"bits": 4, "group_size": 32, "backend": "gptq_torch"},
        lambda package: {"package": package},
        lambda fields, _: {"package": {"torch": "gptq_core", "gptq_torch": "gptqmodel"}[fields["backend"]]},
        run=runner,
    ),
    "scale_search": Entry(
        STATIC | {"scale_search": "min_max"},
        STATIC | {"scale_search": "weighted"},
        lambda w: {
            "extremes": torch.equal(w.scales(), extreme_scales(w)),
            "nearly the least error": float(weighted_error(w.scales(), w).sum()) < 1.03 * least_weighted_error(w),
        },
        lambda fields, _: {"extremes": fields["scale_search"] == "min_max", "nearly the least error": fields["scale_search"] == "weighted"},
    ),
    "refit": Entry(
        STATIC | {"refit": False},
        STATIC | {"refit": True},
        lambda w: {"scales": w.scales()},
        lambda fields, w: {"scales": refitted_scales(w) if fields["refit"] else extreme_scales(w)},
    ),
    "recipe": Entry(
        {"bits": 4, "group_size": 16, "recipe": "classic"},
        {"bits": 4, "group_size": 16, "recipe": "tuned"},
        lambda w: {"json": w.json["meta"]["recipe"], "static": w.json["static_groups"], "codes": w.codes(), "scales": w.scales()},
        lambda fields, w: {
            "json": fields["recipe"],
            "static": fields["recipe"] == "tuned",
            "codes": (spelled := without_recipe(fields, w)).codes(),
            "scales": spelled.scales(),
        },
        brings=("static_groups", "scale_search", "refit", "descent"),
    ),
    "descent": Entry(
        STATIC | {"descent": 0},
        STATIC | {"descent": 20},
        lambda w: {"at its best": can_be_bettered(w) < 0.002, "far from it": can_be_bettered(w) > 0.02},
        lambda fields, _: {"at its best": fields["descent"] > 0, "far from it": fields["descent"] == 0},
    ),
    "target_shift": Entry(
        SHIFTED | {"target_shift": 0.3},
        SHIFTED,
        lambda w: {"codes": w.codes(DOWN)},
        lambda fields, w: {"codes": shifted_codes_of_down(fields, w)},
    ),
    "residual_shift": Entry(
        SHIFTED | {"residual_shift": 0.0},
        SHIFTED | {"residual_shift": 0.8},
        lambda w: {"codes": w.codes(DOWN)},
        lambda fields, w: {"codes": shifted_codes_of_down(fields, w)},
    ),
    "shift_damp_percent": Entry(
        SHIFTED,
        SHIFTED | {"shift_damp_percent": 0.9},
        lambda w: {"codes": w.codes(DOWN)},
        lambda fields, w: {"codes": shifted_codes_of_down(fields, w)},
    ),
    "tuning_steps": Entry(
        SHIFTED | {"bits": 2, "tuning_steps": 0},
        SHIFTED | {"bits": 2, "tuning_steps": 20},
        tuning_of,
        lambda fields, _: {"steps": [20, 20] if fields["tuning_steps"] else [], "as solved": not fields["tuning_steps"]},
        run=write_from_many_windows,
    ),
    "strict": Entry(
        {"bits": 4, "group_size": 128, "strict": True},
        {"bits": 4, "group_size": 128, "strict": False},
        lambda outcome: {"outcome": outcome},
        lambda fields, _: {"outcome": Q if fields["strict"] else [DOWN, DOWN.replace("0", "1")]},
        run=outcome,
    ),
    "on_failure": Entry(
        {"bits": 4, "group_size": 32, "on_failure": "error"},
        {"bits": 4, "group_size": 32, "on_failure": "round"},
        lambda outcome: {"outcome": outcome},
        lambda fields, _: {"outcome": DOWN if fields["on_failure"] == "error" else [DOWN]},
        run=without_a_hessian,
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_llama):
    folder = save_model("llama", tmp_path_factory.mktemp("fields") / "model")
    for path in tiny_llama.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def agree(one, other) -> bool:
    """Equal; numbers to 0.1 %, which is more than float32 costs; of a tensor 98 % of the entries, because a rounding tie feeds back."""
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and bool(torch.isclose(one.double(), other.double(), rtol=2e-3, atol=0).double().mean() > 0.98)
    return one == pytest.approx(other, rel=1e-3) if isinstance(one, float) else one == other


def test_every_field_has_an_entry():
    assert set(ENTRIES) == set(QuantizeConfig.model_fields)


@pytest.mark.grid
@pytest.mark.parametrize("name", ENTRIES)
def test_the_field_acts(name, model, tmp_path):
    entry = ENTRIES[name]
    configs = [QuantizeConfig(**fields) for fields in (entry.one, entry.other)]
    differing = {key for key in QuantizeConfig.model_fields if getattr(configs[0], key) != getattr(configs[1], key)}
    assert name in differing <= {name, *entry.brings}
    found = []
    for config, fields, folder in zip(configs, (entry.one, entry.other), ("one", "other"), strict=True):
        result = entry.run(config, model, tmp_path / folder)
        found.append(entry.found(result))
        right = entry.right(fields, result)
        assert found[-1].keys() == right.keys()
        for point, value in found[-1].items():
            assert agree(value, right[point]), f"{point} of {fields}: {value}, not {right[point]}"
    for point in found[0]:
        assert not agree(found[0][point], found[1][point]), f"{point}: the same for both, so ignoring {name} would not show"
