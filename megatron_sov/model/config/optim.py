"""The optimizer, its exceptions for named parameters, and the learning rate's schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from megatron_sov.base.settings import (
    AboveZero, AtLeastOne, Finite, Fraction, NotNegative, NotNegativeInt, SettingsProblem, find_broken)

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

    name: Algorithm = "adamw"
    """adamw, for all parameters; muon: matrices by Muon (Q, K and V, gate and up, and every expert on its
    own), embeddings, head, norms and biases by AdamW."""
    lr: AboveZero = 2.5e-4
    """Peak learning rate."""
    min_lr: NotNegative = 3e-6
    """Learning rate at the end of the decay."""
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
            (not self.warmup_tokens or self.schedule_by == "tokens", "warmup_tokens",
             "needs optim.schedule_by = tokens", "set that, or optim.warmup_steps"),
            (self.schedule_by == "steps" or self.warmup_tokens > 0 or not self.warmup_steps, "schedule_by",
             "counts the warm-up in tokens, and optim.warmup_steps = "
             f"{self.warmup_steps} would be none", "set optim.warmup_tokens, or optim.warmup_steps=0"))
