"""Run cells on a Ray cluster, through prefect-ray, an optional dependency: `pip install 'gptq-pipeline[ray]'`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from gptq_core.errors import InputError
from tasks.config.sweep import SweepConfig
from tasks.sweep.jobs import Places

if TYPE_CHECKING:
    from prefect_ray import RayTaskRunner


def ray_runner(config: SweepConfig) -> RayTaskRunner:
    """Prefect's runner for the cluster at config.ray_address; without an address it starts a cluster of this machine alone."""
    try:
        from prefect_ray import RayTaskRunner
    except ImportError as error:
        raise InputError(f"runner: ray needs prefect-ray ({error}): pip install 'gptq-pipeline[ray]', or set runner: local") from error
    # a cluster of this machine alone listens on loopback only
    here = {} if config.ray_address else {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
    return RayTaskRunner(address=config.ray_address, init_kwargs=here)


def ray_options(config: SweepConfig, places: Places) -> AbstractContextManager[object]:
    """Resources that a cell requests: its threads, and a share of a GPU if the cluster has any, unless all cells are for the CPU."""
    import ray
    import torch
    from prefect_ray.context import remote_options

    on_cpu = all(cell.config.model.device == "cpu" for cell in config.expanded() if cell.config)
    gpus = 0 if on_cpu or not ray.cluster_resources().get("GPU") else 1 / places.slots
    if gpus and not torch.cuda.is_available():
        # the device type is part of a checkpoint's key: a cell done there would count as missing here
        raise InputError(
            "runner: ray on a cluster with GPUs must be started where there is one: start the sweep on such a node, "
            "or set base.model.device: cpu"
        )
    largest = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
    # a request for more threads than any node has would wait for ever
    options: AbstractContextManager[object] = remote_options(num_cpus=min(places.threads, largest), num_gpus=gpus)
    return options
