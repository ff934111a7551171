"""Training loop, optimizer, guard and tracker settings."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

from annotated_types import Ge, Gt, Le

from megatron_sov.base.settings import (
    AboveZero, ActsWhen, AllOf, AnyOf, AtLeastOne, Finite, Fraction, NotNegative, NotNegativeInt,
    SettingsProblem, Share, find_broken_rules, is_none_of, is_one_of, is_set)
from megatron_sov.model.config.bounds import MAX_BATCH_SIZE, Samples, Steps, Tokens
from megatron_sov.model.config.learning import NOT_EXTENDING, has_no_rounds, has_objective, is_open_in_stage

Algorithm = Literal["adamw", "muon"]
Schedule = Literal["cosine", "wsd", "linear", "inverse_sqrt", "constant"]
AverageKind = Literal["uniform", "linear", "ema"]
AVERAGES = get_args(AverageKind)
"""Values for `train.average_weights`."""


@dataclass(frozen=True)
class GroupConfig:
    """Optimizer settings for parameters selected by tensor name."""

    pattern: str
    """Tensor names as in a checkpoint's model.index.json, with * for any text: `decoder.layers.0.*`,
    `*router.weight`."""
    lr_scale: NotNegative = 1.0
    """Factor on the learning rate."""
    weight_decay: NotNegative | None = None
    """Weight decay, for norms too. null: as without this group."""
    optimizer: Algorithm | None = None
    """Optimizer for the group's matrices. null: `optim.name`. Embeddings, output heads and vectors always use
    AdamW."""
    frozen: bool = False
    """Keep the parameters unchanged, without gradients and optimizer state."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate schedule."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "lr": is_open_in_stage("lr"),
        "min_lr": AnyOf(is_none_of(".schedule", "constant"),
                         is_none_of("data.phases.*.schedule", None, "constant")),
        "warmup_tokens": is_one_of(".schedule_by", "tokens"),
        "decay_share decay_form": AnyOf(is_one_of(".schedule", "wsd"),
                                         is_one_of("data.phases.*.schedule", "wsd")),
        "muon_momentum muon_nesterov muon_ns_steps muon_ns_coefficients muon_scale": AnyOf(
            is_one_of(".name", "muon"), is_one_of("optim.groups.*.optimizer", "muon"))}

    name: Algorithm = "adamw"
    """adamw: AdamW for all parameters; muon: Muon for matrices (Q, K, V, gate, up and every expert
    separately), AdamW for embeddings, output head, norms and biases."""
    lr: AboveZero = 2.5e-4
    """Peak learning rate."""
    min_lr: NotNegative = 3e-6
    """Learning rate after the decay. If you set only `optim.lr`, the recipe's ratio `min_lr` / `lr`
    applies."""
    schedule: Schedule = "cosine"
    """Learning rate after warm-up. cosine, linear: decay to `min_lr`; wsd: stable, then decay over the last
    `decay_share`; inverse_sqrt: 1 / sqrt(step), not below `min_lr`; constant."""
    schedule_by: Literal["steps", "tokens"] = "steps"
    """Unit in which warm-up and decay are counted. It matters if the batch size ramps up or differs between
    phases."""
    warmup_steps: NotNegativeInt = 2000
    """Linear warm-up in optimizer steps, at most half the run."""
    warmup_tokens: NotNegativeInt = 0
    """Linear warm-up in tokens with `schedule_by=tokens`, padding included."""
    decay_share: Annotated[float, Gt(0), Le(1)] = 0.2
    """wsd: share of the run, at its end, in which the learning rate decays."""
    decay_form: Literal["linear", "cosine", "one_minus_sqrt"] = "linear"
    """wsd: decay shape (one_minus_sqrt: arXiv 2405.18392)."""
    rewarm: tuple[tuple[NotNegativeInt, AtLeastOne], ...] = ()
    """Pairs [step, steps]: after optimizer step `step`, the learning rate rises again from 0 to the
    schedule's value over `steps` steps. You can add a pair to a resumed run, from its checkpoint onwards."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay on matrices (not on norms and biases)."""
    beta1: Fraction = 0.9
    """AdamW's decay for the first moment."""
    beta2: Fraction = 0.95
    """AdamW's decay for the second moment."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """AdamW's epsilon."""
    muon_momentum: Fraction = 0.95
    """Muon's momentum decay."""
    muon_nesterov: bool = True
    """Muon: orthogonalise the gradient plus momentum (Nesterov) instead of the momentum alone."""
    muon_ns_steps: Annotated[int, Ge(1), Le(100)] = 5
    """Muon: Newton-Schulz iterations, in `train.precision`'s dtype."""
    muon_ns_coefficients: tuple[Finite, Finite, Finite] = (3.4445, -4.7750, 2.0315)
    """Muon: a, b, c in the iteration x <- a x + b (x x^T) x + c (x x^T)^2 x."""
    muon_scale: Literal["match_rms_adamw", "original", "spectral"] = "match_rms_adamw"
    """Muon: factor on a matrix update [rows (out), columns (in)]. match_rms_adamw: 0.2 sqrt(max(rows,
    columns)), so updates have AdamW's size and AdamW's learning rates apply (arXiv 2502.16982); original:
    sqrt(max(1, rows / columns)); spectral: sqrt(rows / columns)."""
    clip_grad: Annotated[float, Ge(0)] = 1.0
    """Maximum global gradient norm. 0: no clipping."""
    groups: tuple[GroupConfig, ...] = ()
    """Exceptions for parameters selected by name; the last matching group applies."""

    def problems(self) -> list[SettingsProblem]:
        """Return every violated rule between optimizer settings."""
        return find_broken_rules(
            self, "optim", (self.lr <= 1, "lr", "must be at most 1", f"a usual rate is {self.lr:g}e-5"),
            (self.min_lr <= self.lr, "min_lr", f"must be at most optim.lr = {self.lr:g}"),
            (self.schedule_by == "steps" or self.warmup_tokens > 0 or not self.warmup_steps, "schedule_by",
             f"= tokens ignores optim.warmup_steps = {self.warmup_steps}",
             "set optim.warmup_tokens, or optim.warmup_steps=0"))


@dataclass(frozen=True)
class GuardConfig:
    """Checks during training: loss spikes, hangs, silent data corruption, slow processes, collapsing
    experts."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "window_steps sigma rollback_after_skips": is_set(".skip"),
        "window_steps": is_set(".sigma"), "straggler_ratio": is_set(".straggler_every_steps"),
        "routing_every_steps": is_set("model.num_experts"),
        "min_load_entropy dead_after_records max_bias_spread": AllOf(
            is_set("model.num_experts"), is_set(".routing_every_steps")),
        "max_bias_spread": is_set("model.router_bias")}

    skip: bool = True
    """Reject a step's update if its loss or gradient norm is not finite or spikes. False: a value that is not
    finite ends the run."""
    window_steps: Annotated[int, Ge(20)] = 128
    """Recent steps that define the normal range for loss and gradient norm. Spikes are detected once half the
    window, and at least 20 steps, are filled."""
    sigma: NotNegative = 6.0
    """Standard deviations above the window's mean at which a value counts as a spike. 0: reject only values
    that are not finite."""
    rollback_after_skips: NotNegativeInt = 4
    """Consecutive rejected steps (for loss or values that are not finite) after which weights and optimizer
    return to the last good checkpoint; samples since that checkpoint are skipped. 0: never."""
    hang_timeout_s: NotNegative = 1500.0
    """Seconds without a finished step after which every process writes stack traces into RUN/hang and exits
    with code 76. Choose it longer than the slowest step; collectives time out after `parallel.timeout_s`.
    After 20 steps the limit is 10 times the median step, at least 60 seconds and at most this. 0: off."""
    compare_replicas: bool = True
    """Before each checkpoint, compare weights bit for bit between processes that hold copies."""
    probe_every_steps: NotNegativeInt = 0
    """Steps between probes, in which each process computes a micro-batch twice and compares the gradients bit
    for bit. 0: never."""
    on_sdc: Literal["exit", "record"] = "exit"
    """Reaction to silent data corruption (different replicas or repetitions). exit: end with code 77 before
    the next checkpoint; record: write an event and continue."""
    straggler_every_steps: NotNegativeInt = 100
    """Steps over which each process's compute time is averaged for the report. 0: never."""
    straggler_ratio: Annotated[float, Gt(1)] = 1.5
    """Compute time relative to the median process at which a process is reported as slow."""
    routing_every_steps: NotNegativeInt = 20
    """Steps between expert routing records per layer, which can raise alarms. 0: never."""
    min_load_entropy: Share = 0.5
    """Alarm if a layer's expert load entropy, relative to a uniform load, falls below this share."""
    dead_after_records: AtLeastOne = 5
    """Alarm if an expert received no token in this many consecutive routing records."""
    max_bias_spread: Annotated[float, Gt(0)] = 1.0
    """Alarm if a layer's selection biases differ by more than this. Router scores are between 0 and 1, so
    larger differences let biases alone choose experts."""


@dataclass(frozen=True)
class ObsConfig:
    """Trackers for a run, in addition to events.jsonl and the progress bar."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "wandb_project": is_set(".wandb"), "sample_rows": has_objective("policy")}

    tensorboard: bool = False
    """Write TensorBoard files into RUN/tensorboard (extra `dev`)."""
    wandb: bool = False
    """Log to Weights & Biases; works offline with WANDB_MODE=offline (extra `dev`)."""
    wandb_project: str = "megatron-sov"
    """Weights & Biases project name."""
    sample_rows: Annotated[int, Ge(0), Le(100)] = 8
    """rl: responses sent to trackers and shown in the report as a table, for up to 100 rounds and 100
    validations. 0: none, so no text leaves the run folder."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop: length, batch size, precision, checkpoints and evaluation intervals."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "steps tokens": AllOf(has_no_rounds("leave it out, and set rollout.rounds"),
                               is_open_in_stage("steps"), is_open_in_stage("tokens")),
        "global_batch_size": is_open_in_stage("global_batch_size"), "epochs": NOT_EXTENDING,
        "max_hours": has_objective("sft", "preference", "distill"),
        "ramp_increment ramp_steps": is_set(".ramp_from_batch_size"),
        "fp8_format fp8_bf16_layers_at_start fp8_bf16_layers_at_end fp8_pad_routed_tokens fp8_weights":
            is_none_of(".fp8", "none"), "fp8_format": is_none_of(".fp8", "nvfp4"),
        "fp8_pad_routed_tokens": is_set("model.num_experts"),
        "average_weights average_decay": is_set(".average_last"),
        "average_decay": is_one_of(".average_weights", "ema")}

    steps: Steps = 0
    """Optimizer steps. 0: follows from token budgets."""
    tokens: Tokens = 0
    """The run's token budget. Setting it scales every phase's budget or steps in proportion."""
    epochs: Annotated[float, Ge(0), Le(10_000)] = 0.0
    """Passes over the data, which determine `steps` (rl: passes over the prompts, which determine
    `rollout.rounds`). 0: not used."""
    max_hours: NotNegative = 48.0
    """sft, prefer, distill: maximum expected duration in hours on this machine; a longer run is rejected
    before it starts. 0: no limit."""
    global_batch_size: Annotated[AtLeastOne, Le(MAX_BATCH_SIZE)] = 512
    """Samples per optimizer step, over all processes."""
    ramp_from_batch_size: Samples = 0
    """Samples in the first step, if the batch size ramps up to `global_batch_size`. 0: no ramp."""
    ramp_increment: Samples = 0
    """Samples added at each batch size increase."""
    ramp_steps: Annotated[NotNegativeInt, Le(1_000_000)] = 0
    """Optimizer steps in the ramp, divided into equal intervals."""
    micro_batch_size: Annotated[AtLeastOne, Le(MAX_BATCH_SIZE)] = 1
    """Samples per forward pass on a process. rl: maximum rows; by default enough for the responses to a
    prompt, limited by memory (docs/rl.md)."""
    seed: int = 1234
    """Random seed for initial weights, data order and dropout."""
    precision: Literal["fp32", "bf16", "fp64"] = "bf16"
    """Dtype for weights and activations. bf16 keeps fp32 master weights and sums gradients in
    `gpu.grad_dtype`; fp64 is slow and serves to prove that layouts agree."""
    fp8: Literal["none", "tensorwise", "blockwise", "mxfp8", "nvfp4", "delayed"] = "none"
    """Matrix products in transformer layers in 8 bits (nvfp4: 4 bits), by Transformer Engine on a GPU
    (docs/precision.md). Scales per tensor (tensorwise), per 128 values and 128 x 128 weights (blockwise), per
    32 values (mxfp8) or per 16 values (nvfp4). delayed is rejected: checkpoints do not store its scale
    history."""
    fp8_format: Literal["auto", "e4m3", "hybrid"] = "auto"
    """8-bit format. e4m3: for all tensors; hybrid: e5m2 for gradients; auto: hybrid for tensorwise, else
    e4m3."""
    fp8_bf16_layers_at_start: NotNegativeInt = 0
    """First transformer layers computed in bf16 despite `fp8`."""
    fp8_bf16_layers_at_end: NotNegativeInt = 0
    """Last transformer layers computed in bf16 despite `fp8`."""
    fp8_pad_routed_tokens: bool = False
    """Fill each expert's batch to the multiple that `fp8` needs by routing extra tokens with weight 0,
    instead of padding copies after the dispatcher."""
    fp8_weights: bool = False
    """Keep weights quantised by `fp8` in 8 bits only, next to their float32 masters, without a bf16 copy.
    tensorwise and blockwise then gather one byte per weight after an update. Needs `parallel.zero1`."""
    deterministic: bool = False
    """Produce identical bits in every run with equal settings on equal machines; uses slower algorithms where
    fast ones are not reproducible."""
    hidden_dropout: Fraction = 0.0
    """Dropout rate after embedding, attention and feed-forward layers; masks depend on seed, step and
    layout."""
    recompute: bool | Literal["selective"] = False
    """Recompute activations in the backward pass instead of storing them. true: all layers; selective: only
    `gpu.recompute_modules`."""
    head_chunk_tokens: AtLeastOne = 2048
    """Tokens per output head chunk; bounds logits memory."""
    checkpoint_every_steps: AtLeastOne = 1000
    """Steps between checkpoints; a final checkpoint is always written. rl: at most 10 rounds by default."""
    keep_checkpoints: NotNegativeInt = 2
    """Newest checkpoints to keep. 0: keep all."""
    export_every_checkpoints: NotNegativeInt = 0
    """Checkpoints between exports to Hugging Face folders in RUN/exports, written during training; includes
    the last checkpoint. 0: no exports."""
    average_last: Annotated[NotNegativeInt, Le(10_000)] = 0
    """Newest checkpoints to average into RUN/average when the run is complete, for evaluation or to start the
    next stage; at most `keep_checkpoints`. 0: no average."""
    average_weights: AverageKind = "uniform"
    """Weights for averaged checkpoints. uniform: equal; linear: 1, 2, 3, ... from oldest to newest; ema: each
    weight is `average_decay` times the next newer one."""
    average_decay: Annotated[float, Gt(0), Le(1)] = 0.5
    """ema: ratio between the weights of consecutive checkpoints."""
    keep_every_steps: NotNegativeInt = 0
    """Also keep, for ever, checkpoints at multiples of this step count. 0: none."""
    async_save: bool = True
    """Write checkpoints in the background during training; needs host memory for a process's checkpoint
    share."""
    save_timeout_s: AboveZero = 1800.0
    """Seconds after which an unfinished checkpoint (for example on a hanging file system) ends the run."""
    eval_every_steps: NotNegativeInt = 500
    """Steps between evaluations on held-out documents. 0: only at the end."""
    log_every_steps: AtLeastOne = 1
    """Steps between `step` events in events.jsonl."""
    max_restarts: NotNegativeInt = 3
    """Restarts from the last checkpoint before the local launcher gives up; counted from 0 after each new
    checkpoint. Under torchrun or Slurm, those restart the processes."""
    num_threads: Annotated[NotNegativeInt, Le(4096)] = 0
    """CPU threads per process. 0: OMP_NUM_THREADS if set, else CPU cores divided by local processes."""

    def problems(self) -> list[SettingsProblem]:
        """Return every violated rule between these settings."""
        ramp_from, every = self.ramp_from_batch_size, self.checkpoint_every_steps
        return find_broken_rules(
            self, "train",
            (ramp_from <= self.global_batch_size, "ramp_from_batch_size",
             f"must be at most train.global_batch_size = {self.global_batch_size}"),
            (not ramp_from or (self.ramp_increment > 0 and self.ramp_steps > 0), "ramp_from_batch_size",
             "needs train.ramp_increment and train.ramp_steps above 0"),
            (self.average_last != 1, "average_last", "must be 0, or from 2 to 10,000"),
            (not self.keep_checkpoints or self.average_last <= self.keep_checkpoints, "average_last",
             f"must be at most train.keep_checkpoints = {self.keep_checkpoints}: older checkpoints are "
             "deleted before the average is computed"),
            (self.keep_every_steps % every == 0, "keep_every_steps",
             f"must be a multiple of train.checkpoint_every_steps = {every}, or 0"))
