"""One run as it was requested: checked and opened once, and handed on from the command line to the flow and to `tasks.run.compute`.

    requests = Requests()
    with requests.of(requests.placed(config)) as request:
        notes = request.check()
        with handed_on(requests):
            flow(request.config)  # which finds the request by Requests.current()

No Prefect here: a wrong request must not wait for a server.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from gptq_core.data.windows import Windows
from gptq_core.errors import GPTQError, InputError
from gptq_core.inference import backends
from gptq_core.model.architecture import choose_device
from gptq_core.model.opened import OpenedModel, open_model
from gptq_core.planning.consumers import loadability, objections
from gptq_core.run.engine import Quantization
from gptq_core.run.identity import request_key
from gptq_core.search.allocation import Allocation
from tasks.config import secrets
from tasks.config.run import RunConfig
from tasks.evaluation.scores import Measures
from tasks.outcome import record as records
from tasks.request.capacity import Foreseen, fits, foresee
from tasks.request.handing import handed
from tasks.request.texts import RunTexts, read_texts

KEY = "{key}"


class Request:
    """A requested run. Everything about it is found when it is first needed, and kept. Closed by `close` or `with`."""

    def __init__(self, config: RunConfig, requests: Requests, texts: RunTexts | None = None) -> None:
        self.config, self._requests = config, requests
        self.allocation: dict[str, Any] | None = None
        """Record of the widths that `job` was opened with; None: they were not chosen yet, or are not to be."""
        self._notes: tuple[str, ...] | None = None
        self._job: Quantization | None = None
        if texts:
            self.texts = texts

    def __enter__(self) -> Request:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the output and the engine's memory. The next use of `job` opens both again."""
        job, self._job = self._job, None
        if job:
            job.close()

    @cached_property
    def model(self) -> OpenedModel:
        """The original model."""
        return self._requests.model(self.config)

    @cached_property
    def texts(self) -> RunTexts:
        """Both texts. Raises InputError as `read_texts` does."""
        return self._requests.texts(self.config)

    @cached_property
    def foreseen(self) -> Foreseen:
        """Plan and estimate."""
        return foresee(self.config, self.model)

    @cached_property
    def measures(self) -> Measures:
        """What the checkpoint is measured by beside perplexity and KL."""
        return Measures(self.config, self.model, self._requests.measured)

    @cached_property
    def key(self) -> str:
        """sha256 of model, settings, calibration windows, kind of device and this code."""
        model = self.config.model
        return request_key(self.model, self.config.quantization, self.texts.calibration, device=model.device, dtype=model.dtype)

    def check(self) -> tuple[str, ...]:
        """Raise what is wrong with the request, the model, the texts and the output, which is held from here on; notes on the rest."""
        if self._notes is None:
            self._notes = self._checked()
        return self._notes

    def _checked(self) -> tuple[str, ...]:
        config = self.config
        backends.choose(config.evaluation_backend, [], choose_device(config.model.device))  # is it installed: before a text is read
        self.model.require_weights()
        for value in (config.tracking.uri, config.notify and config.notify.webhook):
            secrets.check(value or "")
        tight = fits(config, self.foreseen)
        texts, record = self.texts, records.read(config.out)
        overlapping: tuple[str, ...] = ()
        if (record.evaluation.measured if record and record.evaluation else None) != self.measures.key:
            overlapping = self.measures.check(texts.calibration)
        job = self.job
        verdicts = loadability(job.config, job.selection) if self.allocation else self.foreseen.verdicts
        return (*self.foreseen.notes, *texts.notes, *overlapping, *tight, *objections(verdicts))

    # -- the engine ---------------------------------------------------------------------------------------------------

    @property
    def job(self) -> Quantization:
        """The engine on this request: checked, locked, resumed. Raises InputError, or OutputHeldError where another run writes.

        Where widths are still to be chosen, it quantizes nothing yet.
        """
        if self._job is None:
            self._job = self._open()
        return self._job

    def _open(self) -> Quantization:
        config, wanted = self.config, self.config.quantization
        if config.output.profile == "portable":
            refused = objections(self.foreseen.verdicts, full=True)
            if refused:
                raise InputError(f"output.profile = 'portable': {'; '.join(refused)}; or set output.profile: mixed")
        self.allocation = self._stored_allocation()
        if self.allocation:
            wanted = Allocation.from_record(self.allocation).apply(wanted)
        job = Quantization.open(
            self.model,
            wanted,
            self.texts.calibration,
            config.out,
            dtype=config.model.dtype,
            device=config.model.device,
            overwrite=config.output.overwrite,
        )
        try:
            job.kernel()  # the evaluation at the end would be the first to miss it
        except GPTQError:
            job.close()
            raise
        return job

    # -- chosen widths ------------------------------------------------------------------------------------------------

    @property
    def allocation_file(self) -> Path:
        """Where the chosen widths are kept, with the key of the request that they were chosen for."""
        return records.beside(self.config.out, ".work") / "allocation.json"

    def _stored_allocation(self) -> dict[str, Any] | None:
        path = self.allocation_file
        if self.config.quantization.allocate is None or not path.is_file():
            return None
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path} cannot be read ({error}): remove it, and the widths are chosen again") from error
        return record if isinstance(record, dict) and record.get("key") == self.key else None


class Requests:
    """The requests of one run, or of one sweep's cells. A model or a text that several of them share is opened or read once."""

    def __init__(self) -> None:
        self._by_output: dict[Path, Request] = {}
        self._models: dict[tuple[str, str | None], OpenedModel] = {}
        self._texts: dict[str, RunTexts] = {}
        self.measured: dict[tuple[Any, ...], Windows] = {}
        """Texts of measures, as `Measures` keeps them."""

    @staticmethod
    def current() -> Requests:
        """Those that were handed on to this flow, or new ones."""
        return handed(Requests) or Requests()

    def placed(self, config: RunConfig) -> RunConfig:
        """`config` with the {key} of its output.dir filled in."""
        folder = config.output.dir or ""
        if KEY not in folder:
            return config
        folder = folder.replace(KEY, Request(config, self).key[:12])
        return config.model_copy(update={"output": config.output.model_copy(update={"dir": folder})})

    def of(self, config: RunConfig) -> Request:
        """The request for a config: always the same one for an equal config."""
        found = self._by_output.get(config.out)
        if found is None or found.config != config:
            found = self._by_output[config.out] = Request(config, self)
        return found

    def model(self, config: RunConfig) -> OpenedModel:
        """The model of a config."""
        where = config.model.path, config.model.revision
        if where not in self._models:
            self._models[where] = open_model(*where)
        return self._models[where]

    def texts(self, config: RunConfig) -> RunTexts:
        """The texts of a config."""
        model, calibration, evaluation = config.model, config.calibration.model_dump(), config.evaluation.model_dump()
        what = json.dumps([model.path, model.revision, calibration, evaluation, config.quantization.dataset])
        if what not in self._texts:
            self.model(config).require_weights()  # first: without them no tokenizer helps
            self._texts[what] = read_texts(config, self.model(config))
        return self._texts[what]
