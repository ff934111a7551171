"""The objective interface: batches and losses for the training loop."""

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
from megatron_sov.train.data.sources import TEXTS
from megatron_sov.train.objectives.microbatch import MicroBatch

TOKENS = "all tokens"


@dataclass(frozen=True)
class GlobalBatch:
    """This data-parallel rank's part in a step's global batch.

    >>> batch = GlobalBatch(micro_batches=(), seq_len=64, num_sequences=8, phase="main")
    >>> dataclasses.replace(batch, num_tokens=512, targets={"lm": 504.0}).targets["lm"]
    504.0"""

    micro_batches: tuple[MicroBatch, ...]
    """Micro-batches in order; their number is equal on every rank."""
    seq_len: int
    """Tokens per sequence."""
    num_sequences: int
    phase: str
    """Curriculum phase."""
    num_tokens: int = 0
    """Tokens in the global batch, without padding; set by `Objective.prepare`."""
    targets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Term -> denominator over the global batch; set by `Objective.prepare`."""


@dataclass(frozen=True)
class LossSums:
    """Loss sums over a micro-batch, never means.

    >>> losses = torch.tensor([2.0, 1.0, 3.0])
    >>> sums = LossSums({"lm": losses.sum()}, by_source=torch.tensor([[6.0, 3.0]], dtype=torch.float64),
    ...                 meters={"above_two": ((losses > 2).sum(), losses.numel())})
    >>> sums.terms["lm"].item()
    6.0"""

    terms: dict[str, torch.Tensor]
    """Term -> differentiable scalar: weighted sum over the micro-batch."""
    by_source: torch.Tensor
    """[sources, 2] float64: loss sum and target count, for the log."""
    meters: Mapping[str, tuple[torch.Tensor | float, torch.Tensor | float]] = dataclasses.field(
        default_factory=dict)
    """Meter -> sum and count over the micro-batch, for the log; names as in `get_meters`."""


class Objective(Protocol):
    """Batches and losses for a training stage, built with an `ObjectiveContext`.

    Optional attributes are documented at the functions that read them: `get_formats` and `get_columns` (class
    attributes, because data are checked before the objective is built), `get_meters`, `get_headline`,
    `has_comparable_loss`, `get_doubt` and `get_checkpoint_parts`."""

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Term -> weight in the total loss."""

    def collect(self, policy: Any, step: int) -> GlobalBatch:
        """Return the batch for `step` (from 0), from the data order or from rollouts of `policy`."""

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count the denominator of each term over the global batch, before the first forward pass."""

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        """Return each term's sum over a micro-batch, on the last pipeline stage.

        `hidden` has hidden states [tokens / sequence-parallel size, 1, hidden] of the trunk, then of each
        prediction depth. `head` applies the output head in chunks.
        """


def get_formats(factory: Any) -> tuple[str, ...]:
    """Return the supported data formats (`Source.format`): class attribute `formats`, default `TEXTS`."""
    return tuple(getattr(factory, "formats", TEXTS))


def get_columns(factory: Any) -> Mapping[str, NeededColumn]:
    """Return the columns that an objective reads: class attribute `columns`, default {}."""
    columns: Mapping[str, NeededColumn] = getattr(factory, "columns", {})
    return columns


def get_meters(objective: Any) -> tuple[str, ...]:
    """Return an objective's meters: attribute `meters`, default ().

    A meter is a mean that is logged but not learned, such as the share of clipped tokens."""
    return tuple(getattr(objective, "meters", ()))


def get_headline(objective: Any) -> tuple[Meter, ...]:
    """Return a run's main meters: attribute `headline`, default `(LOSS,)`."""
    return tuple(getattr(objective, "headline", (LOSS,)))


def has_comparable_loss(objective: Any) -> bool:
    """Return whether an unusually high loss indicates an error: attribute `comparable_loss`, default True.

    A policy loss does not: it is near 0, with either sign, and scales with the advantages."""
    return bool(getattr(objective, "comparable_loss", True))


def get_doubt(objective: Any, step: int, meters: Mapping[str, float]) -> str:
    """Return a warning about `meters` (means over `step`, from 1) from the method `doubt`; "" by default."""
    doubt: str = objective.doubt(step, meters) if hasattr(objective, "doubt") else ""
    return doubt


class ObjectiveState:
    """Stores an objective's state in checkpoints."""

    def __init__(self, objective: Any) -> None:
        self._objective = objective

    def state(self) -> dict[str, Any]:
        """Return JSON values for the checkpoint. Raises `UserError` if JSON changes the values."""
        state: dict[str, Any] = self._objective.state()
        try:
            json.dumps(state)
        except (TypeError, ValueError) as e:
            raise self._build_error(f"what JSON does not hold ({e})") from None
        if (changed := _find_json_change(state, "state()")) is not None:
            raise self._build_error(f"what JSON changes ({changed})")
        return state

    def _build_error(self, value: str) -> UserError:
        return UserError(f"objective {type(self._objective).__name__}: state() returned {value}; return "
                         "dicts with strings as keys, lists, strings and numbers")

    def restore(self, state: dict[str, Any]) -> None:
        self._objective.restore(state)


def _find_json_change(value: Any, where: str) -> str | None:
    """Return a sentence about a value inside `value` that JSON changes, else None."""
    if isinstance(value, tuple):
        return f"{where} is a tuple, which comes back as a list"
    if isinstance(value, dict):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            return f"{where} has the key {wrong!r}, which comes back as a string"
        items = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, list) else []
    for key, item in items:
        change = _find_json_change(item, f"{where}[{key!r}]")
        if change is not None:
            return change
    return None


def get_checkpoint_parts(objective: Any) -> dict[str, ObjectiveState]:
    """Return `{"objective": ObjectiveState}` if the objective has the methods `state` and `restore`, else {}.

    `state` must return equal JSON values on every rank."""
    return {"objective": ObjectiveState(objective)} if hasattr(objective, "state") else {}


def with_denominators(batch: GlobalBatch, local_targets: Mapping[str, float]) -> GlobalBatch:
    """Sum tokens and each term's target weight over data-parallel ranks, as micro-batch denominators."""
    tokens = sum(int((~m.host.inputs.padding).sum()) for m in batch.micro_batches)
    counts = {**{name: local_targets[name] for name in sorted(local_targets)}, TOKENS: tokens}
    targets = sum_dict(counts, collectives.all_reduce_dp)
    num_tokens = int(targets.pop(TOKENS))
    micro_batches = tuple(dataclasses.replace(m, denominators=targets) for m in batch.micro_batches)
    return dataclasses.replace(batch, micro_batches=micro_batches, targets=targets, num_tokens=num_tokens)


def check_has_targets(batch: GlobalBatch, step: int) -> None:
    """Raise `UserError` on every rank if no term has a target at `step` (from 1).

    A loss of 0 would otherwise look perfect."""
    if not any(count > 0 for count in batch.targets.values()):
        raise UserError(f"step {step}: none of its {batch.num_tokens} tokens is a training target "
                        f"({', '.join(f'{term}: 0' for term in batch.targets)}), because its samples contain "
                        "only prompts; inspect the data with `sov-data sample`, raise seq_len (now "
                        f"{batch.seq_len}), or skip the step with --set data.skip_steps=[[{step},{step}]]")


def compute_total_loss(sums: LossSums, coefficients: Mapping[str, float],
                       denominators: Mapping[str, float]) -> torch.Tensor:
    """Sum coefficient * sum / denominator over terms; a term without targets adds 0."""
    total = torch.zeros((), dtype=torch.float32, device=next(iter(sums.terms.values())).device)
    for name, value in sums.terms.items():
        # `value * 0` leaves every parameter in the graph: ranks must run equal backward passes
        has_targets = denominators[name] > 0
        total = total + (coefficients[name] * value / denominators[name] if has_targets else value * 0.0)
    return total


def per_source(losses: torch.Tensor, weights: torch.Tensor, sources: torch.Tensor,
               num_sources: int) -> torch.Tensor:
    """Return [num_sources, 2] float64: sums of weighted losses and weights."""
    both = torch.stack([losses.detach().double() * weights, weights.double()], dim=1)
    return torch.zeros(num_sources, 2, dtype=torch.float64, device=losses.device).index_add_(0, sources, both)
