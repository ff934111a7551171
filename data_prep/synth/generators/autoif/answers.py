"""The generator `autoif`: prompts of users with a constraint, and answers that keep it.

A query is translated where it is in another language, gets a constraint, and is answered twice.  An answer is
kept when a function of the constraint accepts it, when no letter of a foreign script stands in it, when it is
in the language, and when the judge finds that it answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from data_prep.curate.quality.identify import identify
from data_prep.json_lines import read_objects
from data_prep.synth.generator import (
    Ask, GeneratedSample, Generator, GeneratorItem, Grade, Kind, SampleVerdict, Temperature)
from data_prep.synth.generators.autoif.kept import FILE, read_constraints
from data_prep.synth.generators.autoif.texts import (
    SPACELESS, Named, Texts, in_system_turn, in_user_turn, texts_of)
from data_prep.synth.generators.drawing import choose, share_of
from data_prep.synth.replies import NoReply, NoUsableReply, Reply
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.files import PARQUET_SUFFIX, list_files, open_parquet
from megatron_sov.base.documents.scripts import LANGUAGES, script_of
from megatron_sov.base.errors import UserError, first_line
from megatron_sov.base.settings import AtLeastOne, SettingsProblem, Share, at_most, find_broken, one_of
from megatron_sov.judge.rewards.constraint import INSTALLED, MAX_TEXT_CHARS, Segmenter, verdicts, views_of
from megatron_sov.sandbox.sandbox import shared_sandbox

SCRIPTS = frozenset(script for scripts in LANGUAGES.values() for script in scripts)


@dataclass(frozen=True)
class AutoIfSettings:
    """How answers that keep constraints are made; the values are Typhoon-S's where nothing else is said."""

    constraints: str = ""
    """Folder of the generator `constraints`, or a JSONL file in its form."""
    language: Named = "ko"
    """Of queries and answers."""
    translate: bool = True
    """Translate queries in other languages; without, they are refused."""
    constraints_per_query: AtLeastOne = 1
    """Different ones, each of which makes an item of its own; AutoIF takes 16 queries for a constraint."""
    system_share: Share = 0.5
    """Of the conversations, that have the constraint in the system turn."""
    num_responses: AtLeastOne = 2
    """Answers to each query."""
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
    segmenter: Annotated[Literal["auto", "none", "rules", "pythainlp"], INSTALLED] = "auto"
    """Whether functions see an answer with its sentences and words set apart as well: none; rules: line ends
    end sentences; pythainlp: by that library; auto: rules for languages without blanks, else none."""
    foreign_scripts: tuple[Annotated[str, one_of(lambda: SCRIPTS)], ...] = ("CJK",)
    """Of which no letter may stand in an answer, unless the query has it: CJK for teachers that slip into
    Chinese, as Qwen does.  Scripts of the language itself are left out."""
    min_score: Grade = 7.0
    """Of the judge, from 0 to 10 (the authors' README; their code asks for more than 8)."""

    def problems(self) -> list[SettingsProblem]:
        folder, made = Path(self.constraints), "name the folder that `sov-data synth constraints` has written"
        if self.constraints and folder.is_dir():
            made = "let `sov-data synth constraints` come to its end there"
        return find_broken(
            self, "", (bool(self.constraints), "constraints", "is not set", made),
            (folder.exists(), "constraints", "does not exist", made),
            (not self.constraints or not folder.is_dir() or (folder / FILE).is_file(), "constraints",
             f"has no {FILE}", made))

    @property
    def views(self) -> Segmenter:
        # counts of words and sentences mean nothing where no sign sets them apart
        if self.segmenter == "auto":
            return "rules" if self.language in SPACELESS else "none"
        return self.segmenter

    @property
    def foreign(self) -> frozenset[str]:
        return frozenset(self.foreign_scripts) - set(LANGUAGES.get(self.language, ()))


CONVERSATIONS = ("conversation", "messages", "conversations", "prompt")
"""Fields that may hold turns, WildChat's first."""
FIELDS = ("prompt", "query", "question", "instruction")
"""Fields that may hold the text itself."""
_ROWS = 1024
_QUOTED = re.compile(r'"[^"\n]+"|“[^”\n]+”|「[^」\n]+」|`[^`\n]+`|<<[^<>\n]+>>|(?<!\w)\'[^\'\n]+\'(?!\w)')
_MARKS = '"“”「」`\''
SANDBOX_WORKERS, CALL_TIME_S = 2, 5.0
"""Functions that run at a time, and seconds of a processor for a function and a text."""
TRANSLATION_TEMPERATURE = 0.3
SYSTEM_TRANSLATED_SHARE = 0.5
"""Of conversations with the constraint in the system turn, those whose constraint is translated to the
query's language (Typhoon-S)."""
MIN_LANGUAGE_SCORE = 0.5
"""How sure the language of an answer must be."""
RUBRIC = """Does the response answer the query? It has to follow the instruction to the letter, and may be \
less helpful for that; this is no fault. Whether it follows it has been checked by a program.
10: it answers the query well. 5: it answers a part, or beside the point. 0: it has nothing to do with the \
query, refuses without need, or the query asks for nothing that can be answered."""
MAX_TRANSLATION_TOKENS = 2048


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
        for where, record in _records(file):
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


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if file.suffix != PARQUET_SUFFIX:
        yield from read_objects(file)
        return
    from pyarrow import ArrowException

    try:
        table = open_parquet(file)
        wanted = {*CONVERSATIONS, *FIELDS, "toxic", "licence", "license"}
        columns = [name for name in table.schema_arrow.names if name in wanted]
        number = 0
        for group in range(table.num_row_groups):  # a batch of nested values must not span two of them
            for batch in table.iter_batches(_ROWS, row_groups=[group], columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", record
    except BadRecord as e:
        raise UserError(f"{file}: {e.reason}") from None
    except (ArrowException, OSError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: is damaged ({first_line(e)}); fetch it again") from None


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


class AutoIf(Generator):
    """Makes conversations whose answers keep a constraint that code has checked."""

    name = "autoif"
    kind: Kind = "chat"
    help = "users' prompts with a constraint, in a language of your choice, and answers that keep it (AutoIF)"
    libraries: ClassVar[Sequence[str]] = ("py3langid",)
    Settings = AutoIfSettings
    settings: AutoIfSettings

    def files(self) -> Sequence[Path]:
        path = Path(self.settings.constraints)
        return [path / FILE if path.is_dir() else path]

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield each query of a user with a constraint.

        Raises:
            UserError: constraints or queries cannot be read.
        """
        settings = self.settings
        constraints = read_constraints(Path(settings.constraints))
        for query in queries_of(inputs, settings.min_query_chars, settings.max_query_chars, settings.toxic):
            # by the hash of the query: it has the same constraint in every run and in any order of the input
            drawn = [choose(constraints, query.digest, number)
                     for number in range(settings.constraints_per_query)]
            for number, constraint in enumerate(dict.fromkeys(drawn)):
                wording = choose(constraint.wordings, query.digest, number, "wording")
                yield GeneratorItem(f"{query.digest}.{number}", {
                    "query": query.text, "constraint": wording, "functions": list(constraint.functions)},
                    query.source, query.licence)

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        """Yield a conversation for each answer."""
        query, constraint, verdict = self._turned(item, ask)
        if not verdict.passed:
            yield GeneratedSample({"messages": [{"role": "user", "content": item.fields["query"]}]},
                                  (verdict,))
            return
        in_system = share_of("system", item.id) < self.settings.system_share
        phrase = in_system_turn if in_system else in_user_turn
        prompt = phrase(query, constraint, self._texts, item.id)
        beside = {"language": self.settings.language, "constraint": item.fields["constraint"],
                  "functions": item.fields["functions"]}
        replies = ask("autoif/response", count=self.settings.num_responses,
                      temperature=self.settings.temperature, max_tokens=self.settings.max_tokens,
                      constraint=item.fields["constraint"], language=self._texts.name, query=query)
        # equal answers are one sample
        different = {reply.text.strip(): reply for reply in replies}
        for text, reply in different.items():
            checks, accepting = self._verdicts(item, query, reply, ask)
            record = {"messages": [*prompt, {"role": "assistant", "content": text}], **beside}
            yield GeneratedSample(record, (verdict, *checks), group=item.id,
                                  notes={"accepting": accepting, "in_system": in_system})

    def _turned(self, item: GeneratorItem, ask: Ask) -> tuple[str, str, SampleVerdict]:
        """Return query and constraint in the languages that they are to have, and whether that went well."""
        settings, query, constraint = self.settings, item.fields["query"], item.fields["constraint"]
        language, _ = identify(query)
        if language != settings.language:
            if not settings.translate:
                return query, constraint, SampleVerdict("query language", False, f"is {language}")
            turned = self._translated(query, ask)
            if turned is None or identify(turned)[0] != settings.language:
                return query, constraint, self._no_translation("the query")
            query = turned
        # the same name as in `make`, so the same draw
        in_system = share_of("system", item.id) < settings.system_share
        is_turned = not in_system or share_of("translated", item.id) < SYSTEM_TRANSLATED_SHARE
        if is_turned and identify(_without(constraint))[0] != settings.language:
            turned = self._translated(constraint, ask)
            if turned is None or identify(_without(turned))[0] != settings.language:
                return query, constraint, self._no_translation("the constraint")
            constraint = turned
        return query, constraint, SampleVerdict("translation", True)

    def _no_translation(self, what: str) -> SampleVerdict:
        return SampleVerdict("translation", False, f"of {what}: its quotations changed, or it is not "
                                                   f"{self._texts.name}")

    def _translated(self, text: str, ask: Ask) -> str | None:
        """Return a text in the language, its quotations kept; None: they are not."""
        reply, = ask("autoif/translation", temperature=TRANSLATION_TEMPERATURE,
                     max_tokens=MAX_TRANSLATION_TOKENS, language=self._texts.name, text=text)
        return None if reply.is_cut else with_quotes_of(text, reply.text.strip())

    def _verdicts(self, item: GeneratorItem, query: str, reply: Reply, ask: Ask
                  ) -> tuple[list[SampleVerdict], int]:
        """Return the verdicts on an answer up to the first that fails, and how many functions accept it; the
        judge, who costs, is asked last."""
        text = reply.text.strip()
        checks = [SampleVerdict("ended", not reply.is_cut,
                                "reached the limit of tokens" if reply.is_cut else "")]
        if reply.is_cut:
            return checks, 0
        functions = item.fields["functions"]
        accepting, why = self._accepting(functions, text)
        checks.append(SampleVerdict("constraint", accepting > 0, why if not accepting else
                                    f"{accepting} of {len(functions)} functions accept it"))
        # what the user or the constraint has written may be repeated
        foreign = sorted({char for char in text if script_of(char) in self.settings.foreign} - set(query)
                         - set(item.fields["constraint"]))
        checks.append(SampleVerdict("foreign script", not foreign, "".join(foreign[:20])))
        language, score = identify(text)
        is_right = language == self.settings.language and score >= MIN_LANGUAGE_SCORE
        checks.append(SampleVerdict("language", is_right, f"{language}, {score:.2f}"))
        # the judge is paid: it is asked about what passed all else
        failed = next((place for place, one in enumerate(checks) if not one.passed), None)
        if failed is not None:
            return checks[:failed + 1], accepting
        try:
            grade = ask.judge(RUBRIC, {"instruction": item.fields["constraint"], "query": query,
                                       "response": text})
        except NoUsableReply as e:  # no reason to lose the other answer
            return [*checks, SampleVerdict("judge", False, str(e))], accepting
        return [*checks, SampleVerdict("judge", grade >= self.settings.min_score,
                                       f"{grade:g} of 10")], accepting

    def _accepting(self, functions: Sequence[str], text: str) -> tuple[int, str]:
        """Return how many functions accept one of the views of a text, and why the first that fails does."""
        if len(text) > MAX_TEXT_CHARS:
            return 0, f"has {len(text):,} characters"
        views = views_of(text, self.settings.views)
        sandbox = shared_sandbox(workers=SANDBOX_WORKERS)
        try:
            # one view that it accepts is enough: which one a language needs, functions do not know
            told = [verdicts(sandbox, function, views, call_s=CALL_TIME_S)
                    for function in functions]
        except (RuntimeError, TimeoutError) as e:  # nothing is known about the answer
            raise NoReply(str(e)) from None
        why = next((one.reason for each in told for one in each if one.reason), "no function accepts it")
        return sum(any(one.accepts for one in each) for each in told), why

    @cached_property
    def _texts(self) -> Texts:
        return texts_of(self.settings.language)


def _without(constraint: str) -> str:
    """Return a constraint without its quotations, which are in the language of answers."""
    for words in quoted(constraint):
        constraint = constraint.replace(words, " ")
    return re.sub(r"\s+", " ", constraint)
