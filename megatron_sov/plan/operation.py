"""Estimate a run's goodput and cost: checkpoints, failures, energy and money.

A run trains for `interval_s`, stops for `stall_s` while it copies its state, and continues while the copy is
written for `write_s`; the next checkpoint waits for the previous one (`checkpoint/save.py`). After a failure
the run restarts from the newest complete checkpoint, and may fail again during the restart. Failures form a
Poisson process, close to published failures.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from dataclasses import dataclass, replace

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import LoraConfig, ModelConfig, OptimConfig, RunConfig
from megatron_sov.model.families.adapters import find_adapted_modules
from megatron_sov.model.families.count import TABLES, layer_weights
from megatron_sov.model.families.encoders import encoder_shapes
from megatron_sov.plan.footprint.stage_parameters import (
    BF16_BYTES, FLOAT32_BYTES, ITEM_BYTES, count_stage_params)
from megatron_sov.work.clusters.cluster import ClusterProfile
from megatron_sov.work.clusters.units import HOURS_PER_DAY, SECONDS_PER_HOUR, SECONDS_PER_YEAR

HOST_COPY_BYTES_PER_S = 20e9
"""GPU to pinned host memory: two thirds of PCIe 4.0's 32 GB/s. Assumed; not measured."""
PROCESS_WRITE_BYTES_PER_S = 0.6e9
"""Least rate at which a process hashes, writes and syncs: 0.65 to 0.8 GB/s with two cores and one disk
(benchmarks/results/checkpoint_speed.txt)."""
LEAST_SHARE = 1e-3
"""Smallest `Operation.effective_share`; `plan` refuses runs below."""
DRAWN_SHARE = 0.82
"""A node's power in training as a share of its maximum: 8.4 kW measured, 10.2 kW maximum for 8 H100
(Latif et al., arXiv 2412.08602)."""
WATTS_PER_KW = 1000


@dataclass(frozen=True)
class Operation:
    """A run's checkpoint interval and goodput on a cluster."""

    checkpoint_bytes: int
    stall_s: float
    """Seconds per checkpoint in which training waits."""
    write_s: float
    """Seconds per checkpoint in which it is written next to the training."""
    interval_steps: int
    """Best value for `train.checkpoint_every_steps`; all steps if the profile has no failures."""
    interval_s: float
    """`interval_steps` in seconds of training."""
    mtbf_s: float
    """Mean time between failures over all GPUs; infinite without failures."""
    effective_share: float
    """Expected share of wall-clock time in steps that survive failures."""
    has_storage_rate: bool
    """Whether the profile sets the storage bandwidth; otherwise `write_s` only counts the processes."""


def plan_operation(config: RunConfig, profile: ClusterProfile, num_gpus: int, step_s: float,
                   num_steps: int) -> Operation:
    """Find the best checkpoint interval, and the goodput with spare nodes for broken ones. Raises
    `UserError`: failures are so frequent that less than `LEAST_SHARE` of the time is effective."""
    storage = profile.storage_write_gbytes_per_s * 1e9
    times = estimate_write_times(config, num_gpus, storage or math.inf)
    failures_per_s = profile.failures_per_gpu_year * num_gpus / SECONDS_PER_YEAR
    c = FailureConditions(failures_per_s, profile.restart_s, step_s, times.stall_s, times.background_s)
    # Never shorter than a write: the next checkpoint would wait for the previous one.
    steps = max(1, math.ceil(times.background_s / step_s),
                round(min(find_best_interval_s(c) / step_s, num_steps)))
    c = replace(c, interval_s=steps * step_s)
    goodput = compute_goodput(c)
    if goodput < LEAST_SHARE:
        takes_s = times.stall_s + times.background_s
        raise UserError(f"failures_per_gpu_year = {profile.failures_per_gpu_year:g} and restart_s = "
                        f"{profile.restart_s:g} leave {num_gpus:,} GPUs no time to train: something fails "
                        f"every {c.mtbf_s:.3g} s, and a checkpoint takes {takes_s:.3g} s; plan with fewer "
                        "GPUs, or with what the cluster really has (0.17 and 600 are the defaults)")
    return Operation(count_checkpoint_bytes(config).total, times.stall_s, times.background_s, steps,
                     c.interval_s, c.mtbf_s, goodput, bool(storage))


@dataclass(frozen=True)
class FailureConditions:
    """A run's failure rate and checkpoint timing."""

    failures_per_s: float
    restart_s: float
    """From a failure to the first new step: detection, start, checkpoint load."""
    interval_s: float
    """Training time from the start of a checkpoint to the start of the next."""
    stall_s: float
    """Training stands still per checkpoint."""
    write_s: float
    """Background write per checkpoint."""

    @property
    def mtbf_s(self) -> float:
        """Mean time between failures; infinite without failures."""
        return 1 / self.failures_per_s if self.failures_per_s else math.inf

    @property
    def period_s(self) -> float:
        """Wall-clock time from checkpoint start to checkpoint start, without failures."""
        return self.stall_s + max(self.interval_s, self.write_s)


def compute_goodput(c: FailureConditions) -> float:
    """Return the expected share of effective training time in a long run.

    Renewal reward: training ends in a failure at a time t after its start, exponential with rate L. The k-th
    checkpoint is complete `interval_s + stall_s + write_s + (k - 1) period_s` after the start, so
    exp(-L (interval + stall + write)) / (1 - exp(-L period)) checkpoints are expected, each worth
    `interval_s`. A restart that may fail takes (1 / E exp(-L restart) - 1) / L on average. With `write_s` = 0
    this is Daly's complete model (2006, equation 20).
    """
    rate = c.failures_per_s
    if not rate:
        return c.interval_s / c.period_s
    successful_restarts = math.exp(-rate * c.restart_s)
    # The first checkpoint counts after its write.
    first_s = c.interval_s + c.stall_s + c.write_s
    # expm1: 1 - exp(-x) for a small x
    num_checkpoints = math.exp(-rate * first_s) / -math.expm1(-rate * c.period_s)
    return rate * c.interval_s * num_checkpoints * successful_restarts


def find_best_interval_s(c: FailureConditions) -> float:
    """Return the training time between checkpoints with the highest goodput, between `write_s` and ten mean
    times between failures; infinite without failures."""
    if not c.failures_per_s:
        return math.inf
    # In logarithms: candidates range from seconds to months, and goodput is flat around its maximum.
    low, high = math.log(max(c.write_s, 1e-3)), math.log(10 * c.mtbf_s + c.write_s)
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):  # golden section: each iteration shrinks the bracket by 0.618
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        goodput_a, goodput_b = (compute_goodput(replace(c, interval_s=math.exp(x))) for x in (a, b))
        low, high = (low, b) if goodput_a >= goodput_b else (a, high)
    return math.exp((low + high) / 2)


@dataclass(frozen=True)
class CheckpointBytes:
    """Checkpoint bytes over all processes."""

    weights: int
    """Part `model`, or part `adapter` under LoRA."""
    optimizer: int
    """Moments and, under bf16, float32 master weights."""

    @property
    def total(self) -> int:
        return self.weights + self.optimizer


@dataclass(frozen=True)
class WriteTimes:
    """Seconds per checkpoint."""

    stall_s: float
    """Training waits: the copy to host memory or, without `train.async_save`, the whole write."""
    background_s: float
    """The write during training; after a failure before its end, the run restarts from the previous
    checkpoint."""


def count_checkpoint_bytes(config: RunConfig) -> CheckpointBytes:
    """Count a checkpoint's bytes, which do not depend on `config.parallel`."""
    return _count_checkpoint_bytes(config.model, config.lora, config.optim, config.train.precision,
                                   config.gpu.moment_dtype)


@functools.lru_cache(maxsize=64)
def _count_checkpoint_bytes(model: ModelConfig, lora: LoraConfig, optim: OptimConfig, precision: str,
                            moment_dtype: str) -> CheckpointBytes:
    item, state_bytes = ITEM_BYTES[precision], _get_state_bytes(precision, moment_dtype)
    weights = optimizer = 0
    # A run with adapters writes only the adapters.
    for tensor in _list_adapters(model, lora) if lora.on else _list_tensors(model):
        weights += tensor.num_elements * (FLOAT32_BYTES if tensor.is_bias else item)
        if not tensor.is_bias:
            optimizer += tensor.num_elements * state_bytes[_select_optimizer(optim, tensor)]
    return CheckpointBytes(weights, optimizer)


@dataclass(frozen=True)
class _Tensor:
    key: str
    num_elements: int
    is_matrix: bool
    """Whether the parameter has two axes, experts taken singly."""
    is_bias: bool = False
    """Whether it is a router's selection bias, which has no optimizer state."""


def _list_tensors(model: ModelConfig) -> list[_Tensor]:
    tensors = [_Tensor(weight.key.replace("{l}", str(layer)), weight.numel, len(weight.shape) == 2,
                       weight.is_buffer) for weight in layer_weights(model) for layer in weight.layers]
    return tensors + [_Tensor(key, math.prod(shape), len(shape) == 2)
                      for key, shape in encoder_shapes(model).items()]


def _list_adapters(model: ModelConfig, lora: LoraConfig) -> list[_Tensor]:
    return [_Tensor(key, math.prod(shape), len(shape) == 2)
            for module in find_adapted_modules(model, lora) for key, shape in module.shapes(lora).items()]


def _select_optimizer(optim: OptimConfig, tensor: _Tensor) -> str:
    """Return adamw, muon or frozen, as in `engine/optimizer/parameter_groups.py`."""
    # Muon orthogonalises matrices; AdamW updates the tables (embedding and head).
    uses_muon = tensor.is_matrix and tensor.key not in TABLES
    name: str = optim.name if uses_muon else "adamw"
    # No break: the last matching group wins.
    for group in optim.groups:
        if fnmatch.fnmatchcase(tensor.key, group.pattern):
            name = (group.optimizer or optim.name) if uses_muon else "adamw"
            if group.frozen:
                name = "frozen"
    return name


def _get_state_bytes(precision: str, moment_dtype: str) -> dict[str, int]:
    """Return optimizer -> state bytes per parameter."""
    if precision == "bf16":
        moment = BF16_BYTES if moment_dtype == "bf16" else FLOAT32_BYTES
        return {"adamw": FLOAT32_BYTES + 2 * moment, "muon": 2 * FLOAT32_BYTES, "frozen": 0}
    item = ITEM_BYTES[precision]
    return {"adamw": 2 * item, "muon": item, "frozen": 0}


def count_rank_bytes(config: RunConfig, num_ranks: int) -> int:
    """Return the maximum bytes that a process writes: weights on the first data-parallel rank, and its shard
    of the optimizer states. Adapters are small: a single process writes all."""
    if config.lora.on:
        return count_checkpoint_bytes(config).total
    p, item = config.parallel, ITEM_BYTES[config.train.precision]
    state = _get_state_bytes(config.train.precision, config.gpu.moment_dtype)[config.optim.name]
    # ZeRO-1 shards states over data- and context-parallel processes; experts have fewer replicas.
    shards = num_ranks // (p.tp * p.pp) if p.zero1 else 1
    expert_shards = num_ranks // (p.etp * p.ep * p.pp) if p.zero1 else 1
    return max(int((stage.dense + stage.experts) * item
                   + stage.dense * state / shards + stage.experts * state / expert_shards)
               for stage in count_stage_params(config))


def estimate_write_times(config: RunConfig, num_ranks: int, storage_bytes_per_s: float) -> WriteTimes:
    """Estimate the seconds per checkpoint, limited by the storage or by the fullest process."""
    size_bytes, rank_bytes = count_checkpoint_bytes(config).total, count_rank_bytes(config, num_ranks)
    background_s = max(size_bytes / storage_bytes_per_s, rank_bytes / PROCESS_WRITE_BYTES_PER_S)
    if not config.train.async_save:
        return WriteTimes(background_s, 0.0)
    return WriteTimes(rank_bytes / HOST_COPY_BYTES_PER_S, background_s)


@dataclass(frozen=True)
class Cost:
    """A run's time, energy and price."""

    hours: float
    """Wall-clock hours, failures included."""
    gpu_hours: float
    energy_kwh: float
    usd: float
    """At the typical GPU price, or the profile's."""
    usd_low: float
    """At the lowest published price; equal to `usd` for a price from the profile."""
    usd_high: float
    price_note: str
    """The price's source, as a clause."""

    @property
    def days(self) -> float:
        return self.hours / HOURS_PER_DAY


def estimate_cost(train_s: float, num_gpus: int, profile: ClusterProfile, effective_share: float = 1.0
                  ) -> Cost:
    """Estimate hours, energy and price.

    Args:
        train_s: seconds for all steps, without failures.
        num_gpus: number of GPUs.
        profile: price, power and site.
        effective_share: result from `compute_goodput`.

    Raises:
        UserError: the profile does not name its GPUs.
    """
    chip = profile.chip
    hours = train_s / effective_share / SECONDS_PER_HOUR
    gpu_hours = hours * num_gpus
    price = chip.price
    note = (f"{price.typical:.2f} USD for a GPU and hour, typical price of {price.date}, "
            f"{chip.sources['price']}")
    low, typical, high = price.low, price.typical, price.high
    if profile.price_per_gpu_hour:
        low = typical = high = profile.price_per_gpu_hour
        note = f"{typical:.2f} USD for a GPU and hour, price_per_gpu_hour of the profile"
    elif price.guess:
        note = f"a guess: {note}"
    power_kw = profile.power_per_gpu_w * DRAWN_SHARE / WATTS_PER_KW
    return Cost(hours, gpu_hours, gpu_hours * power_kw * profile.pue, gpu_hours * typical, gpu_hours * low,
                gpu_hours * high, note)
