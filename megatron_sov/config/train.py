"""The loop of training: how long, how large, how often, how exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from annotated_types import Gt, Le

from megatron_sov.config.bounds import MAX_BATCH_SIZE, Samples, Steps, Tokens
from megatron_sov.settings import AboveZero, AtLeastOne, Fraction, NotNegativeInt, Problem, find_broken

AverageKind = Literal["uniform", "linear", "ema"]
AVERAGES = get_args(AverageKind)
"""Ways to weigh the checkpoints of a mean."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how large, how often."""

    steps: Steps = 0
    """Optimizer steps; 0: as many as the token budgets need."""
    tokens: Tokens = 0
    """Token budget of the run, for phases without one of their own; used when `steps` is 0."""
    global_batch_size: Annotated[AtLeastOne, Le(MAX_BATCH_SIZE)] = 512
    """Samples of one optimizer step, over all processes."""
    ramp_from_batch_size: Samples = 0
    """Samples of the first step when the batch size ramps up to `global_batch_size`; 0: no ramp."""
    ramp_increment: Samples = 0
    """Samples by which the batch size grows at a time."""
    ramp_steps: Annotated[NotNegativeInt, Le(1_000_000)] = 0
    """Steps over which it grows, in equal stretches."""
    micro_batch_size: Annotated[AtLeastOne, Le(MAX_BATCH_SIZE)] = 1
    """Samples of one forward pass on one process."""
    seed: int = 1234
    """Seed of initial weights, data order and dropout."""
    precision: Literal["fp32", "bf16", "fp64"] = "bf16"
    """Dtype of weights and activations; bf16 keeps fp32 master weights and sums gradients in
    `gpu.grad_dtype`; fp64 is slow, for proofs that layouts agree."""
    fp8: Literal["none", "tensorwise", "blockwise", "mxfp8", "nvfp4", "delayed"] = "none"
    """Matrix products of the transformer layers in 8 bits (nvfp4: 4 bits), by Transformer Engine on a GPU
    (docs/fp8.md): one scale per tensor (tensorwise), per 128 values and 128 x 128 weights (blockwise), per 32
    values (mxfp8), per 16 values (nvfp4); delayed is refused, since its history is in no checkpoint."""
    fp8_format: Literal["auto", "e4m3", "hybrid"] = "auto"
    """8-bit format: e4m3 everywhere, or e5m2 for gradients (hybrid);
    auto: hybrid for tensorwise, else e4m3."""
    fp8_bf16_layers_at_start: NotNegativeInt = 0
    """Layers at the start of the trunk that stay in bf16 under `fp8`."""
    fp8_bf16_layers_at_end: NotNegativeInt = 0
    """Layers at the end of the trunk that stay in bf16 under `fp8`."""
    fp8_pad_routed_tokens: bool = False
    """Send each expert as many tokens as the products of `fp8` want, by routing some more to it with weight
    zero, instead of filling up copies behind the dispatcher."""
    deterministic: bool = False
    """The same bits in every run with the same settings on the same machines: slower algorithms where fast
    ones do not repeat."""
    hidden_dropout: Fraction = 0.0
    """Share of values dropped behind the embedding, attention and feed-forward layers;
    a function of seed, step and layout."""
    recompute: bool | Literal["selective"] = False
    """Recompute every layer's activations in the backward pass instead of storing them; selective: those of
    `gpu.recompute_modules` alone."""
    head_chunk_tokens: AtLeastOne = 2048
    """Tokens whose logits exist at a time; the output head runs in chunks of this many."""
    checkpoint_every_steps: AtLeastOne = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: NotNegativeInt = 2
    """How many of the newest checkpoints stay; 0 keeps all."""
    export_every_checkpoints: NotNegativeInt = 0
    """Every so many checkpoints, and the last one, become Hugging Face folders in RUN/exports beside
    training; 0: none."""
    average_last: Annotated[NotNegativeInt, Le(10_000)] = 0
    """When the run is complete, the mean of so many of its newest checkpoints becomes RUN/average, to
    evaluate or to start the next stage from; 0: none.  So many have to be kept."""
    average_weights: AverageKind = "uniform"
    """What each checkpoint of `average_last` weighs: the same; 1, 2, 3, ... in their order; or
    `average_decay` times what the one behind it weighs."""
    average_decay: Annotated[float, Gt(0), Le(1)] = 0.5
    """Of `average_weights` ema."""
    keep_every_steps: NotNegativeInt = 0
    """Checkpoints whose step is a multiple of this stay for ever, besides the newest; 0: none."""
    async_save: bool = True
    """Write checkpoints in the background while training goes on; needs host memory for what
    each process writes."""
    save_timeout_s: AboveZero = 1800.0
    """Seconds after which a checkpoint that is still not on disk (a file system that hangs) ends the run."""
    eval_every_steps: NotNegativeInt = 500
    """Steps between evaluations on held-out documents; 0: only at the end."""
    log_every_steps: AtLeastOne = 1
    """Steps between `step` events."""
    max_restarts: NotNegativeInt = 3
    """How often the local launcher starts the processes again after a fault, from the last checkpoint,
    without a new checkpoint in between; under torchrun or Slurm they restart the ranks."""
    num_threads: Annotated[NotNegativeInt, Le(4096)] = 0
    """CPU threads of each process; 0: as OMP_NUM_THREADS says, else cores divided by local processes."""

    def problems(self) -> list[Problem]:
        """Return every rule that these settings break by themselves."""
        ramp_from, every = self.ramp_from_batch_size, self.checkpoint_every_steps
        return find_broken(
            self, "train",
            (ramp_from <= self.global_batch_size, "ramp_from_batch_size",
             f"must be at most train.global_batch_size = {self.global_batch_size}"),
            (not ramp_from or (self.ramp_increment > 0 and self.ramp_steps > 0), "ramp_from_batch_size",
             "needs train.ramp_increment and train.ramp_steps above 0"),
            (self.average_last != 1, "average_last", "must be 0, or from 2 to 10,000"),
            (not self.keep_checkpoints or self.average_last <= self.keep_checkpoints, "average_last",
             f"must be at most train.keep_checkpoints = {self.keep_checkpoints}: the others are deleted "
             "before"),
            (self.keep_every_steps % every == 0, "keep_every_steps",
             f"must be a multiple of train.checkpoint_every_steps = {every}, or 0"))
