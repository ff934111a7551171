"""What watches a run while it trains, and what it then does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from megatron_sov.settings import (
    AtLeastOne,
    NotNegative,
    NotNegativeInt,
    Share,
)


@dataclass(frozen=True)
class GuardConfig:
    """Guards: steps that are refused, hangs, silent corruption, slow processes, collapsing experts."""

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
