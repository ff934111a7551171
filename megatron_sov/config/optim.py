"""The optimizer, its exceptions for named parameters, and the learning rate's schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_sov.config.model import STRICT

Algorithm = Literal["adamw", "muon"]
Schedule = Literal["cosine", "wsd", "linear", "inverse_sqrt", "constant"]


@dataclass(frozen=True)
class GroupConfig:
    """Parameters that are updated otherwise than the rest, by the names of their tensors."""

    __pydantic_config__ = STRICT
    pattern: str
    """Names of tensors as in a checkpoint's model.index.json, with * for any text:
    `decoder.layers.0.*`, `*router.weight`."""
    lr_scale: float = 1.0
    """Factor on the learning rate."""
    weight_decay: float | None = None
    """Weight decay, of norms too; null: as without the group."""
    optimizer: Algorithm | None = None
    """What updates the matrices among them; null: `optim.name`.  Embeddings,
    heads and vectors are always AdamW's."""
    frozen: bool = False
    """Whether they stay as they are, bit for bit: no gradients, no optimizer state."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate schedule."""

    __pydantic_config__ = STRICT
    name: Algorithm = "adamw"
    """adamw, for all parameters; muon: matrices by Muon (Q, K and V, gate and up, and every expert on its
    own), embeddings, head, norms and biases by AdamW."""
    lr: float = 2.5e-4
    """Peak learning rate."""
    min_lr: float = 3e-6
    """Learning rate at the end of the decay."""
    schedule: Schedule = "cosine"
    """What follows the warm-up.  cosine, linear: decay to `min_lr` over the rest; wsd: stable, decay over the
    last `decay_share`; inverse_sqrt: falls as 1 / sqrt(step), not below `min_lr`; constant."""
    schedule_by: Literal["steps", "tokens"] = "steps"
    """What warm-up and decay are counted in; it matters while the batch size ramps up,
    and where phases differ in theirs."""
    warmup_steps: int = 2000
    """Optimizer steps of linear warm-up, at most half the run."""
    warmup_tokens: int = 0
    """Tokens of linear warm-up when `schedule_by` is tokens, padding counted in."""
    decay_share: float = 0.2
    """wsd only: last part of the run over which the rate decays."""
    decay_form: Literal["linear", "cosine", "one_minus_sqrt"] = "linear"
    """wsd only: how it decays (one_minus_sqrt: arXiv 2405.18392)."""
    rewarm: tuple[tuple[int, int], ...] = ()
    """[step, steps]: behind that optimizer step the rate climbs anew, from 0 to the schedule's, over so many
    steps.  May be added to a run that is resumed, from its checkpoint on."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices (not on norms and biases)."""
    beta1: float = 0.9
    """AdamW's first moment decay."""
    beta2: float = 0.95
    """AdamW's second moment decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    muon_momentum: float = 0.95
    """Muon's momentum decay."""
    muon_nesterov: bool = True
    """Muon: orthogonalise the gradient mixed with the new momentum once more, not the momentum alone."""
    muon_ns_steps: int = 5
    """Muon: Newton-Schulz iterations, in the dtype of `train.precision`."""
    muon_ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    """Muon: a, b, c of x <- a x + b (x x^T) x + c (x x^T)^2 x."""
    muon_scale: Literal["match_rms_adamw", "original", "spectral"] = "match_rms_adamw"
    """Factor on a matrix's update [rows (out), columns (in)].  match_rms_adamw: 0.2 sqrt(max(rows, columns)),
    updates as large as AdamW's, whose rates then serve (arXiv 2502.16982); original: sqrt(max(1, rows /
    columns)); spectral: sqrt(rows / columns)."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    groups: tuple[GroupConfig, ...] = ()
    """Exceptions for parameters by name; where several match a name, the last one holds."""

    def problems(self) -> list[str]:
        """Return one sentence for every rule that these settings break."""
        rules = [
            (0 <= self.min_lr <= self.lr,
             f"optim.min_lr = {self.min_lr} must lie between 0 and optim.lr = {self.lr}"),
            (self.clip_grad >= 0, f"optim.clip_grad = {self.clip_grad} must not be negative"),
            (self.eps > 0, f"optim.eps = {self.eps} must be positive"),
            (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1,
             f"optim.beta1 = {self.beta1} and optim.beta2 = {self.beta2} must lie in [0, 1)"),
            (0 <= self.muon_momentum < 1, f"optim.muon_momentum = {self.muon_momentum} must lie in [0, 1)"),
            (1 <= self.muon_ns_steps <= 100,
             f"optim.muon_ns_steps = {self.muon_ns_steps} must lie between 1 and 100"),
            (all(map(math.isfinite, self.muon_ns_coefficients)),
             f"optim.muon_ns_coefficients = {list(self.muon_ns_coefficients)} must be numbers"),
            (0 <= self.weight_decay < math.inf,
             f"optim.weight_decay = {self.weight_decay} must not be negative or infinite"),
            (self.warmup_steps >= 0, f"optim.warmup_steps = {self.warmup_steps} must not be negative"),
            (self.warmup_tokens >= 0, f"optim.warmup_tokens = {self.warmup_tokens} must not be negative"),
            (not self.warmup_tokens or self.schedule_by == "tokens",
             f"optim.warmup_tokens = {self.warmup_tokens} needs optim.schedule_by = tokens; "
             "set that, or optim.warmup_steps"),
            (self.schedule_by == "steps" or self.warmup_tokens > 0 or not self.warmup_steps,
             f"optim.schedule_by = {self.schedule_by} counts the warm-up in tokens, and optim.warmup_steps = "
             f"{self.warmup_steps} would be none; set optim.warmup_tokens, or optim.warmup_steps=0"),
            (all(first >= 0 and steps > 0 for first, steps in self.rewarm),
             f"optim.rewarm = {[list(pair) for pair in self.rewarm]} must hold pairs [step, "
             "steps] with steps above 0"),
            (0 < self.lr < math.inf, f"optim.lr = {self.lr} must be a positive number"),
            (0 < self.decay_share <= 1, f"optim.decay_share = {self.decay_share} must lie in (0, 1]"),
        ]
        p = [sentence for holds, sentence in rules if not holds]
        for i, group in enumerate(self.groups):
            where = f"optim.groups.{i} ({group.pattern})"
            if not 0 <= group.lr_scale < math.inf:
                p.append(f"{where}.lr_scale = {group.lr_scale} must be a number that is not negative")
            if group.weight_decay is not None and not 0 <= group.weight_decay < math.inf:
                p.append(f"{where}.weight_decay = {group.weight_decay} must be a number that is not negative")
        return p
