"""Queries of users with constraints of `sov-data synth constraints`, and functions for answers to them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from data_prep.curate.quality.identify import identify
from data_prep.json_lines import read_objects
from data_prep.synth.generator import GeneratorItem, Temperature
from data_prep.synth.generators.autoif.texts import SPACELESS, Named, in_system_turn, in_user_turn, texts_of
from data_prep.synth.generators.drawing import choose
from data_prep.synth.replies import NoReply
from megatron_sov.base.documents.files import list_files
from megatron_sov.base.documents.scripts import LANGUAGES, script_of
from megatron_sov.base.errors import UserError, list_problems
from megatron_sov.base.settings import AtLeastOne, SettingsProblem, at_most, find_broken, one_of
from megatron_sov.judge.rewards.constraint import INSTALLED, MAX_TEXT_CHARS, functions_of, verdicts, views_of
from megatron_sov.judge.rewards.reward import Refused
from megatron_sov.sandbox.sandbox import shared_sandbox

FILE = "kept.jsonl"
"""Of the folder that `constraints` writes."""
MOST_TOLD = 10
MAX_CONSTRAINT_CHARS = 300
SCRIPTS = frozenset(script for scripts in LANGUAGES.values() for script in scripts)
CONVERSATIONS = ("conversation", "messages", "conversations", "prompt")
"""Fields that may hold turns, WildChat's first."""
FIELDS = ("prompt", "query", "question", "instruction")
"""Fields that may hold the text itself."""
SANDBOX_WORKERS, CALL_TIME_S = 2, 5.0
"""Functions that run at a time, and seconds of a processor for a function and a text."""
_PLACEHOLDER = re.compile(r"\{[^{}\n]{0,40}\}")
_QUOTED = re.compile(r'"[^"\n]+"|“[^”\n]+”|「[^」\n]+」|`[^`\n]+`|<<[^<>\n]+>>|(?<!\w)\'[^\'\n]+\'(?!\w)')
_MARKS = '"“”「」`\''


@dataclass(frozen=True)
class QuerySettings:
    """Which queries are asked, with which constraints."""

    constraints: str = ""
    """Folder of the generator `constraints`, or a JSONL file in its form."""
    language: Named = "ko"
    """Of queries and answers."""
    constraints_per_query: AtLeastOne = 1
    """Different ones, each of which makes an item of its own; AutoIF takes 16 queries for a constraint."""
    segmenter: Annotated[Literal["auto", "none", "rules", "pythainlp"], INSTALLED] = "auto"
    """Whether functions see an answer with its sentences and words set apart as well. none; rules: line ends
    end sentences; pythainlp: by that library; auto: rules for languages without blanks, else none."""
    foreign_scripts: tuple[Annotated[str, one_of(lambda: SCRIPTS)], ...] = ("CJK",)
    """Of which no letter may stand in an answer, unless the query has it: CJK for teachers that slip into
    Chinese.  Scripts of the language itself are left out."""
    temperature: Temperature = 0.7
    """Of answers."""
    max_tokens: Annotated[int, Ge(16)] = 4096
    """Of an answer; one that is longer is refused."""
    min_query_chars: Annotated[AtLeastOne, at_most("max_query_chars")] = 4
    """Of a query, without white space around it (AutoIF: 20; ours is for languages that are short)."""
    max_query_chars: AtLeastOne = 2000
    """Likewise (AutoIF: 300)."""
    toxic: bool = False
    """Take records that say `toxic: true`, as WildChat's do."""

    def problems(self) -> list[SettingsProblem]:
        folder, made = Path(self.constraints), "name the folder that `sov-data synth constraints` has written"
        if self.constraints and folder.is_dir():
            made = "let `sov-data synth constraints` come to its end there"
        return find_broken(
            self, "", (bool(self.constraints), "constraints", "is not set", made),
            (folder.exists(), "constraints", "does not exist", made),
            (not self.constraints or not folder.is_dir() or (folder / FILE).is_file(), "constraints",
             f"has no {FILE}", made))


def wording_problem(constraint: str) -> str:
    """Return why a text is no constraint; empty: it is one."""
    if not constraint.strip():
        return "is empty"
    if len(constraint) > MAX_CONSTRAINT_CHARS:
        return f"has {len(constraint)} characters, at most {MAX_CONSTRAINT_CHARS} are taken"
    if "\n" in constraint:
        return "has several lines"
    if found := _PLACEHOLDER.search(constraint):
        return f"has the placeholder {found[0]}"
    return ""


@dataclass(frozen=True)
class KeptConstraint:
    """One constraint with its functions."""

    wordings: tuple[str, ...]
    """The constraint, and what its functions ask for in words; one of them is used."""
    functions: tuple[str, ...]
    """Sources, the best first."""


def read_constraints(path: Path) -> list[KeptConstraint]:
    """Return the constraints of a folder of the generator `constraints`, or of a JSONL file in its form.

    Raises:
        UserError: it cannot be read, has none, or one has no function; all such lines are told.
    """
    found, problems = [], []
    for where, record in read_objects(path / FILE if path.is_dir() else path):
        constraint, back = record.get("prompt"), record.get("back", [])
        try:
            functions = functions_of(record, ())
        except Refused as e:
            problems.append(f"{where}: {e}")
            continue
        if not isinstance(constraint, str) or wording_problem(constraint):
            problems.append(f"{where}: prompt must be the constraint, a line of text")
            continue
        # what functions ask for in words is another wording of the constraint
        told = [one for one in back if isinstance(one, str)] if isinstance(back, list) else []
        wordings = [constraint, *(one.strip() for one in told if not wording_problem(one.strip()))]
        found.append(KeptConstraint(tuple(dict.fromkeys(wordings)), tuple(functions)))
    if problems:
        raise UserError(list_problems("constraints", problems[:MOST_TOLD]))
    if not found:
        raise UserError(f"constraints = {path}: has none; make some with `sov-data synth constraints`")
    return found


@dataclass(frozen=True)
class Query:
    """What a user asks."""

    text: str
    """The turn."""
    digest: str
    """Hash of it."""
    source: str
    """Name of the file."""
    licence: str = ""
    """As the record states it."""


def queries_of(inputs: Sequence[Path], min_chars: int, max_chars: int, toxic: bool) -> Iterator[Query]:
    """Yield the first turns of users that have so many characters, each once.

    Args:
        inputs: JSONL and Parquet files, or folders of them.
        min_chars: of a text, white space around it removed.
        max_chars: likewise.
        toxic: whether to take records whose `toxic` is true.

    Raises:
        UserError: a file cannot be read, or a record has no prompt.
    """
    seen: set[str] = set()
    for file in (file for path in inputs for file in list_files(path)):
        for where, record in read_objects(file):
            if record.get("toxic") is True and not toxic:
                continue
            text = query_in(record, where).strip()
            digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
            if min_chars <= len(text) <= max_chars and digest not in seen:
                seen.add(digest)
                licence = record.get("licence", record.get("license"))
                yield Query(text, digest, file.name, licence if isinstance(licence, str) else "")


def query_in(record: dict[str, Any], where: str) -> str:
    """Return the first turn of the user in a record.

    Raises:
        UserError: there is none.
    """
    for name in CONVERSATIONS:
        turns = record.get(name)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("user", "human"):
                text = turn.get("content", turn.get("value"))
                if isinstance(text, str):
                    return text
    for name in FIELDS:
        text = record.get(name)
        if isinstance(text, str):
            return text
    raise UserError(f"{where}: has no prompt of a user; give a conversation ({', '.join(CONVERSATIONS)}: "
                    f"turns with role and content) or a string ({', '.join(FIELDS)})")


def query_items(inputs: Sequence[Path], settings: QuerySettings) -> Iterator[GeneratorItem]:
    """Yield each query of a user with a constraint, drawn by the hash of the query: it has the same
    constraint in every run and in any order of the input.

    Raises:
        UserError: constraints or queries cannot be read.
    """
    constraints = read_constraints(Path(settings.constraints))
    for query in queries_of(inputs, settings.min_query_chars, settings.max_query_chars, settings.toxic):
        drawn = [choose(constraints, query.digest, number)
                 for number in range(settings.constraints_per_query)]
        for number, constraint in enumerate(dict.fromkeys(drawn)):
            wording = choose(constraint.wordings, query.digest, number, "wording")
            yield GeneratorItem(f"{query.digest}.{number}", {
                "query": query.text, "constraint": wording, "functions": list(constraint.functions)},
                query.source, query.licence)


def quoted(text: str) -> list[str]:
    """Return what stands in quotation marks, backquotes or double angle brackets, in order, without marks."""
    return [found.strip(_MARKS) for found in _QUOTED.findall(text)]


def with_quotes_of(text: str, translation: str) -> str | None:
    """Return a translation with the quotations of its text in their places, as Typhoon-S puts them back
    where a translator changed them; None: it has another number of them.

    Where all words of the text's quotations stand in the translation it stays as it is, whatever marks the
    language puts around them and in whatever order.
    """
    wanted = quoted(text)
    # the words count, not their marks: languages have marks of their own
    if all(translation.count(words) >= wanted.count(words) for words in wanted):
        return translation
    # with another number of quotations it is unknown which is which
    if len(quoted(translation)) != len(wanted):
        return None
    left = iter(wanted)

    def put_back(match: re.Match[str]) -> str:
        inside = match[0].strip(_MARKS)
        return match[0].replace(inside, next(left))

    return _QUOTED.sub(put_back, translation)


def language_unquoted(text: str) -> str:
    """Return the language of a constraint without its quotations, which are in the language of answers."""
    for words in quoted(text):
        text = text.replace(words, " ")
    return identify(re.sub(r"\s+", " ", text))[0]


def in_turns(query: str, constraint: str, language: str, in_system: bool, *names: object
             ) -> list[dict[str, str]]:
    """Return the turns of a query with its constraint; names decide the phrasing."""
    return (in_system_turn if in_system else in_user_turn)(query, constraint, texts_of(language), *names)


def different(replies: Sequence[str]) -> list[str]:
    """Return replies that differ by more than white space around them."""
    return list({reply.strip(): reply for reply in replies}.values())


def accepting(functions: Sequence[str], text: str, segmenter: Any, language: str) -> dict[str, Any]:
    """Return `num`, how many functions accept a view of a text, and `why`, the reason of the first failure.

    Raises:
        NoReply: the machine could not run a function: the item is made again.
    """
    if len(text) > MAX_TEXT_CHARS:
        return {"num": 0, "why": f"has {len(text):,} characters"}
    if segmenter == "auto":  # counts of words mean nothing where no sign sets them apart
        segmenter = "rules" if language in SPACELESS else "none"
    views, sandbox = views_of(text, segmenter), shared_sandbox(workers=SANDBOX_WORKERS)
    try:
        # one view that it accepts is enough: functions do not know which one a language needs
        told = [verdicts(sandbox, function, views, call_s=CALL_TIME_S) for function in functions]
    except (RuntimeError, TimeoutError) as e:
        raise NoReply(str(e)) from None
    why = next((one.reason for each in told for one in each if one.reason), "no function accepts it")
    return {"num": sum(any(one.accepts for one in each) for each in told), "why": why}


def foreign_letters(text: str, scripts: Sequence[str], language: str, allowed: str) -> str:
    """Return the letters of a text that are of some scripts, but neither of the language's nor allowed."""
    foreign = set(scripts) - set(LANGUAGES.get(language, ()))
    return "".join(sorted({char for char in text if script_of(char) in foreign} - set(allowed))[:20])
