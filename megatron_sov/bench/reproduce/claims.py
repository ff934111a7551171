"""A file of claims: what a published road says, the arms that could contradict it, and the test, all written
before any of them runs.

An arm is a list of ordinary commands.  A claim's address is a hash of all that decides its outcome; results
lie under it, so that figures of one form never stand for another.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, MinLen

from megatron_sov.base.artifacts import to_json
from megatron_sov.base.digests import file_digest
from megatron_sov.base.errors import UserError, nearest
from megatron_sov.base.settings import AboveZero, ProblemCode, SettingsProblem, plain, read_file

SHIPPED = Path(__file__).parent / "seeds"
"""Files that come with the framework, one for each seed, and what their commands read."""
PROGRAMS = {"megatron-sov": "megatron_sov", "sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}
"""First word of a command -> the module that it is."""
PLACE = re.compile(r"\{([a-z][a-z0-9_]*)\}")
GIVEN = ("here", "base", "seed", "claims")
"""Places in a command that every run fills: its own folder, the one that the arms of a seed share, the number
of the seed, and the folder of the file of claims."""
ADDRESS_CHARS = 12
Commands = Annotated[tuple[str, ...], MinLen(1)]


@dataclass(frozen=True)
class Measure:
    """A figure of an arm, where an ordinary command has left it."""

    file: str
    """Below the arm's folder; JSON, or JSON lines where it ends so."""
    value: str
    """Keys with / between, of a list a number from 0; * is all of them.  What several give is averaged."""
    unit: str
    """What the figure is, for people."""
    event: str = ""
    """Of JSON lines only the last one of this event counts."""


@dataclass(frozen=True)
class Power:
    """What was known before the runs, from others than theirs."""

    difference: AboveZero
    """That should be told from the test's bound."""
    sd: AboveZero
    """Standard deviation of a seed's difference."""
    source: str
    """Where both come from."""


@dataclass(frozen=True)
class OrderTest:
    """That one arm's figure lies below another's, over paired seeds."""

    measure: str
    lower: str
    """Arm."""
    higher: str
    """Arm."""
    power: Power
    more_than: float = 0.0
    """Bound of the difference; below 0: the higher one may even lie that much below."""


@dataclass(frozen=True)
class ClaimChange:
    """That a claim was changed after it had run."""

    sha256: Annotated[str, MinLen(ADDRESS_CHARS)]
    """Of the form before; its folder is named so."""
    date: str
    what: str


@dataclass(frozen=True)
class PaperFinding:
    """The paper's own figures."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class PaperClaim:
    """An ordering that a paper reports, and how it is tested here."""

    says: str
    """The paper's sentence, or its sense."""
    source: str
    """Section or table."""
    published: PaperFinding
    here: str
    """What is other at this size."""
    seeds: Annotated[int, Gt(1)]
    minutes: AboveZero
    """Budget of one core for all seeds and arms."""
    arms: Annotated[dict[str, Commands], MinLen(2)]
    """Name -> its commands."""
    measures: Annotated[dict[str, Measure], MinLen(1)]
    tests: Annotated[tuple[OrderTest, ...], MinLen(1)]
    base: tuple[str, ...] = ()
    """Commands that the arms of a seed share."""
    quick: bool = False
    """Whether --quick runs it."""
    changes: tuple[ClaimChange, ...] = ()

    def problems(self) -> list[SettingsProblem]:
        known = {"measure": [*self.measures], "lower": [*self.arms], "higher": [*self.arms]}
        return [SettingsProblem(ProblemCode.CHOICE, f"tests.{i}.{name}", "is not among the claim's own",
                                value, nearest(value, found))
                for i, test in enumerate(self.tests) for name, found in known.items()
                if (value := getattr(test, name)) not in found]


@dataclass(frozen=True)
class ClaimsFile:
    """A seed's claims."""

    seed: str
    paper: str
    claims: Annotated[dict[str, PaperClaim], MinLen(1)]
    words: dict[str, str] = field(default_factory=dict)
    """Name -> words of commands that several share."""
    setup: dict[str, Commands] = field(default_factory=dict)
    """Name of a folder -> the commands that make it, once for all claims and seeds; later ones may read
    earlier ones."""

    def problems(self) -> list[SettingsProblem]:
        found: list[SettingsProblem] = []
        for place, command, known in self._commands():
            written = self.spell(command)
            try:
                words = shlex.split(written)
            except ValueError as e:
                words = []
                found.append(SettingsProblem(ProblemCode.FORM, place, f"cannot be read ({e})", command))
            if words and words[0] not in PROGRAMS:
                found.append(SettingsProblem(ProblemCode.CHOICE, place, "must begin with one of "
                                             + ", ".join(PROGRAMS), words[0]))
            found += [SettingsProblem(ProblemCode.UNKNOWN, place, "is no word, no setup before and not among "
                                      + ", ".join(GIVEN), name)
                      for name in PLACE.findall(written) if name not in known]
        return found

    def spell(self, command: str) -> str:
        """Return a command with the shared words written out."""
        return PLACE.sub(lambda place: self.words.get(place[1], place[0]), command)

    def commands(self) -> list[str]:
        """Return every command, with the shared words written out."""
        return [self.spell(command) for _, command, _ in self._commands()]

    def _commands(self) -> Iterator[tuple[str, str, set[str]]]:
        """Yield key, text and known places of each command."""
        known = {"here", "claims"}
        for name, commands in self.setup.items():
            yield from ((f"setup.{name}.{i}", command, {*known}) for i, command in enumerate(commands))
            known.add(name)
        known |= set(GIVEN)
        for name, claim in self.claims.items():
            yield from ((f"claims.{name}.base.{i}", command, known - {"base"})
                        for i, command in enumerate(claim.base))
            for arm, commands in claim.arms.items():
                yield from ((f"claims.{name}.arms.{arm}.{i}", command, known)
                            for i, command in enumerate(commands))


@dataclass(frozen=True)
class Registered:
    """A claim as it stands in its file, and its address."""

    name: str
    claim: PaperClaim
    setup: dict[str, tuple[str, ...]]
    """What it needs, words written out, in order."""
    declared: Mapping[str, Any]
    """All that its address is a hash of, as JSON has it."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(to_json(dict(self.declared)).encode()).hexdigest()

    @property
    def address(self) -> str:
        return self.sha256[:ADDRESS_CHARS]


def find_file(given: str) -> Path:
    """Return the file of a seed's claims, by its name or as a path.

    Raises:
        UserError: there is none.
    """
    if given.endswith((".yaml", ".yml")):
        return Path(given)
    names = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
    if given not in names:
        raise UserError(f"SEED {given}: must be one of {', '.join(names)}, or a YAML file of claims"
                        f"{nearest(given, names)}")
    return SHIPPED / f"{given}.yaml"


def read_claims(file: Path) -> ClaimsFile:
    """Return a file of claims.

    Raises:
        SettingsError: all that is wrong, with its line.
    """
    return read_file(ClaimsFile, file)


def register(claims: ClaimsFile, name: str, file: Path) -> Registered:
    """Return a claim with its address."""
    claim = claims.claims[name]
    spelled = {"base": [claims.spell(c) for c in claim.base],
               "arms": {arm: [claims.spell(c) for c in commands] for arm, commands in claim.arms.items()}}
    setup = _needed(claims, to_json(spelled))
    told = {key: value for key, value in plain(claim).items() if key not in ("changes", "quick")}
    read = {path.name: file_digest(path) for path in sorted(file.parent.iterdir())
            if path.is_file() and f"{{claims}}/{path.name}" in to_json([spelled, setup])}
    declared = json.loads(to_json({"seed": claims.seed, "paper": claims.paper, "name": name, **told,
                                   **spelled, "setup": setup, "read": read}))
    return Registered(name, claim, setup, declared)


def _needed(claims: ClaimsFile, text: str) -> dict[str, tuple[str, ...]]:
    """Return the setup that commands name, and what that needs, in the file's order."""
    found: dict[str, tuple[str, ...]] = {}
    for name in reversed(claims.setup):
        if f"{{{name}}}" in text:
            found[name] = tuple(claims.spell(command) for command in claims.setup[name])
            text += to_json(found[name])
    return {name: found[name] for name in claims.setup if name in found}
