"""Forward and backward passes of a training step: from a global batch to gradients and loss sums."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_sov.base.errors import UserError
from megatron_sov.engine.decode.forward_only import run_pipeline, split_depths
from megatron_sov.engine.model import replica_checks
from megatron_sov.engine.model.expert_load import ExpertLoad
from megatron_sov.engine.model.graphs import RouterGraphs
from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.model.logprobs import build_head
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.rng import seed_step
from megatron_sov.engine.parallel.values import Shapes, flatten_tensors, unflatten_tensors
from megatron_sov.model.config import RunConfig
from megatron_sov.train.guards.fault_injection import FaultInjector
from megatron_sov.train.guards.guards import ComputeClock
from megatron_sov.train.objectives.microbatch import MicroBatch
from megatron_sov.train.objectives.objective import (
    GlobalBatch, LossSums, Objective, compute_total_loss, get_meters)

BY_SOURCE, METERS, ROUTES = "by source", "all meters", "all routes"
"""Keys of the all-reduced sums besides the loss terms; a space keeps them apart from names of terms."""
REPLAYED = "replayed_routes"
"""Meter for data with recorded expert routes: share of expert choices that are replayed, not computed."""


class ForwardBackward:
    """Forward and backward passes on one rank; every method is collective."""

    def __init__(self, config: RunConfig, model: LanguageModel, optimizer: Optimizer, expert_load: ExpertLoad,
                 num_sources: int, faults: FaultInjector, clock: ComputeClock | None) -> None:
        self._config, self._model, self._optimizer, self._expert_load = config, model, optimizer, expert_load
        self._graphs = RouterGraphs(model, optimizer.wrapped, optimizer.megatron_optimizer)
        self._num_sources, self._faults, self._clock = num_sources, faults, clock
        self._step = 0
        self.is_finite = True
        """Whether this rank's loss sums were finite in the last step."""
        expert_load.before_sync = self._end_local_passes

    def compute_gradients(self, batch: GlobalBatch, objective: Objective, step: int) -> "StepSums":
        """Compute gradients for `step` (from 1) in the model, and return the loss sums.

        `batch` is this rank's part of the global batch, with denominators from `Objective.prepare`.
        """
        self._step = step
        if self._clock is not None:
            self._clock.start()
        packed_sums = self._run_passes(batch, batch.micro_batches, objective,
                                       self._faults.get_loss_factor(step))
        names = get_meters(objective)
        if packed_sums:
            local_sums = torch.stack(packed_sums).sum(0).cpu()
        else:
            # a stage without losses sends zeros: the sum over ranks needs equal shapes
            size = len(objective.coefficients) + 2 * self._num_sources + 2 * len(names)
            local_sums = torch.zeros(size, dtype=torch.float64)
        # before the sum over ranks, which would spread a NaN to every rank
        self.is_finite = bool(local_sums.isfinite().all())
        # outside `packed_sums`, which only the last stage fills: every stage knows its rows' routes
        local_sums = torch.cat([local_sums, _count_replayed_routes(batch.micro_batches)])
        # only the last stage has losses: sum over the data-parallel ranks, then broadcast from the last stage
        global_sums = collectives.broadcast_from_last_stage(collectives.all_reduce_dp(local_sums))
        totals = unflatten_tensors(global_sums, {**self._list_shapes(objective), ROUTES: (2,)})
        by_source = totals.pop(BY_SOURCE)
        meter_sums = torch.cat([totals.pop(METERS), totals.pop(ROUTES)[None]]).tolist()
        meters = {name: total / count
                  for name, (total, count) in zip([*names, REPLAYED], meter_sums, strict=True) if count}
        return StepSums({term: float(value) for term, value in totals.items()}, by_source, meters)

    def compute_local_gradients(self, batch: GlobalBatch, objective: Objective, step: int, turn: int) -> None:
        """Compute local gradients of the first micro-batches; repeated turns must give the same bits.

        `step` (from 1) seeds dropout, so that each `turn` (from 0) draws equal numbers. An injected
        `miscompute` fault corrupts later turns only, so that turns differ.
        """
        # an interleaved schedule takes multiples of pp micro-batches
        count = self._config.parallel.pp if self._config.parallel.vpp > 1 else 1
        seed_step(self._config.train.seed, step - 1)
        with replica_checks.disable_gradient_sync(self._model, self._optimizer.wrapped):
            self._run_passes(batch, batch.micro_batches[:count], objective, 1.0)
        if turn:
            self._inject_miscompute(step)
        self._expert_load.reset_counts()
        seed_step(self._config.train.seed, step - 1)  # for the step itself, which follows

    def _run_passes(self, batch: GlobalBatch, micro_batches: Sequence[MicroBatch], objective: Objective,
                    loss_factor: float) -> list[Any]:
        """Run the pipeline schedule; on the last stage, return each micro-batch's sums in a flat tensor.

        `micro_batches` may be a prefix of `batch.micro_batches`. `loss_factor` is 1, or the factor of an
        injected fault.
        """
        self._model.config.routing_step.begin(batch.seq_len, batch.num_sequences)
        terms, meters = sorted(objective.coefficients), get_meters(objective)

        def compute_loss(hidden: torch.Tensor, micro_batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            head = build_head(self._model, self._config.train.head_chunk_tokens)
            depths = split_depths(hidden, self._config.model.num_predictions)
            sums = objective.loss(depths, head, micro_batch)
            # float64 for the log; the graph keeps the dtype of the losses
            values = {term: sums.terms[term].detach().double() * loss_factor for term in terms}
            total = compute_total_loss(sums, objective.coefficients, micro_batch.denominators)
            packed_sums = flatten_tensors(
                {**values, BY_SOURCE: sums.by_source, METERS: _stack_meters(sums, meters)})
            return total * loss_factor, packed_sums

        row_tokens = len(batch.micro_batches[0].inputs.tokens)
        self._graphs.prepare(row_tokens, batch.seq_len, len(micro_batches),
                             whole=len(micro_batches) == len(batch.micro_batches))
        self._optimizer.zero_grad()
        return run_pipeline(self._optimizer.wrapped, micro_batches, compute_loss, row_tokens,
                            forward_only=False)

    def _end_local_passes(self) -> None:
        """Inject due faults and stop the clock, before gradients are summed over ranks."""
        # before the clock stops: an injected delay has to count as computing time
        time.sleep(self._faults.delay_s(self._step))
        self._inject_miscompute(self._step)
        if self._clock is not None:
            self._clock.stop()

    def _inject_miscompute(self, step: int) -> None:
        fault = self._faults.take_due("miscompute", "step", step)
        if fault is not None:
            replica_checks.flip_bit(replica_checks.list_gradients(self._model)[0], fault.options.get("bit"))

    def _list_shapes(self, objective: Objective) -> Shapes:
        """Return key -> shape of the sums, in their order in a flat tensor."""
        return {**dict.fromkeys(sorted(objective.coefficients), ()), BY_SOURCE: (self._num_sources, 2),
                METERS: (len(get_meters(objective)), 2)}


@dataclass(frozen=True)
class StepSums:
    """A step's loss sums and meters over the global batch."""

    terms: dict[str, float]
    """Loss term -> weighted sum, sorted by name."""
    by_source: torch.Tensor
    """[sources, 2] float64: loss sum and target count."""
    meters: dict[str, float]
    """Meter -> mean; meters with count 0 are left out."""

    def normalize(self, batch: GlobalBatch, objective: Objective) -> tuple[float, dict[str, float]]:
        """Return the total loss, and each term's sum divided by its targets in the global batch."""
        losses = {term: total / batch.targets[term]
                  for term, total in self.terms.items() if batch.targets[term] > 0}
        return sum(objective.coefficients[term] * loss for term, loss in losses.items()), losses


def _stack_meters(sums: LossSums, names: tuple[str, ...]) -> torch.Tensor:
    """Return [meters, 2] float64: sum and count for each meter in `names`.

    Raises `UserError` if `sums.meters` differs from `names`, which the objective declares on every rank.
    """
    if set(sums.meters) != set(names):
        raise UserError(f"the objective's `loss` returned meters {sorted(sums.meters)}, but its `meters` "
                        f"lists {sorted(names)}; list every returned meter")
    device = sums.by_source.device
    values = [torch.as_tensor(value, dtype=torch.float64, device=device).detach()
              for name in names for value in sums.meters[name]]
    return torch.stack(values).reshape(-1, 2) if values else sums.by_source.new_zeros(0, 2)


def _count_replayed_routes(micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
    """Return [2] float64: (token, layer) pairs with recorded expert choices, and all pairs with routes."""
    counts = torch.zeros(2, dtype=torch.float64)
    for inputs in (micro_batch.host.inputs for micro_batch in micro_batches):
        if inputs.routes is None:
            continue
        # the dtype's largest number marks "not recorded" for all choices of a layer: the first one tells
        first_choices = inputs.routes[~inputs.padding.numpy(), :, 0]
        num_recorded = (first_choices != np.iinfo(first_choices.dtype).max).sum()
        counts += torch.tensor([num_recorded, first_choices.size])
    return counts
