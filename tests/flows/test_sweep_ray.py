"""A sweep on a Ray cluster of two nodes on this machine writes what the local workers write."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.app import app

pytest.importorskip("prefect_ray", reason="the extra [ray]")
pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.services]


@pytest.fixture
def cluster(request, monkeypatch):
    """Address of two nodes with one core each."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(request.config.rootpath), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000}
    found = Cluster(initialize_head=True, head_node_args=node)
    del node["include_dashboard"]
    found.add_node(**node)
    yield found.address
    import ray

    ray.shutdown()
    found.shutdown()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_cells_of_a_cluster_are_those_of_local_workers_byte_for_byte(tmp_path, tiny_llama, corpus, cluster):
    run = tmp_path / "run.yaml"
    run.write_text(
        json.dumps(
            {
                "model": {"path": str(tiny_llama), "device": "cpu"},
                "quantization": {"dataset": str(corpus), "group_size": 32},
                "calibration": {"samples": 8, "seqlen": 64},
                "evaluation": {"samples": 8, "seqlen": 64},
                "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
            }
        )
    )
    common = ["sweep", str(run), "--grid", "bits=3,4", "--set", "threads=1", "--set", "choose.max_perplexity_increase=100", "--json"]
    found = {}
    for name, more in {"local": [], "ray": ["--runner", "ray", "--address", cluster]}.items():
        result = CliRunner().invoke(app, [*common, "--out", str(tmp_path / name), *more])
        assert result.exit_code == 0, result.output
        found[name] = json.loads(result.stdout)
    assert [row["kl"] for row in found["ray"]["cells"]] == [row["kl"] for row in found["local"]["cells"]]
    for row in found["local"]["cells"]:
        assert files(tmp_path / "ray" / row["name"]) == files(Path(row["out"]))
    # each cell had a worker of its own on a node
    assert len(list((tmp_path / "ray" / "shared").glob("worker-bits=*.log"))) == 2
