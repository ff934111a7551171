"""Rewards made of rewards: weights, gates, and a choice by domain."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Self

from annotated_types import MinLen

from megatron_sov.base.settings import Finite, ProblemCode, SettingsProblem
from megatron_sov.judge.rewards.reward import Result, Row, format_short

WORST_FIRST = ("failed", "timeout", "refused")


@dataclass(frozen=True)
class RewardPart:
    """One of the rewards."""

    reward: str
    """Its name, or FILE.py:NAME."""
    weight: Finite = 1.0
    """The row's reward is the sum of weight x reward over its parts."""
    gate: Finite | None = None
    """Where this part gives less, the row gets `gated_reward`, and the parts behind are not asked."""
    domains: tuple[str, ...] = ()
    """Rows that it judges; empty: all."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Its own settings."""


@dataclass(frozen=True)
class Composed:
    """The weighted sum of the parts that a row's domain has."""

    parts: Annotated[dict[str, RewardPart], MinLen(1)]
    """Name -> part; they are asked in this order, gates first."""
    gated_reward: Finite = 0.0
    """Of a row that a gate stops."""
    domain_field: str = "domain"
    """Field of a row with its domain."""

    def problems(self) -> list[SettingsProblem]:
        p = [SettingsProblem(ProblemCode.RULE, f"parts.{name}.reward", "is a composition itself", part.reward,
                             "name its parts here") for name,
             part in self.parts.items() if part.reward == "composed"]
        return p

    def get_part_requests(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Return name -> (reward, settings) of what has to be made."""
        return {name: (part.reward, part.settings) for name, part in self.parts.items()}

    def get_version_inputs(self, versions: Mapping[str, str]) -> dict[str, Any]:
        """Return what the version of the whole depends on: of the parts their versions, not settings."""
        inputs = asdict(self)
        # settings go: a part's version has those that count, and operational ones must not change the whole
        for part in inputs["parts"].values():
            del part["settings"]
        return {**inputs, "order": list(self.parts), "versions": dict(versions)}

    def sort_parts(self) -> list[tuple[str, RewardPart]]:
        # False sorts before True, and the sort is stable: gates first, each group in the order of the
        # settings
        return sorted(self.parts.items(), key=lambda item: item[1].gate is None)

    def applies_to(self, part: RewardPart, row: Row) -> bool:
        return not part.domains or row.get(self.domain_field) in part.domains

    def is_final(self, part: RewardPart, result: Result) -> bool:
        """Return whether nothing has to be asked behind this result."""
        return result.reward is None or (part.gate is not None and result.reward < part.gate)

    def combine_results(self, row: Row, results: Mapping[str, Result]) -> Result:
        """Return the result of a row from those of its parts; without one of them there is no reward."""
        if not results:
            return Result(None, "refused", {}, f"no part judges {self.domain_field} = "
                                               f"{format_short(row.get(self.domain_field))}")
        components = {name: {"reward": result.reward, "status": result.status, **result.components}
                      for name, result in results.items()}
        # a fault of the machine outranks one of the row: it may be gone tomorrow
        for status in WORST_FIRST:
            for name, result in results.items():
                if result.reward is None and result.status == status:
                    return Result(None, result.status, components, f"{name}: {result.reason}")
        for name, result in results.items():
            if self.is_final(self.parts[name], result):
                return Result(self.gated_reward, "scored", {**components, "gate": name})
        total = math.fsum(self.parts[name].weight * (r.reward or 0.0) for name, r in results.items())
        return Result(total, "scored", components)


class Runner(contextlib.AbstractContextManager["Runner"]):
    """Scores batches; a context, since what it started has to end."""

    def score(self, rows: Sequence[Row]) -> list[Result]:
        """Return the results of rows, in their order."""
        raise NotImplementedError


class ComposedRunner(Runner):
    """A composition over batches of rows; each part is asked for the rows that it judges alone.

    Args:
        composed: what is composed.
        runners: name -> what runs a part.
    """

    def __init__(self, composed: Composed, runners: Mapping[str, Runner]) -> None:
        self._composed, self._runners = composed, runners
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for running in self._runners.values():
            self._stack.enter_context(running)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def score(self, rows: Sequence[Row]) -> list[Result]:
        composed = self._composed
        part_results: list[dict[str, Result]] = [{} for _ in rows]
        # part by part over the whole batch, so that each runner gets many rows at a time
        active = list(range(len(rows)))
        for name, part in composed.sort_parts():
            indices = [i for i in active if composed.applies_to(part, rows[i])]
            results = dict(zip(indices, self._runners[name].score([rows[i] for i in indices]), strict=True))
            for i, result in results.items():
                part_results[i][name] = result
            # a gate that has stopped a row spares it the costlier parts
            active = [i for i in active if i not in results or not composed.is_final(part, results[i])]
        return [composed.combine_results(row, results) for row,
                results in zip(rows, part_results, strict=True)]
