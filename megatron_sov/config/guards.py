"""What watches a run while it trains, and what it then does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_sov.config.model import STRICT


@dataclass(frozen=True)
class GuardConfig:
    """Guards: steps that are refused, hangs, silent corruption, slow processes, collapsing experts."""

    __pydantic_config__ = STRICT
    skip: bool = True
    """Refuse the update of a step whose loss or gradient norm is not finite or a spike; off: a number that is
    not finite ends the run."""
    window_steps: int = 128
    """Steps whose loss and gradient norm say what is usual, once there are half as many, at least 20."""
    sigma: float = 6.0
    """A spike lies so many standard deviations above the mean of the window; 0:
    only numbers that are not finite count."""
    attribute: bool = False
    """Compute a refused step again at once, and say whether a process (which is named), the data (whose
    documents are named) or the optimisation is at fault; costs a pass over the gradients in every step."""
    rollback_after_skips: int = 4
    """So many steps in a row that are refused for their loss, or for numbers that are not finite, take
    weights and optimizer back to the last good checkpoint, and all samples since then are
    passed over; 0: never."""
    hang_timeout_s: float = 1500.0
    """Seconds that a step may last before every process writes its stacks into RUN/hang and ends with exit
    code 76; must be longer than the slowest step; 0: no watch. (Collectives give up by
    themselves after `parallel.timeout_s`.)"""
    compare_replicas: bool = True
    """Before each checkpoint, compare the weights of processes that must hold the same, bit for bit."""
    probe_every_steps: int = 0
    """Every so many steps each process computes a micro-batch twice and compares the gradients,
    bit for bit; 0: never."""
    on_sdc: Literal["exit", "record"] = "exit"
    """When replicas or repetitions differ: end with exit code 77 before the next checkpoint,
    or record it and go on."""
    straggler_every_steps: int = 100
    """Steps over which each process's computing time is averaged for the report; 0: never."""
    straggler_ratio: float = 1.5
    """A process that computes so many times longer than the median one is named as slow."""
    routing_every_steps: int = 20
    """Steps between records of each layer's routing, from which alarms are raised; 0: never."""
    min_load_entropy: float = 0.5
    """Alarm when the entropy of a layer's expert load, as a share of that of an even
    load, falls below this."""
    dead_after_records: int = 5
    """Alarm when an expert got no token in so many routing records in a row."""
    max_bias_spread: float = 1.0
    """Alarm when a layer's selection biases lie further apart: scores lie in (0, 1),
    so the biases alone then choose."""

    def problems(self, deterministic: bool) -> list[str]:
        """Return one sentence for every rule that the settings break."""
        rules = [
            (self.window_steps >= 20, f"guards.window_steps = {self.window_steps} must be at least 20"),
            (0 <= self.sigma < math.inf,
             f"guards.sigma = {self.sigma} must be a number that is not negative"),
            (self.rollback_after_skips >= 0,
             f"guards.rollback_after_skips = {self.rollback_after_skips} must not be negative"),
            (0 <= self.hang_timeout_s < math.inf,
             f"guards.hang_timeout_s = {self.hang_timeout_s} must not be negative"),
            (self.probe_every_steps >= 0,
             f"guards.probe_every_steps = {self.probe_every_steps} must not be negative"),
            (not self.probe_every_steps or deterministic,
             f"guards.probe_every_steps = {self.probe_every_steps} needs train.deterministic = true: "
             "without it a sound process need not give the same bits twice"),
            (not self.attribute or deterministic,
             "guards.attribute = true needs train.deterministic = true: without it a sound process need not "
             "give the same bits twice"),
            (not self.attribute or self.skip,
             "guards.attribute = true needs guards.skip = true: it looks at steps that are refused"),
            (self.straggler_every_steps >= 0,
             f"guards.straggler_every_steps = {self.straggler_every_steps} must not be negative"),
            (self.straggler_ratio > 1, f"guards.straggler_ratio = {self.straggler_ratio} must be above 1"),
            (self.routing_every_steps >= 0,
             f"guards.routing_every_steps = {self.routing_every_steps} must not be negative"),
            (0 <= self.min_load_entropy <= 1,
             f"guards.min_load_entropy = {self.min_load_entropy} must lie in [0, 1]"),
            (self.dead_after_records > 0,
             f"guards.dead_after_records = {self.dead_after_records} must be positive"),
            (self.max_bias_spread > 0, f"guards.max_bias_spread = {self.max_bias_spread} must be positive"),
        ]
        return [sentence for holds, sentence in rules if not holds]
