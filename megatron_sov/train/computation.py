"""Forward and backward passes of a step: from a batch to gradients in the model and sums of losses."""

from __future__ import annotations

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
from megatron_sov.train.guards.fault_injection import Faults
from megatron_sov.train.guards.guards import ComputeClock
from megatron_sov.train.objectives.microbatch import MicroBatch
from megatron_sov.train.objectives.objective import GlobalBatch, LossSums, Objective, meters_of, total_loss

BY_SOURCE, METERS, ROUTES = "by source", "all meters", "all routes"
"""Names in the message beside those of terms, which have no spaces in them."""
REPLAYED = "replayed_routes"
"""Meter beside those of the objective, where data have routes: share of the choices that were replayed."""


@dataclass(frozen=True)
class StepSums:
    """What a step's losses add up to, over the whole global batch."""

    terms: dict[str, float]
    """Term -> weighted sum of its losses, in order of name."""
    by_source: torch.Tensor
    """[sources, 2] float64: sum of losses and number of targets of each source."""
    meters: dict[str, float]
    """Meter -> its mean; one that has counted nothing is left out."""


@dataclass(frozen=True)
class OwnPart:
    """What one process computed of a step, before anything was summed over processes."""

    sums: torch.Tensor
    """[micro-batches, values] float64, on the host: packed sums; empty where the process is not on the last
    pipeline stage."""
    gradients: int | None
    """Checksum of its gradients; None: they were summed up while they were computed."""
    losses: tuple[float, ...] = ()
    """Of each micro-batch, the mean over its targets."""

    def __eq__(self, other: object) -> bool:
        """Return whether all bits are equal; numbers that are none are equal to themselves."""
        if not isinstance(other, OwnPart):
            return False
        same = self.sums.shape == other.sums.shape and torch.equal(
            self.sums.view(torch.int64), other.sums.view(torch.int64))
        return same and (None in (self.gradients, other.gradients) or self.gradients == other.gradients)

    __hash__ = None  # type: ignore[assignment]


class Computation:
    """Computes on one process; every method is called by all processes together."""

    def __init__(self, config: RunConfig, model: LanguageModel, optimizer: Optimizer, expert_load: ExpertLoad,
                 num_sources: int, faults: Faults, clock: ComputeClock | None) -> None:
        self._config, self._model, self._optimizer, self._expert_load = config, model, optimizer, expert_load
        self._graphs = RouterGraphs(model, optimizer.wrapped, optimizer.library)
        self._num_sources, self._faults, self._clock = num_sources, faults, clock
        self._step = 0
        self.is_finite = True
        """Whether the sums of this process's own part of the last step were numbers."""
        self.own: OwnPart | None = None
        """What this process computed of the last step, where `guards.attribute` keeps it."""
        self._own_gradients: int | None = None
        expert_load.before_sync = self._own_part_done

    def sums(self, batch: GlobalBatch, objective: Objective, step: int) -> StepSums:
        """Leave the gradients of the whole global batch in the model, and return what
        its losses add up to."""
        self._step = step
        if self._clock is not None:
            self._clock.start()
        parts = self._passes(batch, batch.micro_batches, objective, self._faults.loss_factor(step))
        if self._config.guards.attribute:
            self.own = self._own(parts, objective, self._own_gradients)
        names = meters_of(objective)
        # a stage without losses sends zeros of the same length, or the sum over ranks would not fit
        size = len(objective.coefficients) + 2 * self._num_sources + 2 * len(names)
        # only the last stage has losses; one message over the data-parallel ranks, one over the stages
        local = torch.stack(parts).sum(0).cpu() if parts else torch.zeros(size, dtype=torch.float64)
        # before the sum over ranks, which would spread one rank's NaN to all and hide whose it is
        self.is_finite = bool(local.isfinite().all())
        # behind the finite check: these are counts, and the same on every stage
        local = torch.cat([local, _replayed(batch.micro_batches)])
        total = unflatten_tensors(collectives.broadcast_from_last_stage(collectives.all_reduce_dp(local)),
                                  {**self._shapes(objective), ROUTES: (2,)})
        by_source = total.pop(BY_SOURCE)
        meters = torch.cat([total.pop(METERS), total.pop(ROUTES)[None]]).tolist()
        return StepSums({term: float(value) for term, value in total.items()}, by_source,
                        {name: value / count for name, (value, count) in zip([*names, REPLAYED], meters,
                                                                             strict=True) if count})

    def own_gradients(self, batch: GlobalBatch, objective: Objective, step: int, turn: int) -> None:
        """Leave only this process's gradients of the first micro-batches in the model;
        each turn draws the same dropout."""
        # an interleaved schedule takes whole multiples of pp micro-batches
        count = self._config.parallel.pp if self._config.parallel.vpp > 1 else 1
        seed_step(self._config.train.seed, step - 1)
        self._unsynced(batch, batch.micro_batches[:count], objective)
        # the first turn is sound; a fault on purpose comes in a later one, so that the turns differ
        if turn:
            self._miscompute(step)
        self._expert_load.reset_counts()
        seed_step(self._config.train.seed, step - 1)

    def own_part(self, batch: GlobalBatch, objective: Objective, step: int) -> OwnPart:
        """Return what this process computes of a step (1-based), which is drawn as it was the first time."""
        seed_step(self._config.train.seed, step - 1)
        parts = self._unsynced(batch, batch.micro_batches, objective)
        own = self._own(parts, objective, self._checksum())
        self._expert_load.reset_counts()
        return own

    def _unsynced(self, batch: GlobalBatch, micro_batches: Sequence[MicroBatch],
                  objective: Objective) -> list[Any]:
        with replica_checks.disable_gradient_sync(self._model, self._optimizer.wrapped):
            return self._passes(batch, micro_batches, objective, 1.0)

    def _own(self, parts: list[Any], objective: Objective, gradients: int | None) -> OwnPart:
        if not parts:
            return OwnPart(torch.zeros(0, dtype=torch.float64), gradients)
        sums = torch.stack(parts).cpu()
        by_source = torch.stack([unflatten_tensors(part, self._shapes(objective))[BY_SOURCE]
                                 for part in sums])
        total, count = by_source.sum(1).unbind(1)
        return OwnPart(sums, gradients, tuple((total / count.clamp(min=1)).tolist()))

    def _miscompute(self, step: int) -> None:
        if (fault := self._faults.due("miscompute", "step", step)) is not None:
            replica_checks.flip_bit(replica_checks.list_gradients(self._model)[0], fault.options.get("bit"))

    def _checksum(self) -> int:
        return int(replica_checks.compute_checksum(replica_checks.list_gradients(self._model)))

    def _shapes(self, objective: Objective) -> Shapes:
        return {**dict.fromkeys(sorted(objective.coefficients), ()), BY_SOURCE: (self._num_sources, 2),
                METERS: (len(meters_of(objective)), 2)}

    def _passes(self, batch: GlobalBatch, micro_batches: Sequence[MicroBatch], objective: Objective,
                factor: float) -> list[Any]:
        """Return, on the last pipeline stage, the packed sums of each micro-batch; `factor` is 1,
        or a fault on purpose."""
        self._model.config.routing_step.begin(batch.seq_len, batch.num_sequences)
        terms, meters = sorted(objective.coefficients), meters_of(objective)

        def loss(hidden: torch.Tensor, micro_batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            head = build_head(self._model, self._config.train.head_chunk_tokens)
            sums = objective.loss(split_depths(hidden, self._config.model.num_predictions), head, micro_batch)
            # in float64 for the log; the graph keeps the dtype of the losses
            values = {term: sums.terms[term].detach().double() * factor for term in terms}
            total = total_loss(sums, objective.coefficients, micro_batch.denominators)
            return total * factor, flatten_tensors({**values, BY_SOURCE: sums.by_source,
                                                    METERS: _meters(sums, meters)})

        row_tokens = len(batch.micro_batches[0].inputs.tokens)
        self._graphs.prepare(row_tokens, batch.seq_len, len(micro_batches),
                             whole=len(micro_batches) == len(batch.micro_batches))
        self._optimizer.zero_grad()
        return run_pipeline(self._optimizer.wrapped, micro_batches, loss, row_tokens,
                            forward_only=False)

    def _own_part_done(self) -> None:
        """Note that this process has its gradients, and now waits for those of others."""
        # before the clock stops: a process that is slow on purpose has to look slow
        time.sleep(self._faults.delay_s(self._step))
        self._miscompute(self._step)
        if self._clock is not None:
            self._clock.stop()
        # with overlap the gradients are sums over ranks by now, and would name no process
        if self._config.guards.attribute and not self._config.parallel.overlap_grad_reduce:
            self._own_gradients = self._checksum()


def _meters(sums: LossSums, names: tuple[str, ...]) -> torch.Tensor:
    """Return [meters, 2] float64: sum and count of each, in the order of their declaration.

    Raises:
        UserError: they are not those that the objective has declared, which all processes count on.
    """
    if set(sums.meters) != set(names):
        raise UserError(f"the objective returned the meters {sorted(sums.meters)} and declares "
                        f"{sorted(names)}; name in `meters` what its `loss` returns")
    device = sums.by_source.device
    values = [torch.as_tensor(value, dtype=torch.float64, device=device).detach()
              for name in names for value in sums.meters[name]]
    return torch.stack(values).reshape(-1, 2) if values else sums.by_source.new_zeros(0, 2)


def _replayed(micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
    """Return [2] float64: how many choices of experts were recorded, and how many there were; nothing of
    rows without routes."""
    found = torch.zeros(2, dtype=torch.float64)
    for inputs in (m.host.inputs for m in micro_batches if m.inputs.routes is not None):
        assert inputs.routes is not None
        # one choice stands for all of a layer: the largest number of the dtype marks "not recorded"
        first = inputs.routes[~inputs.padding.numpy(), :, 0]
        found += torch.tensor([(first != np.iinfo(first.dtype).max).sum(), first.size])
    return found
