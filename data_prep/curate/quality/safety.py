"""The step `safety`: documents whose words, addresses or patterns stand on lists of one's own.

No list is shipped: which words and sites a model shall not learn from is a decision of who trains it.  What
can be had: word lists with one word or phrase a line, block lists of sites as plain domains, as hosts files
(`0.0.0.0 site`) or as folders with `domains` and `urls`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

import regex
from annotated_types import MinLen

from data_prep.curate.pipeline.step import ColumnType, Doc, Step, StepOutcome, View
from data_prep.curate.quality.rules.words import SPACELESS
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Bound, NotNegativeInt, ProblemCode, SettingsProblem

MAX_LIST_BYTES = 1_000_000_000
"""A larger file is no list of words or sites."""
_HOSTS_LINE = re.compile(r"^(?:0\.0\.0\.0|127\.0\.0\.1|::1?)\s+")
_ADBLOCK = re.compile(r"^\|\|([^/^$]+)\^.*$")
_FIRST_SPACELESS = ord(SPACELESS[0])
_HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]")
_WORD = re.compile(rf"[^\W_{SPACELESS}]+(?:['’][^\W_{SPACELESS}]+)*|[{SPACELESS}]+")
ListKind = Literal["words", "urls", "patterns"]
PATTERN_TIMEOUT_S, PATTERN_S_PER_CHAR = 2.0, 2e-6
"""A pattern that takes longer on one document, and on each character of it, has to be written differently."""
ListName = Annotated[str, Bound(lambda name: None if regex.fullmatch(r"[\w-]{1,40}", name) else (
    ProblemCode.BOUND, "must be up to 40 letters, digits, - and _", ""))]


# Lists of words and of sites in the forms that they are published in.


def entries(file: Path) -> list[tuple[str, str]]:
    """Return (place, entry) of each line of a list that is neither empty nor begins with #.

    Raises:
        UserError: it cannot be read, is not UTF-8, is larger than a list can be, or has no entry.
    """
    found, parts = [], [file]
    if file.is_dir():
        parts = [part for part in (file / "domains", file / "urls") if part.is_file()]
    for part in parts:
        try:
            if part.stat().st_size > MAX_LIST_BYTES:
                raise UserError(f"{part}: has {part.stat().st_size:,} bytes, and a list at most "
                                f"{MAX_LIST_BYTES:,}; is it the right file?")
            text = part.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{part}: is not UTF-8; convert it, for example by iconv") from None
        except OSError as e:
            raise UserError(f"{part}: cannot be read: {e.strerror}; check the path and its rights") from None
        found += [(f"{part}:{number}", line.strip()) for number, line in enumerate(text.split("\n"), 1)
                  if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise UserError(f"{file}: has no entry; write one a line, or take the list out")
    return found


def folded(text: str) -> str:
    """Return a text in which what a reader takes for the same is the same: NFKC, and without case."""
    return unicodedata.normalize("NFKC", text).casefold()


class Phrases:
    """Words and phrases: whole words between spaces, in Korean with what is attached to them, anywhere in
    scripts without spaces."""

    def __init__(self, lines: Sequence[tuple[str, str]]) -> None:
        self._by_words: dict[int, set[tuple[str, ...]]] = defaultdict(set)
        self._by_chars: dict[int, set[str]] = defaultdict(set)
        for place, line in lines:
            words = tuple(_WORD.findall(folded(line)))
            if not words:
                raise UserError(f"{place}: {line!r} has no letter and no digit; write words, or use a list "
                                "of patterns")
            # Without spaces between words, a word of a list may stand anywhere in a run of characters.
            if len(words) == 1 and re.match(f"[{SPACELESS}]", words[0]):
                self._by_chars[len(words[0])].add(words[0])
            else:
                self._by_words[len(words)].add(words)

    def num_hits(self, document: Doc) -> int:
        """Return how often words of the list occur in a document."""
        words = _WORD.findall(folded(document.text))
        total = 0
        for length, phrases in self._by_words.items():
            total += sum(gram in phrases for gram in zip(*(words[i:] for i in range(length)), strict=False))
        for length, parts in self._by_chars.items():
            for word in words:
                # A quick look at the code point spares most words the comparison.
                if ord(word[0]) >= _FIRST_SPACELESS:
                    # Korean attaches endings: a word of the list counts at the beginning of one only.
                    starts = 1 if _HANGUL.match(word) else len(word) - length + 1
                    total += sum(word[i:i + length] in parts for i in range(starts))
        return total


class Pages:
    """Sites with all below them, and single addresses with all that begins with them."""

    def __init__(self, lines: Sequence[tuple[str, str]]) -> None:
        self._sites: set[str] = set()
        self._pages: dict[str, list[str]] = defaultdict(list)
        for _, line in lines:
            line = _ADBLOCK.sub(r"\1", _HOSTS_LINE.sub("", line.split(" #")[0].strip()))
            host, path = _host_and_path(line)
            if path.strip("/"):
                self._pages[host].append(path)
            elif host:
                self._sites.add(host)

    def num_hits(self, document: Doc) -> int:
        """Return 1 where the document's address is of the list, else 0."""
        host, path = _host_and_path(str(document.columns.get("url") or ""))
        if not host:
            return 0
        parts = host.split(".")
        # A site on the list blocks all names below it.
        if any(".".join(parts[i:]) in self._sites for i in range(len(parts))):
            return 1
        # Only at a border of the path: /news is no beginning of /newsletter.
        return int(any(path == page or path.startswith((page.rstrip("/") + "/", page + "?"))
                       for page in self._pages.get(host, ())))


def _host_and_path(url: str) -> tuple[str, str]:
    """Return (host without www, path and query) of an address with or without its scheme; ("", "") where it
    is none."""
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        host = (parts.hostname or "").removeprefix("www.").rstrip(".")
    except ValueError:
        return "", ""
    return host, parts.path + (f"?{parts.query}" if parts.query else "")


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

    def problems(self) -> list[SettingsProblem]:
        if not self.file.exists():
            return [SettingsProblem(ProblemCode.FILE, "file", "does not exist", self.file, "check the path")]
        if self.file.is_dir() and self.type != "urls":
            return [SettingsProblem(ProblemCode.FILE, "file", "is a folder; only lists of urls may be one",
                                    self.file)]
        try:  # now, and not when all documents are parsed
            self.finder()
        except UserError as e:
            return [SettingsProblem(ProblemCode.FILE, "", str(e))]
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

    def problems(self) -> list[SettingsProblem]:
        names = [one.name for one in self.lists]
        return [SettingsProblem(ProblemCode.RULE, "lists", f"has {name!r} {names.count(name)} times",
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
        return [one.file for one in self.settings.lists]

    def start(self, view: View) -> None:
        """Read the lists.

        Raises:
            UserError: a list is not text, is empty, or has a pattern that is none.
        """
        self._finders = [one.finder() for one in self.settings.lists]

    def outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        return [self._outcome(document) for document in documents]

    def _outcome(self, document: Doc) -> StepOutcome:
        found, reason = [], ""
        for one, finder in zip(self.settings.lists, self._finders, strict=True):
            hits = finder.num_hits(document)
            if hits:
                found.append(f"{one.name}={hits}")
                if one.drop_from and hits >= one.drop_from:
                    # All lists are counted; the first that is over its limit gives the reason.
                    reason = reason or f"safety list {one.name}"
        return StepOutcome(reason=reason, values={"safety": " ".join(found)})


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
        # A pattern of a user may take time that grows exponentially with the text: it is stopped, and named.
        limit_s = PATTERN_TIMEOUT_S + PATTERN_S_PER_CHAR * len(document.text)
        for place, pattern in self._patterns:
            try:
                total += sum(1 for _ in pattern.finditer(document.text, timeout=limit_s))
            except TimeoutError:
                raise UserError(
                    f"{place}: {pattern.pattern!r} takes more than {limit_s:.3g} s on document "
                    f"{document.id}; write it without repetitions inside repetitions") from None
        return total
