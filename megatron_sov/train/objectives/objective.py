"""What is learned, behind one interface: the loop knows steps, an objective knows batches and losses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.engine.model.logprobs import Head
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.values import sum_dict
from megatron_sov.runs.obs.meters import LOSS, Meter
from megatron_sov.train.data.requirements import NeededColumn
from megatron_sov.train.data.token_shards import TEXTS
from megatron_sov.train.objectives.microbatch import MicroBatch

TOKENS = "all tokens"


@dataclass(frozen=True)
class GlobalBatch:
    """This data-parallel rank's part of one optimizer step's batch.

    >>> batch = GlobalBatch(micro_batches=(), seq_len=64, num_sequences=8, phase="main")
    >>> dataclasses.replace(batch, num_tokens=512, targets={"lm": 504.0}).targets["lm"]
    504.0
    """

    micro_batches: tuple[MicroBatch, ...]
    """In order; every rank has the same number."""
    seq_len: int
    """Tokens of one sequence."""
    num_sequences: int
    """Sequences of the batch over all ranks."""
    phase: str
    """Phase of the curriculum."""
    num_tokens: int = 0
    """Tokens over all ranks, padding not counted; set by `prepare`."""
    targets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Term -> its denominator over all ranks; set by `prepare`."""


@dataclass(frozen=True)
class LossSums:
    """One micro-batch's contribution: sums, never means.

    >>> losses = torch.tensor([2.0, 1.0, 3.0])
    >>> sums = LossSums({"lm": losses.sum()}, by_source=torch.tensor([[6.0, 3.0]], dtype=torch.float64),
    ...                 meters={"above_two": ((losses > 2).sum(), losses.numel())})
    >>> sums.terms["lm"].item()
    6.0
    """

    terms: dict[str, torch.Tensor]
    """Term -> differentiable scalar: weighted sum over the micro-batch."""
    by_source: torch.Tensor
    """[sources, 2] float64: sum of losses and number of targets per source, for the log."""
    meters: Mapping[str, tuple[torch.Tensor | float, torch.Tensor | float]] = dataclasses.field(
        default_factory=dict)
    """Meter -> sum and count over the micro-batch, no more than a log's; the names of `meters_of`."""


class Objective(Protocol):
    """Three steps; each may be as simple as reading data or as large as generating rollouts.

    An objective is made with an `ObjectiveContext`.  What else it may have is optional, and stands at the
    functions `formats_of` and `columns_of` (of its class, since data are checked before it is made),
    `meters_of`, `headline_of`, `is_comparable`, `doubt_of` and `parts_of`.
    """

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Term -> its weight in the total loss."""
        ...

    def collect(self, policy: Any, step: int) -> GlobalBatch:
        """Return the batch of a step: from the data order, or by rollouts of `policy`."""
        ...

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count every term's denominator over the whole global batch and all ranks,
        before the first forward pass."""
        ...

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        """Return the terms' sums, on the last pipeline stage.

        Args:
            hidden: hidden states [tokens / sequence-parallel size, 1, hidden] of the trunk,
                then of each prediction depth.
            head: applies the output head in chunks.
        """
        ...


def get_formats(made_by: Any) -> tuple[str, ...]:
    """Return the formats of data that an objective learns from (`data.token_shards.Source.format`), as its
    class (or what makes it) says in `formats`, a class attribute; without one, text and chats."""
    return tuple(getattr(made_by, "formats", TEXTS))


def get_columns(made_by: Any) -> Mapping[str, NeededColumn]:
    """Return what an objective reads beside weights and types, as its class (or what makes it) says in
    `columns`, a class attribute; without one, nothing."""
    found: Mapping[str, NeededColumn] = getattr(made_by, "columns", {})
    return found


def get_meters(objective: Any) -> tuple[str, ...]:
    """Return the meters of an objective, as its attribute `meters` says; without one, none.

    A meter is a mean that is watched and not learned, such as a share of clipped tokens.
    """
    return tuple(getattr(objective, "meters", ()))


def get_headline(objective: Any) -> tuple[Meter, ...]:
    """Return the meters by which a run is judged, as the attribute `headline` says; without one, the loss."""
    return tuple(getattr(objective, "headline", (LOSS,)))


def has_comparable_loss(objective: Any) -> bool:
    """Return whether a loss far above those of the steps before says that something is wrong, as the
    attribute `comparable_loss` says; without one it does.

    That of a policy does not: it is near 0, of either sign, and its size is that of the advantages.
    """
    return bool(getattr(objective, "comparable_loss", True))


def get_doubt(objective: Any, step: int, meters: Mapping[str, float]) -> str:
    """Return what a user should know of a step's meters, in a sentence, as the method `doubt` says; without
    one, or without a doubt, "".

    Args:
        objective: which was computed.
        step: its number, from 1.
        meters: their means over the step.
    """
    found: str = objective.doubt(step, meters) if hasattr(objective, "doubt") else ""
    return found


class ObjectiveState:
    """What an objective knows, as a part of a checkpoint."""

    def __init__(self, objective: Any) -> None:
        self._objective = objective

    def state(self) -> dict[str, Any]:
        """Return plain values for the checkpoint.

        Raises:
            UserError: the objective's are none.
        """
        found: dict[str, Any] = self._objective.state()
        try:
            json.dumps(found)
        except (TypeError, ValueError) as e:
            raise self._refusal(f"what JSON does not hold ({e})") from None
        if (changed := _changed_by_json(found, "state()")) is not None:
            raise self._refusal(f"what JSON changes ({changed})")
        return found

    def _refusal(self, what: str) -> UserError:
        return UserError(f"objective {type(self._objective).__name__}: state() returned {what}; return "
                         "dicts with strings as keys, lists, strings and numbers")

    def restore(self, state: dict[str, Any]) -> None:
        self._objective.restore(state)


def _changed_by_json(value: Any, where: str) -> str | None:
    """Return what of a value would come back as something else; None: nothing."""
    if isinstance(value, tuple):
        return f"{where} is a tuple, which comes back as a list"
    if isinstance(value, dict):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            return f"{where} has the key {wrong!r}, which comes back as a string"
        inside = [(f"{where}[{key!r}]", item) for key, item in value.items()]
    else:
        inside = [(f"{where}[{i}]", item) for i, item in enumerate(value)] if isinstance(value, list) else []
    found = (_changed_by_json(item, place) for place, item in inside)
    return next((text for text in found if text is not None), None)


def get_checkpoint_parts(objective: Any) -> dict[str, ObjectiveState]:
    """Return ``{"objective": its memory}`` for the checkpoint where an objective has one: a method `state()`
    that returns plain JSON values, equal on all processes, and `restore(state)`; else nothing."""
    return {"objective": ObjectiveState(objective)} if hasattr(objective, "state") else {}


def with_denominators(batch: GlobalBatch, local_targets: Mapping[str, float]) -> GlobalBatch:
    """Sum each term's local target weight (and the token count) over data-parallel ranks and hand them to
    every micro-batch."""
    tokens = sum(int((~m.host.inputs.padding).sum()) for m in batch.micro_batches)
    counts = {**{name: local_targets[name] for name in sorted(local_targets)}, TOKENS: tokens}
    targets = sum_dict(counts, collectives.all_reduce_dp)
    num_tokens = int(targets.pop(TOKENS))
    micro_batches = tuple(dataclasses.replace(m, denominators=targets) for m in batch.micro_batches)
    return dataclasses.replace(batch, micro_batches=micro_batches, targets=targets, num_tokens=num_tokens)


def check_has_targets(batch: GlobalBatch, step: int) -> None:
    """Refuse a prepared batch without a single target: its loss of 0 would look like a perfect one.

    Args:
        batch: as `prepare` gives it.
        step: from 1, for the message.

    Raises:
        UserError: no term has a target; every process says the same.
    """
    if not any(count > 0 for count in batch.targets.values()):
        raise UserError(f"step {step}: none of its {batch.num_tokens} tokens is learned "
                        f"({', '.join(f'{term}: 0' for term in batch.targets)} targets): its samples hold "
                        "prompts alone; look at the data with `sov-data sample`, make samples longer "
                        f"(seq_len, now {batch.seq_len}), or leave the step out with "
                        f"--set data.skip_steps=[[{step},{step}]]")


def compute_total_loss(sums: LossSums, coefficients: Mapping[str, float],
               denominators: Mapping[str, float]) -> torch.Tensor:
    """Return ``sum over terms of coefficient * sum / denominator``;
    a term without targets anywhere adds nothing."""
    total = torch.zeros((), dtype=torch.float32, device=next(iter(sums.terms.values())).device)
    for name, value in sums.terms.items():
        # `+ value * 0` keeps every parameter in the graph: each rank must run the same backward pass
        total = total + (coefficients[name] * value / denominators[name] if denominators[name] > 0
                         else value * 0.0)
    return total


def per_source(losses: torch.Tensor, weights: torch.Tensor, sources: torch.Tensor,
               num_sources: int) -> torch.Tensor:
    """Return [num_sources, 2] float64: sum of weighted losses and of weights per source."""
    both = torch.stack([losses.detach().double() * weights, weights.double()], dim=1)
    return torch.zeros(num_sources, 2, dtype=torch.float64, device=losses.device).index_add_(0, sources, both)
