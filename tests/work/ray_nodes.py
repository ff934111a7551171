"""A local Ray cluster with two nodes, also for benchmarks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STORE_BYTES = 80 << 20
"""Shared memory of a node."""


@contextmanager
def two_nodes() -> Iterator[Any]:
    """Give a cluster of two nodes with a core each; the first also has a pretended GPU."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={
        "num_cpus": 1, "num_gpus": 1, "include_dashboard": False, "object_store_memory": STORE_BYTES})
    cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    try:
        yield cluster
    finally:
        cluster.shutdown()
