"""The step `safety`: documents whose words, addresses or patterns stand on lists of one's own.

No list is shipped: which words and sites a model shall not learn from is a decision of who trains it.  What
can be had: word lists with one word or phrase a line, block lists of sites as plain domains, as hosts files
(`0.0.0.0 site`) or as folders with `domains` and `urls`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import regex
from annotated_types import MinLen

from data_prep.pipeline.step import ColumnType, Doc, Outcome, Step, View
from data_prep.quality.blocklists import Pages, Phrases, entries
from megatron_sov.errors import UserError
from megatron_sov.settings import Bound, Code, NotNegativeInt, Problem

ListKind = Literal["words", "urls", "patterns"]
PATTERN_TIMEOUT_S, PATTERN_S_PER_CHAR = 2.0, 2e-6
"""A pattern that takes longer on one document, and on each character of it, has to be written differently."""


ListName = Annotated[str, Bound(lambda name: None if regex.fullmatch(r"[\w-]{1,40}", name) else (
    Code.BOUND, "must be up to 40 letters, digits, - and _", ""))]


@dataclass(frozen=True)
class SafetyList:
    """One list, and what becomes of documents that it finds."""

    name: ListName
    """Its name in counts and reasons: letters, digits, - and _."""
    file: Path
    """Its file, or for `urls` also a folder with the files `domains` and `urls`."""
    type: ListKind = "words"
    """`words`: words and phrases of the text; `urls`: sites and addresses, of the document's column `url`;
    `patterns`: regular expressions, one a line."""
    drop_from: NotNegativeInt = 1
    """A document with so many hits is dropped; 0: hits are counted and nothing is dropped."""

    def problems(self) -> list[Problem]:
        """Return what does not fit together."""
        if not self.file.exists():
            return [Problem(Code.FILE, "file", "does not exist", self.file, "check the path")]
        if self.file.is_dir() and self.type != "urls":
            return [Problem(Code.FILE, "file", "is a folder; only lists of urls may be one", self.file)]
        try:  # now, and not when all documents are parsed
            self.finder()
        except UserError as e:
            return [Problem(Code.FILE, "", str(e))]
        return []

    def finder(self) -> Phrases | Pages | Patterns:
        """Read the list.

        Raises:
            UserError: it is not text, is empty, or has a pattern that is none.
        """
        kinds: dict[ListKind, type[Phrases | Pages | Patterns]] = {
            "words": Phrases, "urls": Pages, "patterns": Patterns}
        return kinds[self.type](entries(self.file))


@dataclass(frozen=True)
class SafetySettings:
    """The lists."""

    lists: Annotated[tuple[SafetyList, ...], MinLen(1)] = ()
    """What is looked for, each with its own file."""

    def problems(self) -> list[Problem]:
        """Return what does not fit together."""
        names = [one.name for one in self.lists]
        return [Problem(Code.RULE, "lists", f"has {name!r} {names.count(name)} times",
                                way_out="give each list a name of its own")
                        for name in dict.fromkeys(names) if names.count(name) > 1]


class Safety(Step):
    """Counts what stands on lists, and drops documents with too much of it."""

    kind = "safety"
    adds: ClassVar[dict[str, ColumnType]] = {"safety": "string"}
    Settings = SafetySettings
    settings: SafetySettings

    def __init__(self, settings: SafetySettings) -> None:
        super().__init__(settings)
        self._finders: list[Phrases | Pages | Patterns] = []

    def files(self) -> Sequence[Path]:
        """Return the files of the lists."""
        return [one.file for one in self.settings.lists]

    def start(self, view: View) -> None:
        """Read the lists.

        Raises:
            UserError: a list is not text, is empty, or has a pattern that is none.
        """
        self._finders = [one.finder() for one in self.settings.lists]

    def outcomes(self, documents: Sequence[Doc]) -> Sequence[Outcome]:
        """Return each document with its hits counted, or the list that drops it."""
        return [self._outcome(document) for document in documents]

    def _outcome(self, document: Doc) -> Outcome:
        found, reason = [], ""
        for one, finder in zip(self.settings.lists, self._finders, strict=True):
            hits = finder.num_hits(document)
            if hits:
                found.append(f"{one.name}={hits}")
                if one.drop_from and hits >= one.drop_from:
                    reason = reason or f"safety list {one.name}"
        return Outcome(reason=reason, values={"safety": " ".join(found)})


class Patterns:
    """Regular expressions, upper and lower case alike."""

    def __init__(self, lines: Sequence[tuple[str, str]]) -> None:
        """Compile (place, pattern) pairs.

        Raises:
            UserError: one of them is no regular expression.
        """
        self._patterns = []
        for place, line in lines:
            try:
                self._patterns.append((place, regex.compile(line, regex.IGNORECASE)))
            except regex.error as e:
                raise UserError(f"{place}: {line!r} is no regular expression: {e}; mend it, or put a \\ "
                                "before signs that are meant as they stand") from None

    def num_hits(self, document: Doc) -> int:
        """Return how many matches a document has.

        Raises:
            UserError: a pattern takes too long on it.
        """
        total = 0
        limit_s = PATTERN_TIMEOUT_S + PATTERN_S_PER_CHAR * len(document.text)
        for place, pattern in self._patterns:
            try:
                total += sum(1 for _ in pattern.finditer(document.text, timeout=limit_s))
            except TimeoutError:
                raise UserError(
                    f"{place}: {pattern.pattern!r} takes more than {limit_s:.3g} s on document "
                    f"{document.id}; write it without repetitions inside repetitions") from None
        return total
