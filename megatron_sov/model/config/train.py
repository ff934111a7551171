"""Settings of the loop of training (how long, how large, how exact), of its optimizer, and of what
watches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

from annotated_types import Ge, Gt, Le

from megatron_sov.base.settings import (
    AboveZero, ActsWhen, AllOf, AnyOf, AtLeastOne, Finite, Fraction, NotNegative, NotNegativeInt,
    SettingsProblem, Share, find_broken, is_none_of, is_one_of, is_set)
from megatron_sov.model.config.bounds import MAX_BATCH_SIZE, Samples, Steps, Tokens
from megatron_sov.model.config.learning import NOT_EXTENDING, learns, learns_without_rounds, stages_leave

Algorithm = Literal["adamw", "muon"]
Schedule = Literal["cosine", "wsd", "linear", "inverse_sqrt", "constant"]


@dataclass(frozen=True)
class GroupConfig:
    """Parameters that are updated otherwise than the rest, by the names of their tensors."""

    pattern: str
    """Names of tensors as in a checkpoint's model.index.json, with * for any text:
    `decoder.layers.0.*`, `*router.weight`."""
    lr_scale: NotNegative = 1.0
    """Factor on the learning rate."""
    weight_decay: NotNegative | None = None
    """Weight decay, of norms too; null: as without the group."""
    optimizer: Algorithm | None = None
    """What updates the matrices among them; null: `optim.name`.  Embeddings,
    heads and vectors are always AdamW's."""
    frozen: bool = False
    """Whether they stay as they are, bit for bit: no gradients, no optimizer state."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate schedule."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "lr": stages_leave("lr"),
        "min_lr": AnyOf(is_none_of(".schedule", "constant"),
                         is_none_of("data.phases.*.schedule", None, "constant")),
        "warmup_tokens": is_one_of(".schedule_by", "tokens"),
        "decay_share decay_form": AnyOf(is_one_of(".schedule", "wsd"),
                                         is_one_of("data.phases.*.schedule", "wsd")),
        "muon_momentum muon_nesterov muon_ns_steps muon_ns_coefficients muon_scale": AnyOf(
            is_one_of(".name", "muon"), is_one_of("optim.groups.*.optimizer", "muon"))}

    name: Algorithm = "adamw"
    """adamw, for all parameters; muon: matrices by Muon (Q, K and V, gate and up, and every expert on its
    own), embeddings, head, norms and biases by AdamW."""
    lr: AboveZero = 2.5e-4
    """Peak learning rate."""
    min_lr: NotNegative = 3e-6
    """Learning rate at the end of the decay; where only `optim.lr` is set, the recipe's share of it."""
    schedule: Schedule = "cosine"
    """What follows the warm-up.  cosine, linear: decay to `min_lr` over the rest; wsd: stable, decay over the
    last `decay_share`; inverse_sqrt: falls as 1 / sqrt(step), not below `min_lr`; constant."""
    schedule_by: Literal["steps", "tokens"] = "steps"
    """What warm-up and decay are counted in; it matters while the batch size ramps up,
    and where phases differ in theirs."""
    warmup_steps: NotNegativeInt = 2000
    """Optimizer steps of linear warm-up, at most half the run."""
    warmup_tokens: NotNegativeInt = 0
    """Tokens of linear warm-up when `schedule_by` is tokens, padding counted in."""
    decay_share: Annotated[float, Gt(0), Le(1)] = 0.2
    """wsd only: last part of the run over which the rate decays."""
    decay_form: Literal["linear", "cosine", "one_minus_sqrt"] = "linear"
    """wsd only: how it decays (one_minus_sqrt: arXiv 2405.18392)."""
    rewarm: tuple[tuple[NotNegativeInt, AtLeastOne], ...] = ()
    """[step, steps]: behind that optimizer step the rate climbs anew, from 0 to the schedule's, over so many
    steps.  May be added to a run that is resumed, from its checkpoint on."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay on matrices (not on norms and biases)."""
    beta1: Fraction = 0.9
    """AdamW's first moment decay."""
    beta2: Fraction = 0.95
    """AdamW's second moment decay."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """AdamW's epsilon."""
    muon_momentum: Fraction = 0.95
    """Muon's momentum decay."""
    muon_nesterov: bool = True
    """Muon: orthogonalise the gradient mixed with the new momentum once more, not the momentum alone."""
    muon_ns_steps: Annotated[int, Ge(1), Le(100)] = 5
    """Muon: Newton-Schulz iterations, in the dtype of `train.precision`."""
    muon_ns_coefficients: tuple[Finite, Finite, Finite] = (3.4445, -4.7750, 2.0315)
    """Muon: a, b, c of x <- a x + b (x x^T) x + c (x x^T)^2 x."""
    muon_scale: Literal["match_rms_adamw", "original", "spectral"] = "match_rms_adamw"
    """Factor on a matrix's update [rows (out), columns (in)].  match_rms_adamw: 0.2 sqrt(max(rows, columns)),
    updates as large as AdamW's, whose rates then serve (arXiv 2502.16982); original: sqrt(max(1, rows /
    columns)); spectral: sqrt(rows / columns)."""
    clip_grad: Annotated[float, Ge(0)] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    groups: tuple[GroupConfig, ...] = ()
    """Exceptions for parameters by name; where several match a name, the last one holds."""

    def problems(self) -> list[SettingsProblem]:
        """Return every rule that these settings break."""
        return find_broken(
            self, "optim",
            (self.min_lr <= self.lr, "min_lr", f"must be at most optim.lr = {self.lr:g}"),
            (self.schedule_by == "steps" or self.warmup_tokens > 0 or not self.warmup_steps, "schedule_by",
             "counts the warm-up in tokens, and optim.warmup_steps = "
             f"{self.warmup_steps} would be none", "set optim.warmup_tokens, or optim.warmup_steps=0"))


# What watches a run while it trains, and what it then does.

@dataclass(frozen=True)
class GuardConfig:
    """Guards: steps that are refused, hangs, silent corruption, slow processes, collapsing experts."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "window_steps sigma rollback_after_skips attribute": is_set(".skip"),
        "window_steps": is_set(".sigma"),
        "straggler_ratio": is_set(".straggler_every_steps"),
        "routing_every_steps": is_set("model.num_experts"),
        "min_load_entropy dead_after_records max_bias_spread": AllOf(
            is_set("model.num_experts"), is_set(".routing_every_steps")),
        "max_bias_spread": is_set("model.router_bias")}

    skip: bool = True
    """Refuse the update of a step whose loss or gradient norm is not finite or a spike; off: a number that is
    not finite ends the run."""
    window_steps: Annotated[int, Ge(20)] = 128
    """Steps whose loss and gradient norm say what is usual, once there are half as many, at least 20."""
    sigma: NotNegative = 6.0
    """A spike lies so many standard deviations above the mean of the window; 0:
    only numbers that are not finite count."""
    attribute: bool = False
    """Compute a refused step again at once, and say whether a process (which is named), the data (whose
    documents are named) or the optimisation is at fault; costs a pass over the gradients in every step."""
    rollback_after_skips: NotNegativeInt = 4
    """So many steps in a row that are refused for their loss, or for numbers that are not finite, take
    weights and optimizer back to the last good checkpoint, and all samples since then are
    passed over; 0: never."""
    hang_timeout_s: NotNegative = 1500.0
    """Seconds that a step may last before every process writes its stacks into RUN/hang and ends with exit
    code 76; must be longer than the slowest step; 0: no watch. (Collectives give up by
    themselves after `parallel.timeout_s`.)"""
    compare_replicas: bool = True
    """Before each checkpoint, compare the weights of processes that must hold the same, bit for bit."""
    probe_every_steps: NotNegativeInt = 0
    """Every so many steps each process computes a micro-batch twice and compares the gradients,
    bit for bit; 0: never."""
    on_sdc: Literal["exit", "record"] = "exit"
    """When replicas or repetitions differ: end with exit code 77 before the next checkpoint,
    or record it and go on."""
    straggler_every_steps: NotNegativeInt = 100
    """Steps over which each process's computing time is averaged for the report; 0: never."""
    straggler_ratio: Annotated[float, Gt(1)] = 1.5
    """A process that computes so many times longer than the median one is named as slow."""
    routing_every_steps: NotNegativeInt = 20
    """Steps between records of each layer's routing, from which alarms are raised; 0: never."""
    min_load_entropy: Share = 0.5
    """Alarm when the entropy of a layer's expert load, as a share of that of an even
    load, falls below this."""
    dead_after_records: AtLeastOne = 5
    """Alarm when an expert got no token in so many routing records in a row."""
    max_bias_spread: Annotated[float, Gt(0)] = 1.0
    """Alarm when a layer's selection biases lie further apart: scores lie in (0, 1),
    so the biases alone then choose."""


# Where a run is watched from outside its folder.

@dataclass(frozen=True)
class ObsConfig:
    """Where a run is watched, in addition to events.jsonl and the progress bar."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "wandb_project": is_set(".wandb"),
        "sample_rows": learns("policy")}

    tensorboard: bool = False
    """Write TensorBoard files into RUN/tensorboard (extra `dev`)."""
    wandb: bool = False
    """Log to Weights & Biases; works offline with WANDB_MODE=offline (extra `dev`)."""
    wandb_project: str = "megatron-sov"
    """Weights & Biases project."""
    sample_rows: Annotated[int, Ge(0), Le(100)] = 8
    """Responses of `rl` that trackers and the report are given as a table, of at most 100 of a run's rounds
    and as many of its validations; 0: none, and no text leaves the run."""


AverageKind = Literal["uniform", "linear", "ema"]
AVERAGES = get_args(AverageKind)
"""Ways to weigh the checkpoints of a mean."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how large, how often."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "steps tokens": AllOf(learns_without_rounds("leave it out, and set rollout.rounds"),
                               stages_leave("steps"), stages_leave("tokens")),
        "global_batch_size": stages_leave("global_batch_size"),
        "epochs": NOT_EXTENDING,
        "max_hours": learns("sft", "preference", "distill"),
        "ramp_increment ramp_steps": is_set(".ramp_from_batch_size"),
        "fp8_format fp8_bf16_layers_at_start fp8_bf16_layers_at_end fp8_pad_routed_tokens fp8_weights":
            is_none_of(".fp8", "none"),
        "fp8_format": is_none_of(".fp8", "nvfp4"),
        "fp8_pad_routed_tokens": is_set("model.num_experts"),
        "average_weights average_decay": is_set(".average_last"),
        "average_decay": is_one_of(".average_weights", "ema")}

    steps: Steps = 0
    """Optimizer steps; 0: as many as the token budgets need."""
    tokens: Tokens = 0
    """Token budget of the run; setting it scales the budgets or steps of all phases in proportion."""
    epochs: Annotated[float, Ge(0), Le(10_000)] = 0.0
    """Passes over all data, from which `steps` follows (`rl`: passes over the prompts, from which
    `rollout.rounds` follows); 0: not used."""
    max_hours: NotNegative = 48.0
    """sft, prefer, distill: hours that the run may be expected to take on this machine at least; one that
    takes longer is refused before it starts.  0: any."""
    global_batch_size: Annotated[AtLeastOne, Le(MAX_BATCH_SIZE)] = 512
    """Samples of one optimizer step, over all processes."""
    ramp_from_batch_size: Samples = 0
    """Samples of the first step when the batch size ramps up to `global_batch_size`; 0: no ramp."""
    ramp_increment: Samples = 0
    """Samples by which the batch size grows at a time."""
    ramp_steps: Annotated[NotNegativeInt, Le(1_000_000)] = 0
    """Steps over which it grows, in equal stretches."""
    micro_batch_size: Annotated[AtLeastOne, Le(MAX_BATCH_SIZE)] = 1
    """Samples of one forward pass on one process.  rl: rows at most; unless it is set, as many as hold the
    responses to one prompt, bounded by memory (docs/rl.md)."""
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
    fp8_weights: bool = False
    """Keep the weights that `fp8` quantises in 8 bits alone, beside their float32 masters, and not in bf16 as
    well; tensorwise and blockwise then gather one byte of each after an update. Needs `parallel.zero1`."""
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
    """Steps between checkpoints; one is always written at the end.  Reinforcement learning: 10 rounds at
    most, unless it is set."""
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

    def problems(self) -> list[SettingsProblem]:
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
