"""The engine's steps as Prefect tasks. The open quantization travels as an opaque value; what comes back are small records.

No result is cached by Prefect: its default policy would hash the model, and the engine's own manifest decides what is done.
"""

from __future__ import annotations

from typing import Any

from prefect import State, Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun

from gptq_core.errors import GPTQError
from gptq_core.run.engine import Quantization
from tasks.outcome.parts import Assembly, Block
from tasks.steps.opaque import Opaque


def may_retry(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Retry what may pass on its own (a full disk, a lost device), never what the engine refuses: it would refuse it again."""
    return not isinstance(state.result(raise_on_failure=False), GPTQError)


@task(name="capture_calibration", cache_policy=NO_CACHE)
def capture_calibration(job: Opaque[Quantization]) -> dict[str, int]:
    """The inputs of the first block for every calibration window."""
    return job.value.capture()


@task(name="quantize_block", task_run_name="quantize_block-{index}", cache_policy=NO_CACHE, retries=1, retry_condition_fn=may_retry)
def quantize_block(job: Opaque[Quantization], index: int) -> Block:
    """Quantize and commit decoder block `index`, or replay it from disk."""
    return Block.model_validate(job.value.quantize_block(index))


@task(name="assemble", cache_policy=NO_CACHE)
def assemble(job: Opaque[Quantization]) -> Assembly:
    """Publish the checkpoint; on finished work, its summary as it was."""
    return Assembly.model_validate(job.value.assemble())
