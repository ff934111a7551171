"""A blend as a file: which part of each phase's tokens is of which kind, level and origin.

Shares stand in a list, or as a product of tags: what is published is often the share of each kind and that of
synthetic text, and not of each kind's synthetic text.  A second file says how a mixture is searched for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MaxLen, MinLen

from data_prep.shards.token_artifact import TRAIN
from data_prep.tags import is_chosen, read_source_tags
from megatron_sov.base.errors import UserError, format_problems, suggest_name
from megatron_sov.base.settings import (
    Bound, NotBlank, ProblemCode, SettingsProblem, Violation, read_settings_file)

SHIPPED = Path(__file__).parents[1] / "curate/pipelines/blends"
"""Blends that come with the framework, one file each."""
TOLERANCE_PCT = 0.01
"""By which the shares of a phase may miss 100, for published figures are rounded."""
MAX_ENTRIES = 10_000
Where = dict[str, tuple[str, ...]]
"""Tag, or "source" for names, -> patterns of which one has to fit."""


@dataclass(frozen=True)
class BlendEntry:
    """A share of a phase, and the sources that it is made of."""

    where: Where
    """Conditions that its sources meet."""
    share: float
    """Part of the phase's tokens, in (0, 1]."""

    def describe(self) -> str:
        """Return the entry in a few words, e.g. `kind=ko level=L2|L3 (3.3 %)`."""
        conditions = " ".join(f"{key}={'|'.join(patterns)}" for key, patterns in self.where.items())
        return f"{conditions} ({100 * self.share:.4g} %)"


@dataclass(frozen=True)
class BlendPhase:
    name: str
    """Name of the curriculum's phase that reads it."""
    tokens: float
    """Its budget; 0 where it is not said."""
    entries: tuple[BlendEntry, ...]
    """Their shares sum to 1."""


@dataclass(frozen=True)
class Blend:
    """What a blend file says."""

    name: str
    phases: tuple[BlendPhase, ...]
    """In the order of training."""


def find_blend(given: str) -> Path:
    """Return the file that --blend means: a path, or the name of one that is shipped.

    Raises:
        UserError: there is none.
    """
    shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}
    # A file of the user's goes before a shipped blend of the same name.
    if given in shipped and not Path(given).exists():
        return shipped[given]
    if not Path(given).is_file():
        raise UserError(f"--blend {given}: is no file and no blend that is shipped"
                        f"{suggest_name(given, shipped)} (shipped: {', '.join(shipped)})")
    return Path(given)


def _no_patterns(value: Any) -> Violation | None:
    patterns = value if isinstance(value, (list, tuple)) else [value]
    return None if patterns and all(isinstance(p, (str, int)) and str(p) for p in patterns) else (
        ProblemCode.BOUND, "must be a value of the tag, a pattern, or a list of them", "e.g. {level: L2}")


Percent = Annotated[float, Ge(0), Le(100)]


@dataclass(frozen=True)
class BlendFilePhase:
    """A phase as it stands in a file."""

    name: NotBlank | int
    """Of the recipe's phase that reads it."""
    tokens: Annotated[float, Ge(1)] = 0.0
    """Its budget; of several phases each needs one."""
    where: Mapping[str, Annotated[Any, Bound(_no_patterns)]] = field(default_factory=dict)
    """Conditions of all its shares: tag, or "source" for names -> a value, a pattern, or a list of them."""
    shares: Annotated[tuple[Mapping[str, Any], ...], MinLen(1), MaxLen(MAX_ENTRIES)] | None = None
    """Conditions, and a share in percent, of each entry."""
    product: Annotated[dict[str, Annotated[dict[str, Percent], MinLen(1)]], MinLen(1)] | None = None
    """Tag -> value -> percent: every combination of one value of each tag, its share the product."""

    def problems(self) -> list[SettingsProblem]:
        if (self.shares is None) == (self.product is None):
            return [SettingsProblem(ProblemCode.RULE, "", "must have either shares or product")]
        if self.product is None:
            # The sum is looked at only where every share is a number.
            p = [problem for i, row in enumerate(self.shares or ()) for problem in self._of_row(i, row)]
            return p or _no_whole("shares", [row["share"] for row in self.shares or ()])
        p = [problem for tag in self.product for problem in self._twice(f"product.{tag}", [tag])]
        p += [problem for tag, side in self.product.items()
              for problem in _no_whole(f"product.{tag}", side.values())]
        # A product grows with each tag: it is refused before it is made.
        if math.prod(map(len, self.product.values())) > MAX_ENTRIES:
            p.append(SettingsProblem(ProblemCode.RULE, "product",
                                     f"has more than {MAX_ENTRIES:,} combinations"))
        return p

    def _of_row(self, number: int, row: Mapping[str, Any]) -> Iterator[SettingsProblem]:
        key, share = f"shares.{number}", row.get("share")
        if share is None or len(row) + len(self.where) < 2:
            yield SettingsProblem(ProblemCode.RULE, key,
                                  "must have a share in percent and at least one condition",
                                  way_out="e.g. {kind: ko, share: 3.3}")
            return
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 100:
            yield SettingsProblem(ProblemCode.BOUND, f"{key}.share", "must be a number, between 0 and 100",
                                  share)
        yield from self._twice(key, row)
        for tag, value in row.items():
            if tag != "share" and (breach := _no_patterns(value)):
                yield SettingsProblem(breach[0], f"{key}.{tag}", *breach[1:2], value)

    def _twice(self, key: str, own: Iterable[str]) -> list[SettingsProblem]:
        return [SettingsProblem(ProblemCode.RULE, key,
                                f"{tag} is a condition of the whole phase already (where)",
                                way_out="leave it out there or here") for tag in own if tag in self.where]

    def read(self) -> BlendPhase:
        common = _written(self.where)
        if self.product is None:
            entries = _scaled([BlendEntry(common | _written({k: v for k, v in row.items() if k != "share"}),
                                          row["share"] / 100) for row in self.shares or ()])
        else:
            # Each side is scaled to 1, so the products sum to 1 too.
            sides = [_scaled([BlendEntry({tag: (value,)}, share / 100) for value, share in side.items()])
                     for tag, side in self.product.items()]
            entries = tuple(BlendEntry(common | {k: v for part in parts for k, v in part.where.items()},
                                       math.prod(part.share for part in parts))
                            for parts in itertools.product(*sides))
        return BlendPhase(str(self.name), self.tokens, entries)


@dataclass(frozen=True)
class BlendFile:
    """A blend as it stands in a file."""

    phases: Annotated[tuple[BlendFilePhase, ...], MinLen(1)]
    """In the order of training."""
    name: NotBlank | int = ""
    """Of the blend; "": as the file is called."""

    def problems(self) -> list[SettingsProblem]:
        names = [str(phase.name) for phase in self.phases]
        p = [SettingsProblem(ProblemCode.RULE, f"phases.{i}.name", "is the name of two phases", name,
                             "give each its own")
             for i, name in enumerate(names) if name in names[:i]]
        return p + [SettingsProblem(ProblemCode.RULE, f"phases.{i}.tokens",
                                    "is missing; of several phases each needs its budget in tokens")
                    for i, phase in enumerate(self.phases) if len(names) > 1 and not phase.tokens]


def read_blend(file: Path) -> Blend:
    """Return what a blend file says.

    Raises:
        SettingsError: it breaks rules; all mistakes are told, each with its line.
    """
    found = read_settings_file(BlendFile, file)
    return Blend(str(found.name or file.stem), tuple(phase.read() for phase in found.phases))


def _written(conditions: Mapping[str, Any]) -> Where:
    """Return conditions with values as tags are written: `True` is "true"."""
    return {tag: tuple(str(v).lower() if isinstance(v, bool) else str(v)
                       for v in (value if isinstance(value, (list, tuple)) else [value]))
            for tag, value in conditions.items()}


def _no_whole(key: str, percents: Iterable[float]) -> list[SettingsProblem]:
    total = math.fsum(percents)
    return [] if abs(total - 100) <= TOLERANCE_PCT else [SettingsProblem(
        ProblemCode.RULE, key, f"the shares add up to {total:.6g} %, and must to 100 %",
        way_out=f"change them by {100 - total:+.6g}")]


def _scaled(entries: Sequence[BlendEntry]) -> tuple[BlendEntry, ...]:
    total = math.fsum(entry.share for entry in entries)
    return tuple(BlendEntry(entry.where, entry.share / total) for entry in entries if entry.share > 0)


# Shares of sources that a blend allots.


Missing = Literal["refuse", "spread"]
"""What becomes of a share that no source is for: the blend is refused, or the others of its phase share it in
proportion."""
SHOWN_VALUES = 12
ROUNDING = 1e-6
"""By which epochs may lie above their bound: shares that were capped to it lie on it."""


@dataclass(frozen=True)
class PhaseShares:
    """One phase over named sources."""

    name: str
    tokens: float
    """Its budget; 0: not said."""
    shares: dict[str, float]
    """Source -> part of the phase's tokens; they sum to 1."""
    missing: tuple[BlendEntry, ...] = ()
    """Entries that no source is for, whose share the others have."""


def allot_shares(blend: Blend, sources: Sequence[dict[str, Any]], missing: Missing = "refuse",
          num_tokens: float = 0) -> list[PhaseShares]:
    """Return each phase's shares by source.  The sources of one entry have its share by their tokens.

    Args:
        blend: what is wanted.
        sources: records of manifests.
        missing: what becomes of shares that no source is for.
        num_tokens: what all phases together are to have, each in proportion to its own budget; 0: as the
            blend says.

    Raises:
        UserError: entries that no source is for, a source that two entries of a phase are for; all at once.
    """
    problems: list[str] = []
    phases: list[PhaseShares] = []
    budget = sum(phase.tokens for phase in blend.phases)
    for phase in blend.phases:
        # Phases keep their proportions; a single phase without a budget has all of it.
        scaled = phase.tokens
        if num_tokens:
            part = phase.tokens / budget if budget else 1.0
            scaled = num_tokens * part
        phases.append(_of_phase(phase, sources, missing, scaled, problems))
    if problems:
        raise UserError(format_problems(f"blend {blend.name}", problems, _way_out(sources)))
    return phases


def _of_phase(phase: BlendPhase, sources: Sequence[dict[str, Any]], missing: Missing, tokens: float,
              problems: list[str]) -> PhaseShares:
    owner: dict[str, BlendEntry] = {}
    lacking: list[BlendEntry] = []
    raw: dict[str, float] = {}
    for entry in phase.entries:
        chosen = {s["name"]: s["splits"][TRAIN]["num_tokens"] for s in sources if is_chosen(entry.where, s)}
        available = sum(chosen.values())
        if not available:
            lacking.append(entry)
        for name, count in chosen.items():
            if name in owner:
                problems.append(f"phase {phase.name}: source {name} is meant by two entries, "
                                f"{owner[name].describe()} and {entry.describe()}; tell them apart")
            owner[name] = entry
            if count:
                raw[name] = entry.share * count / available
    # With "spread" the division by the total below gives the others a lacking share, in proportion.
    if lacking and (missing == "refuse" or not raw):
        problems += [f"phase {phase.name}: no source is {entry.describe()}" for entry in lacking]
    total = math.fsum(raw.values())
    return PhaseShares(phase.name, tokens, {name: share / total for name, share in raw.items()} if total else
                       {}, tuple(lacking))


def _way_out(sources: Sequence[dict[str, Any]]) -> str:
    values: dict[str, set[str]] = {}
    for source in sources:
        for key, found in read_source_tags(source).items():
            values.setdefault(key, set()).update(found)
    tags = "; ".join(f"{key}: {', '.join(sorted(found)[:SHOWN_VALUES])}" for key, found in values.items())
    names = ", ".join([s["name"] for s in sources][:SHOWN_VALUES])
    return (f"the sources are {names}{', ...' if len(sources) > SHOWN_VALUES else ''}, their tags "
            f"{tags or 'none (pack them with --tag)'}; pack what is missing, change the blend, or give "
            "missing shares to the others of their phase with --missing spread")


def combine_phases(phases: Sequence[PhaseShares]) -> dict[str, float]:
    """Return source -> its part of all phases' tokens; phases without budgets count alike."""
    budget = math.fsum(phase.tokens for phase in phases)
    weights: dict[str, float] = {}
    for phase in phases:
        part = phase.tokens / budget if budget else 1 / len(phases)
        for name, share in phase.shares.items():
            weights[name] = weights.get(name, 0.0) + part * share
    return weights


def format_shares(phases: Sequence[PhaseShares], sources: Sequence[dict[str, Any]]) -> list[str]:
    """Return lines: each source's share of each phase, its tokens, and how often each phase, and all of them,
    read it."""
    available = {s["name"]: s["splits"][TRAIN]["num_tokens"] for s in sources}
    names = [name for name in available if any(name in phase.shares for phase in phases)]
    width = max(map(len, ["source", *names]))
    lines = []
    for phase in phases:
        budget = f", {phase.tokens:,.0f} tokens" if phase.tokens else ""
        lines.append(f"phase {phase.name}{budget}")
        for name in names:
            if name in phase.shares:
                share = phase.shares[name]
                read = (f" {share * phase.tokens:>22,.0f} tokens "
                        f"{share * phase.tokens / available[name]:>9.3g} epochs" if phase.tokens else "")
                lines.append(f"  {name:<{width}} {100 * share:>8.4f} %{read}")
        lines += [f"  nothing for {entry.describe()}: its share is spread over the others"
                  for entry in phase.missing]
    read_epochs = compute_epochs(phases, sources)
    if any(phase.tokens for phase in phases):
        lines.append("all phases")
        lines += [f"  {name:<{width}} {available[name]:>22,} tokens available, {read_epochs[name]:.3g} epochs"
                  for name in names]
    return lines


def compute_epochs(phases: Sequence[PhaseShares], sources: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return source -> passes over its training tokens that all phases make together."""
    found: dict[str, float] = {}
    for source in sources:
        count = source["splits"][TRAIN]["num_tokens"]
        read = math.fsum(phase.tokens * phase.shares.get(source["name"], 0.0) for phase in phases)
        found[source["name"]] = read / count if count else 0.0
    return found


def check_epochs(phases: Sequence[PhaseShares], sources: Sequence[dict[str, Any]],
                       max_epochs: float) -> None:
    """Refuse sources that are read more often than `max_epochs`.

    Raises:
        UserError: naming each, with its epochs and tokens.
    """
    available = {s["name"]: s["splits"][TRAIN]["num_tokens"] for s in sources}
    problems = [f"source {name}: {count:.4g} epochs of its {available[name]:,} tokens"
                for name, count in compute_epochs(phases, sources).items()
                if count > max_epochs * (1 + ROUNDING)]
    if problems:
        raise UserError(format_problems(
            f"--max-epochs {max_epochs:g}", problems,
            "pack more of them, lower their shares or the budget (--tokens), or pass a larger --max-epochs"))
