"""A cluster of three nodes on this machine."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAYERS, SHARDS = 8, 12


def raylet(node):
    """The process of a node that starts its workers."""
    return node.all_processes["raylet"][0].process.pid


@contextmanager
def cluster(monkeypatch, folder, pause=0.05):
    """Three nodes of one processor, whose slow values pause so long; the first is the driver's."""
    from ray.cluster_utils import Cluster

    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("FLASHNORM_TEST_PAUSE", str(pause))
    monkeypatch.setenv("FLASHNORM_TEST_MARKS", str(folder))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        others = [made.add_node(num_cpus=1) for _ in range(2)]
        made.wait_for_nodes()
        yield made, others
    finally:
        made.shutdown()
