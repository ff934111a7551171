"""Records of a training process's memory, computed by formulas in `plan` and from tensors in `engine`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class States:
    """Memory that stays allocated from step to step."""

    weights: int
    """Bytes, with the gaps of ZeRO-1's buffers."""
    gradients: int
    """Bytes of the gradient buffers."""
    optimizer: int
    """Bytes of master weights and moments on the device."""
    on_host: int
    """Bytes of host memory, under `gpu.optimizer_offload`."""
    counters: int
    """Bytes of the model's buffers without gradients: router counters, selection biases, YaRN angles."""
    updated: int
    """Elements whose master weights are on the device and that this process updates."""
    elements: int
    """Elements of all parameters, without gaps."""


@dataclass(frozen=True)
class StatePlace:
    """Data-parallel ranks of a process."""

    dense: int = 0
    """Rank in the data- and context-parallel group."""
    experts: int = 0
    """Rank in the expert data-parallel group."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted memory of a run, in bytes per process."""

    states: int
    """Weights, gradients and optimizer on the first pipeline stage."""
    peak: int
    """`states`, activations and library buffers on the first pipeline stage."""
    on_host: int
    """Host memory on the first pipeline stage, under `gpu.optimizer_offload`."""
    fullest: int
    """Peak of the pipeline stage that needs most: every GPU must have as much free memory."""
    imbalance_limit: float = 0.0
    """Largest load of the busiest expert-parallel process, relative to the mean, that fits the GPU; 0:
    unknown GPU or no expert parallelism."""
