"""What keeps a run going and what that costs: checkpoints, failures, money.

A run works for `interval_s`, is held up for `stall_s` while it copies its state, and goes on while the copy
is written for `write_s`; the next checkpoint waits for the one before, as `checkpoint/save.py`
has it.  Whatever ends the run takes it back to the newest checkpoint that is there whole, and costs the time
of a restart, during which it can fail again.  Failures come independently of each other and of the run's age
(a Poisson process), as published ones nearly do.
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


@dataclass(frozen=True)
class FailureConditions:
    failures_per_s: float
    restart_s: float
    """From a failure to the first new step: noticed, started, checkpoint loaded."""
    interval_s: float
    """Work between the beginnings of two checkpoints."""
    stall_s: float
    """How long a checkpoint holds up the run."""
    write_s: float
    """How long it is written beside the training until it is there."""

    @property
    def mtbf_s(self) -> float:
        """Mean time between failures; infinite where there are none."""
        return 1 / self.failures_per_s if self.failures_per_s else math.inf

    @property
    def period_s(self) -> float:
        """Time from the beginning of a checkpoint to that of the next, without failures."""
        return self.stall_s + max(self.interval_s, self.write_s)


def compute_conditions(profile: ClusterProfile, num_gpus: int, interval_s: float, stall_s: float,
               write_s: float) -> FailureConditions:
    return FailureConditions(profile.failures_per_gpu_year * num_gpus / SECONDS_PER_YEAR,
                      profile.restart_s, interval_s, stall_s, write_s)


def compute_goodput(c: FailureConditions) -> float:
    """Return the expected effective training time of a long run with nodes enough.

    Renewal reward: between two starts of training lies one failure, after a time t that is exponential with
    rate L.  The k-th checkpoint is there `interval_s + stall_s + write_s + (k - 1) period_s` after the start,
    so exp(-L (interval + stall + write)) / (1 - exp(-L period)) of them are expected, each worth
    `interval_s`.  A restart that may fail itself takes (1 / E exp(-L restart) - 1) / L on average.  Without a
    background (`write_s` = 0) this is Daly's complete model (2006, equation 20).
    """
    rate = c.failures_per_s
    if not rate:
        return c.interval_s / c.period_s
    # The share of restarts that are not themselves hit by a failure.
    survives = math.exp(-rate * c.restart_s)
    # The first checkpoint counts only when it is written, so work before that is lost with a failure.
    first = c.interval_s + c.stall_s + c.write_s
    # expm1: 1 - exp(-x) of a small x
    kept = math.exp(-rate * first) / -math.expm1(-rate * c.period_s)
    return rate * c.interval_s * kept * survives


def find_best_interval_s(c: FailureConditions) -> float:
    """Return the work between checkpoints at which `goodput` is highest: at least as long as one is written,
    and never longer than some mean times between failures; infinite without failures."""
    if not c.failures_per_s:
        return math.inf
    # In logarithms: candidates go from seconds to months, and goodput is flat around its best.
    low, high = math.log(max(c.write_s, 1e-3)), math.log(10 * c.mtbf_s + c.write_s)
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):  # golden section: the bracket shrinks by 0.618 each time
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        of_a, of_b = (compute_goodput(replace(c, interval_s=math.exp(x))) for x in (a, b))
        low, high = (low, b) if of_a >= of_b else (a, high)
    return math.exp((low + high) / 2)


# What a checkpoint holds, how long it takes to write, and how often it is worth it.


HOST_COPY_BYTES_PER_S = 20e9
"""From a GPU to pinned host memory: PCIe 4.0 has 32 GB/s, 5.0 64, of which a copy reaches about two thirds of
the slower.  Our choice; not measured yet."""
PROCESS_WRITE_BYTES_PER_S = 0.6e9
"""What one process hashes, writes and syncs at least: 0.65 to 0.8 GB/s with two cores and one disk, which is
what held it up there (benchmarks/results/checkpoint_speed.txt)."""


@dataclass(frozen=True)
class CheckpointBytes:
    weights: int
    """Of the part `model`, or of a frozen model's `adapter`."""
    optimizer: int
    """Moments and, under bf16, float32 master weights."""

    @property
    def total(self) -> int:
        return self.weights + self.optimizer


@dataclass(frozen=True)
class WriteTimes:
    stall_s: float
    """In which the run stands still: the copy into host memory or, without `train.async_save`, all of it."""
    background_s: float
    """Until it is there, beside the training; a failure before then goes back to the checkpoint before."""


def count_checkpoint_bytes(config: RunConfig) -> CheckpointBytes:
    """Return the bytes of a run's checkpoint; the layout has no part in them."""
    return _count_checkpoint_bytes(config.model, config.lora, config.optim, config.train.precision,
                                   config.gpu.moment_dtype)


@functools.lru_cache(maxsize=64)
def _count_checkpoint_bytes(model: ModelConfig, lora: LoraConfig, optim: OptimConfig, precision: str,
           moment: str) -> CheckpointBytes:
    item, states = ITEM_BYTES[precision], _get_state_bytes(precision, moment)
    weights = optimizer = 0
    # A run with adapters writes these alone; the frozen base is a checkpoint of its own.
    for tensor in _list_adapters(model, lora) if lora.on else _list_tensors(model):
        weights += tensor.num_elements * (FLOAT32_BYTES if tensor.is_bias else item)
        optimizer += tensor.num_elements * (0 if tensor.is_bias else states[_select_optimizer(optim, tensor)])
    return CheckpointBytes(weights, optimizer)


@dataclass(frozen=True)
class _Tensor:
    key: str
    num_elements: int
    is_matrix: bool
    """Whether the parameter, an expert's by itself, has two axes."""
    is_bias: bool = False
    """Whether it is a router's selection bias, which no optimizer updates."""


def _list_tensors(model: ModelConfig) -> list[_Tensor]:
    found = [_Tensor(weight.key.replace("{l}", str(layer)), weight.numel, len(weight.shape) == 2,
                     weight.is_buffer) for weight in layer_weights(model) for layer in weight.layers]
    return found + [_Tensor(key, math.prod(shape), len(shape) == 2)
                    for key, shape in encoder_shapes(model).items()]


def _list_adapters(model: ModelConfig, lora: LoraConfig) -> list[_Tensor]:
    return [_Tensor(key, math.prod(shape), len(shape) == 2)
            for of in find_adapted_modules(model, lora) for key, shape in of.shapes(lora).items()]


def _select_optimizer(optim: OptimConfig, tensor: _Tensor) -> str:
    """Return what updates a tensor, or "frozen", as `engine/optimizer/parameter_groups.py` has it."""
    # Muon orthogonalises matrices; embeddings and head are looked up by rows, so they stay AdamW's.
    may = tensor.is_matrix and tensor.key not in TABLES
    found: str = optim.name if may else "adamw"
    # No break: where several groups match, the last one holds.
    for group in optim.groups:
        if fnmatch.fnmatchcase(tensor.key, group.pattern):
            chosen = group.optimizer or optim.name
            found = "frozen" if group.frozen else (chosen if may else "adamw")
    return found


def _get_state_bytes(precision: str, moment: str) -> dict[str, int]:
    """Return the bytes of a parameter's state by what updates it."""
    if precision == "bf16":
        of_moment = BF16_BYTES if moment == "bf16" else FLOAT32_BYTES
        return {"adamw": FLOAT32_BYTES + 2 * of_moment, "muon": 2 * FLOAT32_BYTES, "frozen": 0}
    item = ITEM_BYTES[precision]
    return {"adamw": 2 * item, "muon": item, "frozen": 0}


def count_rank_bytes(config: RunConfig, num_ranks: int) -> int:
    """Return what the process that writes most writes: of data-parallel processes that hold the same weights
    the first one, and of the state its share under ZeRO-1, or all.  An adapter is taken as if one process
    wrote it alone: it is small."""
    if config.lora.on:
        return count_checkpoint_bytes(config).total
    p, item = config.parallel, ITEM_BYTES[config.train.precision]
    state = _get_state_bytes(config.train.precision, config.gpu.moment_dtype)[config.optim.name]
    # Under ZeRO-1 the state is shared by the data- and context-parallel processes; experts have fewer
    # copies.
    shards, expert_shards = ((num_ranks // (p.tp * p.pp), num_ranks // (p.etp * p.ep * p.pp)) if p.zero1
                             else (1, 1))
    return max(int((held.dense + held.experts) * item
                   + held.dense * state / shards + held.experts * state / expert_shards)
               for held in count_stage_params(config))


def estimate_write_times(config: RunConfig, num_ranks: int, storage_bytes_per_s: float) -> WriteTimes:
    size_bytes, of_one = count_checkpoint_bytes(config).total, count_rank_bytes(config, num_ranks)
    # Either the shared storage is the bottleneck, or the fullest process's own hashing and writing.
    background_s = max(size_bytes / storage_bytes_per_s, of_one / PROCESS_WRITE_BYTES_PER_S)
    if not config.train.async_save:
        return WriteTimes(background_s, 0.0)
    return WriteTimes(of_one / HOST_COPY_BYTES_PER_S, background_s)


# A run on a cluster: its checkpoints, how often they are worth it, and what failures leave of its time.


LEAST_SHARE = 1e-3
"""Effective training time below which a run is refused: it would hardly move."""


@dataclass(frozen=True)
class Operation:
    checkpoint_bytes: int
    stall_s: float
    """How long one holds up the run."""
    write_s: float
    """How long one is written beside the training."""
    interval_steps: int
    """Steps between checkpoints (`train.checkpoint_every_steps`) that leave most of the time for training;
    without failures as many as there are."""
    interval_s: float
    """The same in seconds of training."""
    mtbf_s: float
    """Mean time between failures of the whole run; infinite without any."""
    effective_share: float
    """Expected share of the time in which work is done for good."""
    storage_known: bool
    """Whether the profile says what its storage takes; else `write_s` is what the processes could write at
    best."""


def plan_operation(config: RunConfig, profile: ClusterProfile, num_gpus: int, step_s: float,
              num_steps: int) -> Operation:
    """Return how a run is best kept going on a cluster, with nodes enough in the place of broken ones.

    Raises:
        UserError: it fails so often that it comes to nothing.
    """
    storage = profile.storage_write_gbytes_per_s * 1e9
    times = estimate_write_times(config, num_gpus, storage or math.inf)
    c = compute_conditions(profile, num_gpus, step_s, times.stall_s, times.background_s)
    # Never shorter than a write: the next checkpoint would wait for the one before.
    steps = max(1, math.ceil(times.background_s / step_s),
                round(min(find_best_interval_s(c) / step_s, num_steps)))
    c = replace(c, interval_s=steps * step_s)
    if compute_goodput(c) < LEAST_SHARE:
        takes_s = times.stall_s + times.background_s
        raise UserError(f"failures_per_gpu_year = {profile.failures_per_gpu_year:g} and restart_s = "
                        f"{profile.restart_s:g} leave {num_gpus:,} GPUs no time to train: something fails "
                        f"every {c.mtbf_s:.3g} s, and a checkpoint takes {takes_s:.3g} s; plan with fewer "
                        "GPUs, or with what the cluster really has (0.17 and 600 are the defaults)")
    return Operation(count_checkpoint_bytes(config).total, times.stall_s, times.background_s, steps,
                     c.interval_s, c.mtbf_s, compute_goodput(c), bool(storage))


# What a run costs: days, GPU-hours, energy, money.


DRAWN_SHARE = 0.82
"""What a node draws while it trains, of the most that its maker allows for: 8.4 kW measured at most, of the
10.2 kW of 8 H100 (Latif et al., arXiv 2412.08602)."""
WATTS_PER_KW = 1000


@dataclass(frozen=True)
class Cost:
    hours: float
    """From beginning to end, failures included."""
    gpu_hours: float
    energy_kwh: float
    usd: float
    """What it is worth at the typical price, or at the profile's own."""
    usd_low: float
    """At the lowest price that was found; the profile's own is no range."""
    usd_high: float
    price_note: str
    """Where the price comes from, for people."""

    @property
    def days(self) -> float:
        return self.hours / HOURS_PER_DAY


def estimate_cost(
    train_s: float,
    num_gpus: int,
    profile: ClusterProfile,
     effective_share: float = 1.0) -> Cost:
    """Return what a run costs.

    Args:
        train_s: seconds of its steps, each counted once.
        num_gpus: GPUs that it holds.
        profile: where it runs: price, power, site.
        effective_share: share of the time in which work is done for good (`failures.goodput`).

    Raises:
        UserError: the profile does not say which GPUs it has.
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
