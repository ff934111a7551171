"""Combine rewards: weights, gates, and selection by domain."""

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
    """A part of a composed reward."""

    reward: str
    """Reward name, or FILE.py:NAME."""
    weight: Finite = 1.0
    """Weight in the sum over `parts`."""
    gate: Finite | None = None
    """Threshold: for lower scores the row gets `gated_reward`, and later parts are skipped."""
    domains: tuple[str, ...] = ()
    """Values in `domain_field` to score; empty: all rows."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The part's own settings."""


@dataclass(frozen=True)
class Composed:
    """Reward `composed`: weighted sum over the parts for a row's domain."""

    parts: Annotated[dict[str, RewardPart], MinLen(1)]
    """Name -> part; gates run first, then the other parts in this order."""
    gated_reward: Finite = 0.0
    """Reward for rows below a `gate`."""
    domain_field: str = "domain"
    """Row field with the domain."""

    def problems(self) -> list[SettingsProblem]:
        p = [SettingsProblem(ProblemCode.RULE, f"parts.{name}.reward", "is a composition itself", part.reward,
                             "name its parts here") for name,
             part in self.parts.items() if part.reward == "composed"]
        return p

    def get_part_requests(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Return name -> (reward, settings) for building the parts."""
        return {name: (part.reward, part.settings) for name, part in self.parts.items()}

    def get_version_inputs(self, versions: Mapping[str, str]) -> dict[str, Any]:
        """Return the inputs to the version hash: the parts' versions in place of their settings."""
        inputs = asdict(self)
        # Remove settings, because operational settings must not change the version.
        for part in inputs["parts"].values():
            del part["settings"]
        return {**inputs, "order": list(self.parts), "versions": dict(versions)}

    def sort_parts(self) -> list[tuple[str, RewardPart]]:
        # The sort is stable: gates first, each group in the order in the settings.
        return sorted(self.parts.items(), key=lambda item: item[1].gate is None)

    def applies_to(self, part: RewardPart, row: Row) -> bool:
        return not part.domains or row.get(self.domain_field) in part.domains

    def is_final(self, part: RewardPart, result: Result) -> bool:
        """Return whether later parts can be skipped."""
        return result.reward is None or (part.gate is not None and result.reward < part.gate)

    def combine_results(self, row: Row, results: Mapping[str, Result]) -> Result:
        """Combine the parts' results; any part without a reward leaves the row without a reward."""
        if not results:
            return Result(None, "refused", {}, f"no part judges {self.domain_field} = "
                                               f"{format_short(row.get(self.domain_field))}")
        components = {name: {"reward": result.reward, "status": result.status, **result.components}
                      for name, result in results.items()}
        # Failures come first, because they may be gone on the next run.
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
    """Scores batches of rows; a context manager, because processes must end."""

    def score(self, rows: Sequence[Row]) -> list[Result]:
        """Return the results in the order of the rows."""
        raise NotImplementedError


class ComposedRunner(Runner):
    """Runs a composed reward; each part scores only the rows in its domains.

    Args:
        composed: settings.
        runners: part name -> runner.
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
        # Part by part over the whole batch, so that runners get many rows at a time.
        active = list(range(len(rows)))
        for name, part in composed.sort_parts():
            indices = [i for i in active if composed.applies_to(part, rows[i])]
            results = dict(zip(indices, self._runners[name].score([rows[i] for i in indices]), strict=True))
            for i, result in results.items():
                part_results[i][name] = result
            # A closed gate skips the remaining parts, which may be costly.
            active = [i for i in active if i not in results or not composed.is_final(part, results[i])]
        return [composed.combine_results(row, results) for row,
                results in zip(rows, part_results, strict=True)]
