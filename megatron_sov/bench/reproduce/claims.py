"""A file of claims: what a published road says, the arms that could contradict it, and the test, all written
before any of them runs.

An arm is a list of ordinary commands.  A claim's address is a hash of all that decides its outcome; results
lie under it, so that figures of one form never stand for another.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, MinLen

from megatron_sov.base.artifacts import to_json
from megatron_sov.base.digests import file_digest
from megatron_sov.base.errors import UserError, nearest
from megatron_sov.base.settings import (
    AboveZero, Finite, NotBlank, ProblemCode, SettingsProblem, plain, read_file)

SHIPPED = Path(__file__).parent / "seeds"
"""Files that come with the framework, one for each seed, and what their commands read."""
PROGRAMS = {"megatron-sov": "megatron_sov", "sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}
"""First word of a command -> the module that it is."""
PLACE = re.compile(r"\{([a-z][a-z0-9_]*)\}")
GIVEN = ("here", "base", "seed", "claims")
"""Places in a command that every run fills: its own folder, the one that the arms of a seed share, the number
of the seed, and the folder of the file of claims."""
NAME = re.compile(r"[a-z][a-z0-9_]*")
"""Of claims, arms, setups, words and measures: each may become a folder."""
SETUP = "setup"
"""Folder beside those of claims."""
REDIRECT = ">"
PLACED = re.compile(r"\{claims\}/?([^\s:,=]*)")
"""A file beside the file of claims, in a word of a command."""
OUTSIDE = re.compile(r"(?:.*=)?(?:/|~|\.\.?(?:/|$))")
"""Words that name a place which is none of a command's own."""
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
    more_than: Finite = 0.0
    """Bound of the difference; below 0: the higher one may even lie that much below."""


@dataclass(frozen=True)
class ClaimChange:
    """That a claim was changed after it had run."""

    sha256: str
    """Of the form before, all 64 digits; its folder is named by the first of them."""
    date: str
    """Year-month-day."""
    what: NotBlank
    """What was changed, and why."""

    def problems(self) -> list[SettingsProblem]:
        forms = {"sha256": ("[0-9a-f]{64}", "must be the 64 hexadecimal digits of a form"),
                 "date": (r"\d{4}-\d\d-\d\d", "must be a date, as 2026-11-27")}
        return [SettingsProblem(ProblemCode.FORM, name, rule, getattr(self, name))
                for name, (form, rule) in forms.items() if not re.fullmatch(form, getattr(self, name))]


@dataclass(frozen=True)
class PaperFinding:
    """The paper's own figures."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def problems(self) -> list[SettingsProblem]:
        return [SettingsProblem(ProblemCode.RULE, f"rows.{i}", f"must have a cell for each of "
                                f"{len(self.head)} in `head`", list(row))
                for i, row in enumerate(self.rows) if len(row) != len(self.head)]


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
        found = [SettingsProblem(ProblemCode.CHOICE, f"tests.{i}.{name}", "is not among the claim's own",
                                 value, nearest(value, names).removeprefix("; "))
                 for i, test in enumerate(self.tests) for name, names in known.items()
                 if (value := getattr(test, name)) not in names]
        found += name_problems("arms", self.arms) + name_problems("measures", self.measures)
        for i, test in enumerate(self.tests):
            if test.lower == test.higher:
                found.append(SettingsProblem(ProblemCode.RULE, f"tests.{i}.higher",
                                             "must be another arm than the lower one", test.higher))
        return found + [
            SettingsProblem(ProblemCode.FORM, f"measures.{name}.file", "must lie below the arm's folder",
                            m.file)
            for name, m in self.measures.items() if OUTSIDE.match(m.file) or ".." in Path(m.file).parts]


def name_problems(place: str, names: Iterable[str]) -> list[SettingsProblem]:
    """Return those of names that could be no folder of their own."""
    return [SettingsProblem(ProblemCode.FORM, f"{place}.{name}",
                            "must be a name of small letters, digits and _, which begins with a letter", name)
            for name in names if not NAME.fullmatch(name)]


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
        found = list[SettingsProblem]()
        named: dict[str, tuple[Mapping[str, object], tuple[str, ...]]] = {
            "claims": (self.claims, (SETUP,)), "setup": (self.setup, GIVEN), "words": (self.words, GIVEN)}
        for place, (names, taken) in named.items():
            found += name_problems(place, names)
            found += [SettingsProblem(ProblemCode.CHOICE, f"{place}.{name}", "is a name that is taken", name)
                      for name in names if name in taken]
        for place, command, known in self._commands():
            written = self.spell(command)
            found += [SettingsProblem(ProblemCode.UNKNOWN, place, "is no word, no setup before and not among "
                                      + ", ".join(sorted(known & set(GIVEN))), name)
                      for name in PLACE.findall(written) if name not in known]
            found += [SettingsProblem(code, place, rule, value)
                      for code, rule, value in _wrong_words(written)]
        return found + self._unseeded()

    def _unseeded(self) -> list[SettingsProblem]:
        """Return arms that are the same for every seed."""
        found = []
        for name, claim in self.claims.items():
            base = " ".join(map(self.spell, claim.base))
            for arm, commands in claim.arms.items():
                text = " ".join(map(self.spell, commands))
                if "{seed}" not in (text + base if "{base}" in text else text):
                    found.append(SettingsProblem(
                        ProblemCode.RULE, f"claims.{name}.arms.{arm}",
                        "takes no {seed}, nor does a base that it reads: its seeds would be copies", arm))
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


def _wrong_words(command: str) -> Iterator[tuple[ProblemCode, str, str]]:
    """Yield what is wrong with the words of a command: code, rule and value."""
    try:
        words = shlex.split(command)
    except ValueError as e:
        yield ProblemCode.FORM, f"cannot be read ({e})", command
        return
    if not words or words[0] not in PROGRAMS:
        yield ProblemCode.CHOICE, f"must begin with one of {', '.join(PROGRAMS)}", command
    if REDIRECT in [*words[:-2], *words[-1:]]:
        yield ProblemCode.FORM, "may have > only before its last word, a file", command
    for word in words:
        if OUTSIDE.match(word) or ".." in PLACED.sub(r"\1", word).split("/"):
            yield ProblemCode.RULE, "names a place outside of {here}, {base}, {claims} and setups", word


@dataclass(frozen=True)
class Registered:
    """A claim as it stands in its file, and its address."""

    name: str
    claim: PaperClaim
    setup: dict[str, tuple[str, ...]]
    """What it needs, words written out, in order."""
    setup_reads: Mapping[str, Mapping[str, str]]
    """Name of each -> the files that it and those before it are made of -> digest."""
    declared: Mapping[str, Any]
    """All that its address is a hash of, as JSON has it."""

    @property
    def sha256(self) -> str:
        return sha256_of(self.declared)

    @property
    def address(self) -> str:
        return self.sha256[:ADDRESS_CHARS]


def sha256_of(declared: Mapping[str, Any]) -> str:
    """Return the hash of a form of a claim."""
    return hashlib.sha256(to_json(dict(declared)).encode()).hexdigest()


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
    read = files_read(file.parent, _all([*spelled.values(), setup]))
    declared = json.loads(to_json({"seed": claims.seed, "paper": claims.paper, "name": name, **told,
                                   **spelled, "setup": setup, "read": read}))
    names = list(setup)
    reads = {each: files_read(file.parent, _all([setup[n] for n in names[:number]]))
             for number, each in enumerate(names, 1)}
    return Registered(name, claim, setup, reads, declared)


def _all(part: Any) -> Iterator[str]:
    """Yield the commands of what is a list of them, or has such lists under names."""
    if isinstance(part, str):
        yield part
    else:
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _all(inner)


def files_read(beside: Path, commands: Iterable[str]) -> dict[str, str]:
    """Return the files below the folder of a file of claims that commands name, and the modules there that
    these import -> digest.

    Args:
        beside: the folder.
        commands: with the shared words written out.
    """
    named = [match[1] for command in commands for word in shlex.split(command)
             for match in PLACED.finditer(word)]
    wanted, found = [os.path.normpath(name) for name in named], dict[str, str]()
    while wanted:
        path = beside / (name := wanted.pop())
        if path.is_dir():
            wanted += [file.relative_to(beside).as_posix() for file in path.rglob("*")
                       if file.is_file() and "__pycache__" not in file.parts]
        elif path.is_file() and name not in found:
            found[name] = file_digest(path)
            if path.suffix == ".py":
                wanted += _imported(path.read_text(encoding="utf-8", errors="replace"), beside)
    return dict(sorted(found.items()))


def _imported(text: str, beside: Path) -> Iterator[str]:
    """Yield files that the imports of a module may mean, below the folder of a file of claims, which may lie
    in a package itself."""
    with contextlib.suppress(SyntaxError, ValueError):
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module or ''}.{name}" for name in names)]
            for name in names:
                parts = tuple(filter(None, name.split(".")))
                for begin in range(len(parts)):
                    if not begin or parts[:begin] == beside.parts[-begin:]:
                        yield from (f"{'/'.join(parts[begin:])}{end}" for end in (".py", "/__init__.py"))


def _needed(claims: ClaimsFile, text: str) -> dict[str, tuple[str, ...]]:
    """Return the setup that commands name, and what that needs, in the file's order."""
    found: dict[str, tuple[str, ...]] = {}
    for name in reversed(claims.setup):
        if f"{{{name}}}" in text:
            found[name] = tuple(claims.spell(command) for command in claims.setup[name])
            text += to_json(found[name])
    return {name: found[name] for name in claims.setup if name in found}
