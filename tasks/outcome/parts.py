"""Parts of the records: small frozen models, one for each thing that a run or a sweep leaves behind.

Their keys are those of the JSON files. A key that records have had from the first version on is required; one that came later has
the default that means "not known". Unknown keys are kept, so a record that is read and written again loses nothing.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Json = dict[str, Any]
"""A JSON object whose keys are not fixed here, such as a config of any version."""


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=(), ser_json_inf_nan="constants")


# -- what a run works on --------------------------------------------------------------------------------------------------


class Text(Part):
    """A text as token windows."""

    source: str
    windows: int
    seqlen: int
    digest: str
    file: str = ""
    """Where the windows lie; empty where a record does not say."""
    total_windows: int | None = None
    """Windows of the whole text, of which `windows` were drawn."""


class Overlap(Part):
    """How much of the held-out text is calibrated on too, by n-grams."""

    share: float
    calibration_share: float = 0.0
    """Share of the calibration text that stands in the held-out one."""
    ngram: int
    positions: int


class Texts(Part):
    """The two texts of a run, as tasks.request.texts.RunTexts writes and reads them."""

    calibration: Text
    evaluation: Text
    overlap: Overlap


class Machine(Part):
    """Where seconds and bytes were measured."""

    host: str | None = None
    python: str | None = None
    torch: str | None = None
    system: str | None = None
    cores: int | None = None
    gpu: str | None = None


class Source(Part):
    """The code that ran."""

    version: str | None = None
    git: str | None = None
    """Revision of the checkout, with -dirty where files differ; None: no checkout."""


class MachineLoad(Part):
    """Samples of the machine's load: a value, or None, of each metric for each time."""

    interval_seconds: float
    times_ms: list[int]
    metrics: dict[str, list[float | None]]


# -- what was quantized ---------------------------------------------------------------------------------------------------


class Octaves(Part):
    """Scales by size: counts[i] of them have floor(log2 |s|) = first_octave + i."""

    first_octave: int
    counts: list[int]


class Layer(Part):
    name: str
    loss: float | None = None
    relative_error: float | None = None
    """Error of the layer's output on the calibration text over the output; None: rounded to nearest."""
    tokens: int | None = None
    bits: int | None = None
    group_size: int | None = None
    in_features: int | None = None
    out_features: int | None = None
    fallback: str | None = None
    """Why the layer was rounded to nearest; None: it was not."""
    codes: list[int] | None = None
    """How often each code is used."""
    scales: Octaves | None = None


class Block(Part):
    block: int
    seconds: float
    layers: list[Layer]
    resumed: bool = False
    """Whether it was on disk already."""


class Left(Part):
    """A linear that was left as it is."""

    name: str
    reason: str


class Loadability(Part):
    """Whether a consumer loads the checkpoint, by its rules."""

    consumer: str
    version: str
    loads: bool
    reasons: list[str]


class Sizes(Part):
    bytes: int
    """Of the checkpoint's tensor files."""
    original_bytes: int | None = None
    bits_per_weight: float
    fallback_layers: list[str] = []
    """Linears that were rounded to nearest."""
    skipped: list[Left] = []
    """Linears that were left as they are."""


class Assembly(Sizes):
    """The finished checkpoint, as gptq_core.run.summary describes it."""

    original_bytes: int
    quantized_layers: int
    untuned_blocks: list[int] = []
    lm_head: Layer | None = None
    loads: list[Loadability] = []
    unused_source_tensors: list[str] = []


class AllocatedWidths(Part):
    """Widths of the linears chosen under a budget. Also kept: key, units and rules of gptq_core.search.allocation.Allocation."""

    bits_per_weight: float
    predicted_kl: float
    shares: dict[str, float]
    """Share of the weights by width."""
    seconds: float

    def __str__(self) -> str:
        shares = ", ".join(f"{bits}: {share:.0%}" for bits, share in self.shares.items())
        return f"{self.bits_per_weight:.2f} bits ({shares}), predicted KL {self.predicted_kl:.4g}"


# -- how good it is -------------------------------------------------------------------------------------------------------


class Quality(Part):
    """Numbers on the held-out text; None: not measured."""

    original_perplexity: float | None
    quantized_perplexity: float | None
    kl: float | None
    """KL(original || quantized) per token in nats."""
    top1_agreement: float | None
    recovery: float | None = None
    """Score over the original's, of the task that loses most."""

    @property
    def perplexity_increase(self) -> float | None:
        """Quantized over original perplexity, minus one."""
        before, after = self.original_perplexity, self.quantized_perplexity
        return after / before - 1 if before and after is not None else None


class HeldOut(Quality):
    """Quality, and on what it was measured."""

    flips: float | None = None
    """Share of the tokens that only one of the two models predicts rightly."""
    tokens: int | None = None
    windows: int | None = None
    seqlen: int | None = None
    digest: str
    """Of the held-out windows."""
    backend: str = "torch"
    """What ran the quantized linears."""
    seconds: float | None = None


class MeasureResult(Part):
    """One score of the checkpoint beside the original's."""

    name: str
    kind: str
    protocol: str | None = None
    metric: str
    unit: str | None = None
    higher_is_better: bool
    original: float
    quantized: float
    recovery: float | None
    """1 is as good as the original; None: the scores have no such ratio."""
    interval: tuple[float, float] | None
    """95 % interval of the recovery."""
    inside_noise: bool | None
    lost: int | None
    gained: int | None
    """Questions that only the quantized model answers rightly; lost: only the original."""
    count: int | None
    sentence: str
    seconds: float | None = None


class Evaluation(HeldOut):
    overlap: Overlap | None = None
    measures: list[MeasureResult] = []
    measured: str | None = None
    """Key of the measures, texts and runner that `measures` are of; None: the config has none, or some failed."""

    @classmethod
    def of(
        cls, numbers: HeldOut, overlap: Overlap | None = None, measures: list[MeasureResult] | None = None, measured: str | None = None
    ) -> Evaluation:
        """The numbers of the held-out text with these measures. No task is passed over in the recovery: if one has none, it has none."""
        tasks = [result for result in measures or [] if result.kind == "tasks"]
        recoveries = [result.recovery for result in tasks if result.recovery is not None]
        lowest = min(recoveries, default=None) if measured is not None and len(recoveries) == len(tasks) else None
        later = {"overlap": overlap, "measures": measures or [], "measured": measured, "recovery": lowest}
        return cls(**(numbers.model_dump() | later))


class Screened(Quality, Sizes):
    """What screening found for one cell: its figures come from one pass through the original, without a checkpoint."""

    mode: Literal["screening"] = "screening"
    seconds: float
    set_aside: list[str]
    """Keys of the config that screening took for 0."""
    error: str | None = None
    """Why the cell could not be solved."""


# -- what came of it ------------------------------------------------------------------------------------------------------


class LimitCheck(Part):
    limit: str
    limit_value: int | float
    value: int | float | None
    """None: not measured, which passes no limit."""
    passed: bool

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.limit} = {self.limit_value:.6g}: not measured"
        side = "below" if self.limit.startswith("min_") else "above"
        return f"{self.limit}: {self.value:.6g} is {side} {self.limit_value:.6g}"


class GateResult(Part):
    """A run against the limits of its gate."""

    passed: bool
    checks: list[LimitCheck]
    measure: str
    """Number by which registered versions are compared."""
    value: float | None

    @property
    def word(self) -> str:
        return "passed" if self.passed else "failed"

    @property
    def failures(self) -> str | None:
        """Every limit that was not kept, with its value, in one line; None: all were kept."""
        return None if self.passed else "; ".join(str(check) for check in self.checks if not check.passed)

    def __str__(self) -> str:
        return self.word if self.passed else f"failed: {self.failures}"


class MlflowLink(Part):
    """A run's place in MLflow, or why it is not there."""

    run_id: str | None = None
    experiment_id: str | None = None
    parent_run_id: str | None = None
    """Run of the sweep that it is a cell of."""
    url: str | None = None
    """Of the run's page; None where the config does not name the server."""
    uri: str | None = None
    experiment: str | None = None
    error: str | None = None
    """Why MLflow does not have it, in one line."""


class Registration(Part):
    """A checkpoint in MLflow's model registry, or why it is not there."""

    name: str | None = None
    version: str | None = None
    alias: str | None = None
    champion: bool = False
    """Whether the alias is this version's."""
    beaten: str | None = None
    """Version that held the alias before."""
    note: str | None = None
    error: str | None = None


class HookCall(Part):
    """The last call of a hook."""

    told: str
    """Digest of the notification, by which the same one is sent once."""
    error: str | None


HookCalls = dict[str, HookCall]
"""By hook: command, webhook."""


# -- sweeps ---------------------------------------------------------------------------------------------------------------


class SweepName(Part):
    """What names a sweep before any cell is computed; its run in MLflow is made from it."""

    id: str
    folder: str
    mode: Literal["exact", "screening"]
    started_ms: int | None = None
    model: str | None = None


class CellName(SweepName):
    """The sweep that a run is a cell of, and the name of the cell."""

    cell: str


class SweptCell(Part):
    """A line of a sweep: a cell and, once it is done, its numbers."""

    name: str
    settings: Json = Field(default_factory=dict)
    status: str
    """done, or why it is not: invalid, failed, held, memory, time, ended, missing."""
    error: str | None = None
    bytes: int | None = None
    original_bytes: int | None = None
    bits_per_weight: float | None = None
    original_perplexity: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    agreement: float | None = None
    recovery: float | None = None
    seconds: float | None = None
    gate: Literal["passed", "failed"] | None = None
    fallback_layers: int | None = None
    out: str | None = None
    mlflow_run_id: str | None = None
    judged_on: str | None = None
    """Model and text: only cells that share both can be compared."""
    set_aside: list[str] = []
    """Keys of the config that screening took for 0."""

    def quality(self, measure: str) -> float | None:
        """measure: kl or perplexity."""
        return self.kl if measure == "kl" else self.perplexity

    @property
    def done(self) -> bool:
        return self.status == "done"


class Recommendation(Part):
    name: str | None
    """Of the cell; None: no cell fits the rule."""
    rule: str
    reason: str
