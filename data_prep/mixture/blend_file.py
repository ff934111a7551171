"""A blend as a file: which part of each phase's tokens is of which kind, level and origin.

Shares stand in a list, or as a product of tags: what is published is often the share of each kind and that of
synthetic text, and not of each kind's synthetic text.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from data_prep.splits import TRAIN
from data_prep.tags import SOURCE, is_chosen, tags_of
from megatron_sov.errors import UserError, list_problems, nearest
from megatron_sov.settings import Place, read_located, read_text

SHIPPED = Path(__file__).parents[1] / "pipelines" / "blends"
"""Blends that come with the framework, one file each."""
TOLERANCE_PCT = 0.01
"""By which the shares of a phase may miss 100, for published figures are rounded."""
PHASE_KEYS = ("name", "tokens", "where", "shares", "product")
MAX_ENTRIES = 10_000
Where = dict[str, tuple[str, ...]]
"""Tag, or "source" for names, -> patterns of which one has to fit."""


# YAML files of mixtures: every mistake is told, with the line that it stands on.


class YamlFile:
    """What a file holds, and the mistakes that were found in it."""

    def __init__(self, file: Path) -> None:
        """Read a file.

        Raises:
            UserError: it cannot be read, or is no YAML that is taken.
        """
        self.file = file
        self._found = read_located(read_text(file))
        self.value: Any = self._found.value
        self.problems = [(p.line, f"{file}:{p.line}: {p.sentence}") for p in self._found.problems]
        """Line and sentence of each mistake."""
        self.raise_problems()

    def wrong(self, place: Place, rule: str) -> None:
        """Note a mistake.

        Args:
            place: where it is; what is missing has the line of what should hold it.
            rule: what it should be, and what to do.
        """
        value: Any = self.value
        if place in self._found.lines:
            for key in place:
                value = value[key]
        else:
            value = None
        shown = "" if value is None or isinstance(value, (dict, list)) else f" = {str(value)[:80]!r}"
        line = self._found.line(place)
        self.problems.append((line, f"{self.file}:{line}: {'.'.join(map(str, place)) or 'the file'}{shown}: "
                                    f"{rule}"))

    def check_keys(self, place: Place, found: Any, allowed: Iterable[str]) -> dict[str, Any]:
        """Return a mapping, with a mistake noted for each key that it may not have; {} of what is none."""
        if not isinstance(found, dict):
            self.wrong(place, f"must hold {', '.join(allowed)}")
            return {}
        for key in found:
            if key not in allowed:
                self.wrong((*place, key), f"is no key here (there are: {', '.join(allowed)})"
                                               f"{nearest(key, allowed) or '; leave it out'}")
        return found

    def number(self, place: Place, value: Any, low: float, high: float = float("inf"), *,
               whole: bool = False) -> float:
        """Return a number; `low`, and a mistake noted, for what is none or lies outside of its bounds."""
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not (math.isfinite(number) and low <= number <= high) or (whole and number != int(number)):
            bounds = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
            self.wrong(place, f"must be a {'whole ' if whole else ''}number, {bounds}")
            return low
        return number

    def raise_problems(self) -> None:
        """Raise `UserError` with all mistakes, if there are any."""
        if self.problems:
            in_order = [sentence for _, sentence in sorted(self.problems, key=lambda problem: problem[0])]
            raise UserError(list_problems(str(self.file), in_order))


@dataclass(frozen=True)
class BlendEntry:
    """A share of a phase, and the sources that it is made of."""

    where: Where
    """Conditions that its sources meet."""
    share: float
    """Part of the phase's tokens, in (0, 1]."""

    def shown(self) -> str:
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
    if given in shipped and not Path(given).exists():
        return shipped[given]
    if not Path(given).is_file():
        raise UserError(f"--blend {given}: is no file and no blend that is shipped{nearest(given, shipped)} "
                        f"(shipped: {', '.join(shipped)})")
    return Path(given)


def read_blend(file: Path) -> Blend:
    """Return what a blend file says.

    Raises:
        UserError: it breaks rules; all mistakes are told, each with its line.
    """
    found = YamlFile(file)
    top = found.check_keys((), found.value, ("name", "phases"))
    raw = top.get("phases")
    if not isinstance(raw, list) or not raw:
        found.wrong(("phases",), "must be a list of phases, each with a name, tokens, and shares or product")
        raw = []
    phases = [_phase(found, ("phases", i), phase, len(raw)) for i, phase in enumerate(raw)]
    names = [phase.name for phase in phases]
    for i, name in enumerate(names):
        if name in names[:i]:
            found.wrong(("phases", i, "name"), "is the name of two phases; give each its own")
    found.raise_problems()
    return Blend(str(top.get("name", file.stem)), tuple(phases))


def _phase(file: YamlFile, place: Place, raw: Any, num_phases: int) -> BlendPhase:
    found = file.check_keys(place, raw, PHASE_KEYS)
    if not str(found.get("name", "")):
        file.wrong((*place, "name"), "is missing; name the phase as the recipe's phase is called")
    tokens = 0.0
    if "tokens" in found:
        tokens = file.number((*place, "tokens"), found["tokens"], 1)
    elif num_phases > 1:
        file.wrong((*place, "tokens"), "is missing; of several phases each needs its budget in tokens")
    common = _where(file, (*place, "where"), found.get("where", {}))
    if ("shares" in found) == ("product" in found):
        file.wrong(place, "must have either shares or product")
        return BlendPhase(str(found.get("name", "")), tokens, ())
    entries = (_listed(file, (*place, "shares"), found["shares"], common) if "shares" in found
               else _product(file, (*place, "product"), found["product"], common))
    return BlendPhase(str(found.get("name", "")), tokens, entries)


def _where(file: YamlFile, place: Place, raw: Any) -> Where:
    """Return conditions: tag -> patterns."""
    if not isinstance(raw, dict):
        file.wrong(place, f"must be conditions, e.g. {{level: L2}} or {{{SOURCE}: 'web-*'}}")
        return {}
    where: Where = {}
    for key, value in raw.items():
        patterns = value if isinstance(value, list) else [value]
        if not patterns or not all(isinstance(p, (str, int)) and str(p) for p in patterns):
            file.wrong((*place, str(key)), "must be a value of the tag, a pattern, or a list of them")
            continue
        where[str(key)] = tuple(_written(p) for p in patterns)
    return where


def _written(value: Any) -> str:
    """Return a value as tags are written: `True` is "true"."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _listed(file: YamlFile, place: Place, raw: Any, common: Where) -> tuple[BlendEntry, ...]:
    if not isinstance(raw, list) or not raw or len(raw) > MAX_ENTRIES:
        file.wrong(place, f"must be a list of 1 to {MAX_ENTRIES:,} shares, e.g. "
                          "- {kind: ko, level: L2, share: 3.3}")
        return ()
    entries = []
    for i, row in enumerate(raw):
        here = (*place, i)
        if not isinstance(row, dict) or "share" not in row or len(row) + len(common) < 2:
            file.wrong(here, "must have a share in percent and at least one condition, e.g. "
                             "{kind: ko, share: 3.3}")
            continue
        own = _where(file, here, {key: value for key, value in row.items() if key != "share"})
        _refuse_twice(file, here, own, common)
        entries.append(BlendEntry({**common, **own}, _share(file, (*here, "share"), row["share"])))
    return _summing_to_one(file, place, entries) if len(entries) == len(raw) else ()


def _product(file: YamlFile, place: Place, raw: Any, common: Where) -> tuple[BlendEntry, ...]:
    """Return the entries of `product`: every combination of one value of each tag, its share the product."""
    sides_are_there = isinstance(raw, dict) and raw and all(isinstance(v, dict) and v for v in raw.values())
    if not sides_are_there or math.prod(len(values) for values in raw.values()) > MAX_ENTRIES:
        file.wrong(place, "must have for each tag its values and their shares in percent, e.g. "
                          "synthetic: {true: 10.2, false: 89.8}")
        return ()
    sides = []
    for tag, values in raw.items():
        here = (*place, str(tag))
        side = [BlendEntry({str(tag): (_written(value),)}, _share(file, (*here, str(value)), share))
                for value, share in values.items()]
        _refuse_twice(file, here, {str(tag): ()}, common)
        sides.append(_summing_to_one(file, here, side))
    return tuple(BlendEntry({**common, **{k: v for part in parts for k, v in part.where.items()}},
                            math.prod(part.share for part in parts))
                 for parts in itertools.product(*sides))


def _refuse_twice(file: YamlFile, place: Place, own: Where, common: Where) -> None:
    for key in own.keys() & common.keys():
        file.wrong((*place, key) if len(place) and place[-1] != key else place,
                   "is a condition of the whole phase already (where); leave it out there or here")


def _share(file: YamlFile, place: Place, raw: Any) -> float:
    return file.number(place, raw, 0, 100) / 100


def _summing_to_one(file: YamlFile, place: Place, entries: Sequence[BlendEntry]) -> tuple[BlendEntry, ...]:
    """Return the entries that have a share, scaled to 1 in all."""
    total = math.fsum(entry.share for entry in entries)
    if abs(100 * total - 100) > TOLERANCE_PCT:
        file.wrong(place, f"the shares add up to {100 * total:.6g} %, and must to 100 %; change them by "
                          f"{100 - 100 * total:+.6g}")
        return ()
    return tuple(BlendEntry(entry.where, entry.share / total) for entry in entries if entry.share > 0)


def blend_text(blend: Blend, comment: str) -> str:
    """Return a blend as the text of a file that `read_blend` reads back to the same shares.

    Args:
        blend: what it says.
        comment: one line above it.
    """
    phases = []
    for phase in blend.phases:
        shares = [{**{key: list(patterns) if len(patterns) > 1 else patterns[0]
                      for key, patterns in entry.where.items()}, "share": 100 * entry.share}
                  for entry in phase.entries]
        phases.append({"name": phase.name, **({"tokens": phase.tokens} if phase.tokens else {}),
                       "shares": shares})
    body = yaml.safe_dump({"name": blend.name, "phases": json.loads(json.dumps(phases))}, sort_keys=False,
                          allow_unicode=True, width=110)
    return f"# {comment}\n{body}"


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


def allot(blend: Blend, sources: Sequence[dict[str, Any]], missing: Missing = "refuse",
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
        scaled = num_tokens * (phase.tokens / budget if budget else 1.0) if num_tokens else phase.tokens
        phases.append(_of_phase(phase, sources, missing, scaled, problems))
    if problems:
        raise UserError(list_problems(f"blend {blend.name}", problems, _way_out(sources)))
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
                                f"{owner[name].shown()} and {entry.shown()}; tell them apart")
            owner[name] = entry
            if count:
                raw[name] = entry.share * count / available
    if lacking and (missing == "refuse" or not raw):
        problems += [f"phase {phase.name}: no source is {entry.shown()}" for entry in lacking]
    total = math.fsum(raw.values())
    return PhaseShares(phase.name, tokens, {name: share / total for name, share in raw.items()} if total else
                       {}, tuple(lacking))


def _way_out(sources: Sequence[dict[str, Any]]) -> str:
    """Return what there is to choose from, and what to do."""
    values: dict[str, set[str]] = {}
    for source in sources:
        for key, found in tags_of(source).items():
            values.setdefault(key, set()).update(found)
    tags = "; ".join(f"{key}: {', '.join(sorted(found)[:SHOWN_VALUES])}" for key, found in values.items())
    names = ", ".join([s["name"] for s in sources][:SHOWN_VALUES])
    return (f"the sources are {names}{', ...' if len(sources) > SHOWN_VALUES else ''}, their tags "
            f"{tags or 'none (pack them with --tag)'}; pack what is missing, change the blend, or give "
            "missing shares to the others of their phase with --missing spread")


def overall(phases: Sequence[PhaseShares]) -> dict[str, float]:
    """Return source -> its part of all phases' tokens; phases without budgets count alike."""
    budget = math.fsum(phase.tokens for phase in phases)
    weights: dict[str, float] = {}
    for phase in phases:
        part = phase.tokens / budget if budget else 1 / len(phases)
        for name, share in phase.shares.items():
            weights[name] = weights.get(name, 0.0) + part * share
    return weights


def table(phases: Sequence[PhaseShares], sources: Sequence[dict[str, Any]]) -> list[str]:
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
        lines += [f"  nothing for {entry.shown()}: its share is spread over the others"
                  for entry in phase.missing]
    read_epochs = epochs(phases, sources)
    if any(phase.tokens for phase in phases):
        lines.append("all phases")
        lines += [f"  {name:<{width}} {available[name]:>22,} tokens available, {read_epochs[name]:.3g} epochs"
                  for name in names]
    return lines


def epochs(phases: Sequence[PhaseShares], sources: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return source -> passes over its training tokens that all phases make together."""
    found: dict[str, float] = {}
    for source in sources:
        count = source["splits"][TRAIN]["num_tokens"]
        read = math.fsum(phase.tokens * phase.shares.get(source["name"], 0.0) for phase in phases)
        found[source["name"]] = read / count if count else 0.0
    return found


def refuse_many_epochs(phases: Sequence[PhaseShares], sources: Sequence[dict[str, Any]],
                       max_epochs: float) -> None:
    """Refuse sources that are read more often than `max_epochs`.

    Raises:
        UserError: naming each, with its epochs and tokens.
    """
    available = {s["name"]: s["splits"][TRAIN]["num_tokens"] for s in sources}
    problems = [f"source {name}: {count:.4g} epochs of its {available[name]:,} tokens"
                for name, count in epochs(phases, sources).items() if count > max_epochs * (1 + ROUNDING)]
    if problems:
        raise UserError(list_problems(
            f"--max-epochs {max_epochs:g}", problems,
            "pack more of them, lower their shares or the budget (--tokens), or pass a larger --max-epochs"))
