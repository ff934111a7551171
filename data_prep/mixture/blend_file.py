"""Blends: YAML files that divide a phase's tokens among sources by tags.

A phase lists shares, or gives a product of tags: publications often report the share per kind and the share
of synthetic text, but not the share of synthetic text per kind.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MaxLen, MinLen

from data_prep.curate.pipeline.step import READY
from data_prep.shards.token_artifact import TRAIN
from data_prep.tags import is_chosen, read_source_tags
from megatron_sov.base.errors import UserError, format_problems, suggest_name
from megatron_sov.base.settings import (
    Bound, NotBlank, ProblemCode, SettingsProblem, Violation, read_settings_file)

SHIPPED = READY / "blends"
"""Folder with shipped blends."""
TOLERANCE_PCT = 0.01
"""Permitted deviation of a phase's shares from 100, because published figures are rounded."""
MAX_ENTRIES = 10_000
MAX_NAMES = 12
"""Names and tag values in a message."""
EPOCH_TOLERANCE = 1e-6
"""Relative tolerance for `--max-epochs`, as a share may reach the limit exactly."""
Where = dict[str, tuple[str, ...]]
"""Tag, or "source" for names -> alternative patterns."""
Missing = Literal["refuse", "spread"]
"""For a share without source: refuse the blend, or spread the share over the phase in proportion."""
Percent = Annotated[float, Ge(0), Le(100)]


@dataclass(frozen=True)
class BlendEntry:
    """A phase's share, with the conditions for selecting sources."""

    where: Where
    share: float
    """Share of the phase's tokens, in (0, 1]."""

    def describe(self) -> str:
        """Return a short text, e.g. `kind=ko level=L2|L3 (3.3 %)`."""
        conditions = " ".join(f"{key}={'|'.join(patterns)}" for key, patterns in self.where.items())
        return f"{conditions} ({100 * self.share:.4g} %)"


@dataclass(frozen=True)
class BlendPhase:
    """A phase of a curriculum."""

    name: str
    tokens: float
    """Token budget; 0: unspecified."""
    entries: tuple[BlendEntry, ...]
    """Entries; shares sum to 1."""


@dataclass(frozen=True)
class Blend:
    """A blend file in normal form."""

    name: str
    phases: tuple[BlendPhase, ...]
    """Phases in training order."""


@dataclass(frozen=True)
class PhaseShares:
    name: str
    tokens: float
    """Token budget; 0: unspecified."""
    shares: dict[str, float]
    """Source -> share of the phase's tokens; sums to 1."""
    missing: tuple[BlendEntry, ...] = ()
    """Entries without source; the shares are spread."""


def find_blend(name: str) -> Path:
    """Return the file for `--blend`: a path, or a shipped blend's name. Raises `UserError`: none exists."""
    shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}
    # the user's file takes precedence over a shipped blend
    if name in shipped and not Path(name).exists():
        return shipped[name]
    if not Path(name).is_file():
        raise UserError(f"--blend {name}: is no file and no blend that is shipped"
                        f"{suggest_name(name, shipped)} (shipped: {', '.join(shipped)})")
    return Path(name)


def read_blend(file: Path) -> Blend:
    """Read a blend file. Raises `SettingsError` with every mistake and line."""
    blend = read_settings_file(BlendFile, file)
    return Blend(str(blend.name or file.stem), tuple(phase.to_phase() for phase in blend.phases))


def _find_pattern_violation(value: Any) -> Violation | None:
    patterns = value if isinstance(value, (list, tuple)) else [value]
    if patterns and all(isinstance(pattern, (str, int)) and str(pattern) for pattern in patterns):
        return None
    return ProblemCode.BOUND, "must be a value of the tag, a pattern, or a list of them", "e.g. {level: L2}"


@dataclass(frozen=True)
class BlendFilePhase:
    """A phase in a blend file."""

    name: NotBlank | int
    """Name of the recipe's phase."""
    tokens: Annotated[float, Ge(1)] = 0.0
    """Token budget; required if there are several phases."""
    where: Mapping[str, Annotated[Any, Bound(_find_pattern_violation)]] = field(default_factory=dict)
    """Conditions for every share: tag, or "source" for names -> a value, a pattern, or a list of both."""
    shares: Annotated[tuple[Mapping[str, Any], ...], MinLen(1), MaxLen(MAX_ENTRIES)] | None = None
    """Conditions and a share in percent per entry."""
    product: Annotated[dict[str, Annotated[dict[str, Percent], MinLen(1)]], MinLen(1)] | None = None
    """Tag -> value -> percent: an entry per combination, with the product of shares."""

    def problems(self) -> list[SettingsProblem]:
        if (self.shares is None) == (self.product is None):
            return [SettingsProblem(ProblemCode.RULE, "", "must have either shares or product")]
        if self.product is None:
            rows = self.shares or ()
            p = [problem for i, row in enumerate(rows) for problem in self._find_row_problems(i, row)]
            return p or _find_sum_problems("shares", [row["share"] for row in rows])
        p = [problem for tag in self.product for problem in self._find_repeated(f"product.{tag}", [tag])]
        for tag, side in self.product.items():
            p += _find_sum_problems(f"product.{tag}", side.values())
        if math.prod(map(len, self.product.values())) > MAX_ENTRIES:
            p.append(SettingsProblem(ProblemCode.RULE, "product",
                                     f"has more than {MAX_ENTRIES:,} combinations"))
        return p

    def _find_row_problems(self, number: int, row: Mapping[str, Any]) -> Iterator[SettingsProblem]:
        key, share = f"shares.{number}", row.get("share")
        if share is None or len(row) + len(self.where) < 2:
            yield SettingsProblem(ProblemCode.RULE, key,
                                  "must have a share in percent and at least one condition",
                                  way_out="e.g. {kind: ko, share: 3.3}")
            return
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 100:
            yield SettingsProblem(ProblemCode.BOUND, f"{key}.share", "must be a number, between 0 and 100",
                                  share)
        yield from self._find_repeated(key, row)
        for tag, value in row.items():
            if tag != "share" and (violation := _find_pattern_violation(value)):
                yield SettingsProblem(violation[0], f"{key}.{tag}", violation[1], value)

    def _find_repeated(self, key: str, tags: Iterable[str]) -> list[SettingsProblem]:
        return [SettingsProblem(ProblemCode.RULE, key,
                                f"{tag} is a condition of the whole phase already (where)",
                                way_out="leave it out there or here") for tag in tags if tag in self.where]

    def to_phase(self) -> BlendPhase:
        common = _format_conditions(self.where)
        if self.product is None:
            entries = []
            for row in self.shares or ():
                conditions = _format_conditions({tag: value for tag, value in row.items() if tag != "share"})
                entries.append(BlendEntry(common | conditions, row["share"] / 100))
            return BlendPhase(str(self.name), self.tokens, _scale_shares(entries))
        # each side sums to 1, so the products do too
        sides = [_scale_shares([BlendEntry({tag: (value,)}, share / 100) for value, share in side.items()])
                 for tag, side in self.product.items()]
        entries = []
        for parts in itertools.product(*sides):
            where = dict(common)
            for part in parts:
                where |= part.where
            entries.append(BlendEntry(where, math.prod(part.share for part in parts)))
        return BlendPhase(str(self.name), self.tokens, tuple(entries))


@dataclass(frozen=True)
class BlendFile:
    """A blend file."""

    phases: Annotated[tuple[BlendFilePhase, ...], MinLen(1)]
    """Phases in training order."""
    name: NotBlank | int = ""
    """Name of the blend; "": the file's name."""

    def problems(self) -> list[SettingsProblem]:
        names = [str(phase.name) for phase in self.phases]
        p = [SettingsProblem(ProblemCode.RULE, f"phases.{i}.name", "is the name of two phases", name,
                             "give each its own")
             for i, name in enumerate(names) if name in names[:i]]
        return p + [SettingsProblem(ProblemCode.RULE, f"phases.{i}.tokens",
                                    "is missing; of several phases each needs its budget in tokens")
                    for i, phase in enumerate(self.phases) if len(names) > 1 and not phase.tokens]


def _format_conditions(conditions: Mapping[str, Any]) -> Where:
    """Return conditions with text patterns; `True` becomes "true"."""
    where = {}
    for tag, value in conditions.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        where[tag] = tuple(str(v).lower() if isinstance(v, bool) else str(v) for v in values)
    return where


def _find_sum_problems(key: str, percents: Iterable[float]) -> list[SettingsProblem]:
    total = math.fsum(percents)
    if abs(total - 100) <= TOLERANCE_PCT:
        return []
    return [SettingsProblem(ProblemCode.RULE, key, f"the shares add up to {total:.6g} %, and must to 100 %",
                            way_out=f"change them by {100 - total:+.6g}")]


def _scale_shares(entries: Sequence[BlendEntry]) -> tuple[BlendEntry, ...]:
    """Scale shares to sum 1, and drop entries without share."""
    total = math.fsum(entry.share for entry in entries)
    return tuple(BlendEntry(entry.where, entry.share / total) for entry in entries if entry.share > 0)


def allot_shares(blend: Blend, sources: Sequence[dict[str, Any]], missing: Missing = "refuse",
                 num_tokens: float = 0) -> list[PhaseShares]:
    """Return `PhaseShares` per phase; an entry's share is divided among sources in proportion to tokens.
    `num_tokens`: total budget, divided among phases in proportion to budgets; 0: the blend's budgets. Raises
    `UserError` with every entry without source, and every source that matches two entries."""
    problems: list[str] = []
    phases: list[PhaseShares] = []
    budget = sum(phase.tokens for phase in blend.phases)
    for phase in blend.phases:
        tokens = phase.tokens
        if num_tokens:
            # a single phase may lack a budget
            share = phase.tokens / budget if budget else 1.0
            tokens = num_tokens * share
        phases.append(_allot_phase(phase, sources, missing, tokens, problems))
    if problems:
        raise UserError(format_problems(f"blend {blend.name}", problems, _describe_remedy(sources)))
    return phases


def _allot_phase(phase: BlendPhase, sources: Sequence[dict[str, Any]], missing: Missing, tokens: float,
                 problems: list[str]) -> PhaseShares:
    owners: dict[str, BlendEntry] = {}
    lacking: list[BlendEntry] = []
    shares: dict[str, float] = {}
    for entry in phase.entries:
        counts = {s["name"]: s["splits"][TRAIN]["num_tokens"] for s in sources if is_chosen(entry.where, s)}
        available = sum(counts.values())
        if not available:
            lacking.append(entry)
        for name, count in counts.items():
            if name in owners:
                problems.append(f"phase {phase.name}: source {name} is meant by two entries, "
                                f"{owners[name].describe()} and {entry.describe()}; tell them apart")
            owners[name] = entry
            if count:
                shares[name] = entry.share * count / available
    if lacking and (missing == "refuse" or not shares):
        problems += [f"phase {phase.name}: no source is {entry.describe()}" for entry in lacking]
    # dividing by the total spreads lacking shares in proportion
    total = math.fsum(shares.values())
    scaled = {name: share / total for name, share in shares.items()} if total else {}
    return PhaseShares(phase.name, tokens, scaled, tuple(lacking))


def _describe_remedy(sources: Sequence[dict[str, Any]]) -> str:
    values: dict[str, set[str]] = {}
    for source in sources:
        for key, tag_values in read_source_tags(source).items():
            values.setdefault(key, set()).update(tag_values)
    tags = "; ".join(f"{key}: {', '.join(sorted(tag_values)[:MAX_NAMES])}"
                     for key, tag_values in values.items())
    names = ", ".join([s["name"] for s in sources][:MAX_NAMES])
    return (f"the sources are {names}{', ...' if len(sources) > MAX_NAMES else ''}, their tags "
            f"{tags or 'none (pack them with --tag)'}; pack what is missing, change the blend, or give "
            "missing shares to the others of their phase with --missing spread")


def combine_phases(phases: Sequence[PhaseShares]) -> dict[str, float]:
    """Return source -> share of the total tokens; only a single phase may have no token budget."""
    budget = math.fsum(phase.tokens for phase in phases)
    weights: dict[str, float] = {}
    for phase in phases:
        phase_weight = phase.tokens / budget if budget else 1.0
        for name, share in phase.shares.items():
            weights[name] = weights.get(name, 0.0) + phase_weight * share
    return weights


def format_shares(phases: Sequence[PhaseShares], sources: Sequence[dict[str, Any]]) -> list[str]:
    """Return table lines: share, tokens and epochs per phase and source, and total epochs."""
    available = {s["name"]: s["splits"][TRAIN]["num_tokens"] for s in sources}
    names = [name for name in available if any(name in phase.shares for phase in phases)]
    width = max(map(len, ["source", *names]))
    lines = []
    for phase in phases:
        budget = f", {phase.tokens:,.0f} tokens" if phase.tokens else ""
        lines.append(f"phase {phase.name}{budget}")
        for name in names:
            if name not in phase.shares:
                continue
            line = f"  {name:<{width}} {100 * phase.shares[name]:>8.4f} %"
            if phase.tokens:
                tokens = phase.shares[name] * phase.tokens
                line += f" {tokens:>22,.0f} tokens {tokens / available[name]:>9.3g} epochs"
            lines.append(line)
        lines += [f"  nothing for {entry.describe()}: its share is spread over the others"
                  for entry in phase.missing]
    if any(phase.tokens for phase in phases):
        epochs = compute_epochs(phases, sources)
        lines.append("all phases")
        lines += [f"  {name:<{width}} {available[name]:>22,} tokens available, {epochs[name]:.3g} epochs"
                  for name in names]
    return lines


def compute_epochs(phases: Sequence[PhaseShares], sources: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return source -> passes over the training tokens, summed over phases."""
    epochs: dict[str, float] = {}
    for source in sources:
        count = source["splits"][TRAIN]["num_tokens"]
        tokens = math.fsum(phase.tokens * phase.shares.get(source["name"], 0.0) for phase in phases)
        epochs[source["name"]] = tokens / count if count else 0.0
    return epochs


def check_epochs(phases: Sequence[PhaseShares], sources: Sequence[dict[str, Any]], max_epochs: float) -> None:
    """Raise `UserError` with epochs and tokens for sources read more often than `max_epochs`."""
    available = {s["name"]: s["splits"][TRAIN]["num_tokens"] for s in sources}
    problems = [f"source {name}: {count:.4g} epochs of its {available[name]:,} tokens"
                for name, count in compute_epochs(phases, sources).items()
                if count > max_epochs * (1 + EPOCH_TOLERANCE)]
    if problems:
        raise UserError(format_problems(
            f"--max-epochs {max_epochs:g}", problems,
            "pack more of them, lower their shares or the budget (--tokens), or pass a larger --max-epochs"))
