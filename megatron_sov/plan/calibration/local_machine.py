"""A processor's speed, as runs on it have shown it: no data sheet tells what a small model reaches there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sov.config import RunConfig
from megatron_sov.models.count import train_flops_per_token

RECOMPUTED = 4 / 3
"""FLOPs of a step that recomputes every layer, beside one that stores: four forward passes for three."""
LEAST_SPREAD = 1.5
"""Of the FLOPs of a layer, largest beside smallest, from which on its own cost is told apart from them."""


@dataclass(frozen=True)
class Passes:
    """What one process computes in a step."""

    layers: float
    """Layers that a micro-batch goes through, forward and backward, one after the other; the head counts as
    one, and so do those in which a pipeline's stage is idle."""
    flops_per_thread: float
    """Of all of them."""


@dataclass(frozen=True)
class LocalMachine:
    """Seconds of a step are `layers` x `layer_s` + `flops_per_thread` / `flops_per_s`."""

    flops_per_s: float
    """That one thread reaches."""
    layer_s: float = 0.0
    """What a layer takes for a micro-batch beside its arithmetic: starting operations, most of all."""

    def seconds(self, passes: Passes) -> dict[str, float]:
        """Return part -> seconds of a step."""
        return {"arithmetic": passes.flops_per_thread / self.flops_per_s,
                "operations": passes.layers * self.layer_s}


def passes_of(config: RunConfig, num_ranks: int, threads: int, seq_len: int, batch_size: int) -> Passes:
    """Return what a process computes in a step.

    Args:
        config: model, layout, micro-batches.
        num_ranks: processes.
        threads: CPU threads of each.
        seq_len: tokens of a sample.
        batch_size: samples of the step, over all processes.
    """
    replicas = num_ranks // config.parallel.ranks_per_replica
    micro_batches = batch_size / replicas / config.train.micro_batch_size
    num_passes = micro_batches + config.parallel.pp - 1
    flops = train_flops_per_token(config.model, seq_len) * batch_size * seq_len / num_ranks
    flops *= RECOMPUTED if config.train.recompute is True else 1
    held = config.model.num_layers / config.parallel.pp + 1 + config.model.num_mtp_layers
    return Passes(held * num_passes, flops * num_passes / micro_batches / max(1, threads))


def learn(measured: Sequence[tuple[Passes, float]]) -> LocalMachine:
    """Return the machine that explains (a step's passes, its seconds) best, in relative error.

    Where all layers are about as large, their own cost cannot be told from their arithmetic, and is left
    out.  There is at least one step.
    """
    sizes = [passes.flops_per_thread / passes.layers for passes, _ in measured]
    layer_s = per_flop = 0.0
    if max(sizes) > LEAST_SPREAD * min(sizes):
        # least squares of a x + b y = 1, x and y each divided by the seconds
        x = [passes.layers / seconds for passes, seconds in measured]
        y = [passes.flops_per_thread / seconds for passes, seconds in measured]
        xx, yy, xy = (sum(a * b for a, b in zip(u, v, strict=True)) for u, v in ((x, x), (y, y), (x, y)))
        determinant = xx * yy - xy * xy
        layer_s = (sum(x) * yy - sum(y) * xy) / determinant
        per_flop = (sum(y) * xx - sum(x) * xy) / determinant
    if layer_s <= 0 or per_flop <= 0:
        y = [passes.flops_per_thread / seconds for passes, seconds in measured]
        layer_s, per_flop = 0.0, sum(y) / sum(v * v for v in y)
    return LocalMachine(1 / per_flop, layer_s)
