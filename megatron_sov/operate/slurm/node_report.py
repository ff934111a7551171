"""Report on a node from one rank: written by `preflight`, read by `attempts`."""

from dataclasses import dataclass


@dataclass
class NodeReport:
    """JSON content: `rank-N.json`."""

    node: str
    rank: int
    num_gpus: int = 0
    """GPUs visible to torch: the node's, or only this rank's."""
    gpu_uuid: str = ""
    """This rank's GPU."""
    gpu_used_bytes: int = 0
    """GPU memory in use before the preflight."""
    gpu_illness: str = ""
    """Faults from the GPU driver: memory errors, heat, lack of power."""
    transformer_engine_error: str = ""
    """Import error; empty: no error, or not imported."""
    free_disk_bytes: int = 0
    """Free space on the disk under `scratch`."""
    disk_error: str = ""
    """Error from writing a file to `scratch`."""
    matmul_s: float = 0.0
    """Shortest time for a matrix product, without kernel launch on a GPU."""
    matmul_tflops: float = 0.0
    checksum: float = 0.0
    """Sum over the product of two integer matrices: equal on all healthy ranks."""
    clock_skew_s: float | None = None
    """Clock minus the median clock over the ranks, right after a barrier."""
    allreduce_s: float | None = None
    """Duration of the second all-reduce; None: not completed."""
    alltoall_s: float = 0.0
    """Shortest all-to-all in the rank's expert-parallel group; 0: no group."""
    exchange_s: float = 0.0
    """Time of an exchange with the fastest of some ranks on other nodes, or on this node if there is one; 0:
    a single rank."""
    error: str = ""
    """First exception."""
