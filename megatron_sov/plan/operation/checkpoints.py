"""What a checkpoint holds, how long it takes to write, and how often it is worth it.

The bytes are those of the tensors that `mcore/checkpoint` writes: each element of a global tensor once,
whatever the layout, the vocabulary without the rows that fill it up.  Beside them stand the headers of the
safetensors files, the indices, the manifest and the tokenizer, some hundred bytes for each tensor and
process, which are left out.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from dataclasses import dataclass

from megatron_sov import models
from megatron_sov.config import LoraConfig, ModelConfig, OptimConfig, RunConfig
from megatron_sov.models.adapters import adapted_modules
from megatron_sov.models.count import TABLES
from megatron_sov.plan.held import BF16_BYTES, FLOAT32_BYTES, ITEM_BYTES, stage_params

HOST_COPY_BYTES_PER_S = 20e9
"""From a GPU to pinned host memory: PCIe 4.0 has 32 GB/s, 5.0 64, of which a copy reaches about two thirds of
the slower.  Our choice; not measured yet."""
PROCESS_WRITE_BYTES_PER_S = 0.6e9
"""What one process hashes, writes and syncs at least: 0.65 to 0.8 GB/s with two cores and one disk, which is
what held it up there (benchmarks/results/checkpoint_speed.txt)."""


@dataclass(frozen=True)
class CheckpointBytes:
    """Bytes of a checkpoint's tensors."""

    weights: int
    """Of the part `model`, or of a frozen model's `adapter`."""
    optimizer: int
    """Moments and, under bf16, float32 master weights."""

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.optimizer


@dataclass(frozen=True)
class WriteTimes:
    """Seconds that a checkpoint takes."""

    stall_s: float
    """In which the run stands still: the copy into host memory or, without `train.async_save`, all of it."""
    background_s: float
    """Until it is there, beside the training; a failure before then goes back to the checkpoint before."""


def checkpoint_bytes(config: RunConfig) -> CheckpointBytes:
    """Return the bytes of a run's checkpoint; the layout has no part in them."""
    return _bytes(config.model, config.lora, config.optim, config.train.precision, config.gpu.moment_dtype)


@functools.lru_cache(maxsize=64)
def _bytes(model: ModelConfig, lora: LoraConfig, optim: OptimConfig, precision: str,
           moment: str) -> CheckpointBytes:
    item, states = ITEM_BYTES[precision], _state_bytes(precision, moment)
    weights = optimizer = 0
    for tensor in _adapter(model, lora) if lora.on else _tensors(model):
        weights += tensor.num_elements * (FLOAT32_BYTES if tensor.is_bias else item)
        optimizer += tensor.num_elements * (0 if tensor.is_bias else states[_algorithm(optim, tensor)])
    return CheckpointBytes(weights, optimizer)


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a checkpoint."""

    key: str
    num_elements: int
    is_matrix: bool
    """Whether the parameter, an expert's by itself, has two axes."""
    is_bias: bool = False
    """Whether it is a router's selection bias, which no optimizer updates."""


def _tensors(model: ModelConfig) -> list[_Tensor]:
    """Return the tensors of a model, by the weight map of its family."""
    found = {link.key: link for link in models.get(model.family).links(model)}
    return [_Tensor(key, math.prod(link.shape), len(link.block_shape) == 2, link.fp32)
            for key, link in found.items()]


def _adapter(model: ModelConfig, lora: LoraConfig) -> list[_Tensor]:
    """Return the tensors of an adapter."""
    return [_Tensor(key, math.prod(shape), len(shape) == 2)
            for of in adapted_modules(model, lora) for key, shape in of.shapes(lora).items()]


def _algorithm(optim: OptimConfig, tensor: _Tensor) -> str:
    """Return what updates a tensor, or "frozen", as `mcore/optimizer/parameter_groups.py` has it."""
    may = tensor.is_matrix and tensor.key not in TABLES
    found: str = optim.name if may else "adamw"
    for group in optim.groups:
        if fnmatch.fnmatchcase(tensor.key, group.pattern):
            found = "frozen" if group.frozen else (group.optimizer or optim.name) if may else "adamw"
    return found


def _state_bytes(precision: str, moment: str) -> dict[str, int]:
    """Return the bytes of a parameter's state by what updates it."""
    if precision == "bf16":
        of_moment = BF16_BYTES if moment == "bf16" else FLOAT32_BYTES
        return {"adamw": FLOAT32_BYTES + 2 * of_moment, "muon": 2 * FLOAT32_BYTES, "frozen": 0}
    item = ITEM_BYTES[precision]
    return {"adamw": 2 * item, "muon": item, "frozen": 0}


def rank_bytes(config: RunConfig, num_ranks: int) -> int:
    """Return what the process that writes most writes: of data-parallel processes that hold the same weights
    the first one, and of the state its share under ZeRO-1, or all.  An adapter is taken as if one process
    wrote it alone: it is small."""
    if config.lora.on:
        return checkpoint_bytes(config).total
    p, item = config.parallel, ITEM_BYTES[config.train.precision]
    state = _state_bytes(config.train.precision, config.gpu.moment_dtype)[config.optim.name]
    shards, expert_shards = ((num_ranks // (p.tp * p.pp), num_ranks // (p.etp * p.ep * p.pp)) if p.zero1
                             else (1, 1))
    return max(int((held.dense + held.experts) * item
                   + held.dense * state / shards + held.experts * state / expert_shards)
               for held in stage_params(config))


def write_times(config: RunConfig, num_ranks: int, storage_bytes_per_s: float) -> WriteTimes:
    """Return how long a checkpoint takes.

    Args:
        config: what is saved, and whether beside the training.
        num_ranks: processes that write.
        storage_bytes_per_s: what all of them together can write.
    """
    size_bytes, of_one = checkpoint_bytes(config).total, rank_bytes(config, num_ranks)
    background_s = max(size_bytes / storage_bytes_per_s, of_one / PROCESS_WRITE_BYTES_PER_S)
    if not config.train.async_save:
        return WriteTimes(background_s, 0.0)
    return WriteTimes(of_one / HOST_COPY_BYTES_PER_S, background_s)


def young_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Return the work between checkpoints that loses least, to first order (Young, Communications of the ACM
    17(9), 1974).

    Args:
        cost_s: how long a checkpoint holds up the run.
        mtbf_s: mean time between failures of the whole run.
    """
    return math.sqrt(2 * cost_s * mtbf_s)


def daly_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Return the same to higher order (Daly, Future Generation Computer Systems 22(3), 2006, equation 37)."""
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    x = math.sqrt(cost_s / (2 * mtbf_s))
    return young_interval_s(cost_s, mtbf_s) * (1 + x / 3 + x * x / 9) - cost_s
