"""Prompts of users, each with a constraint that `sov-data synth constraints` kept: the items of `autoif`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from data_prep.json_lines import read_objects
from data_prep.synth.generator import GeneratorItem, Temperature
from data_prep.synth.generators.constraints import run_check, wording_problem
from data_prep.synth.generators.drawing import choose
from data_prep.synth.generators.texts import LanguageCode
from megatron_sov.base.documents.files import ACCEPTED_SAMPLES, list_files
from megatron_sov.base.errors import UserError, format_problems
from megatron_sov.base.settings import AtLeastOne, SettingsProblem, at_most_field, find_broken_rules
from megatron_sov.judge.rewards.constraint import MAX_TEXT_CHARS, get_functions, segment_text
from megatron_sov.judge.rewards.reward import Refused

MAX_LISTED = 10
"""Faulty lines that an error names."""
CONVERSATIONS = ("conversation", "messages", "conversations", "prompt")
"""Fields that may hold turns, WildChat's first."""
FIELDS = ("prompt", "query", "question", "instruction")
"""Fields that may hold the text itself."""


@dataclass(frozen=True)
class QuerySettings:
    """Which queries are asked, with which constraints."""

    constraints: str = ""
    """Folder of the generator `constraints`, or a JSONL file in its form."""
    language: LanguageCode = "ko"
    """Of queries and answers."""
    temperature: Temperature = 0.7
    """Of answers."""
    max_tokens: Annotated[int, Ge(16)] = 4096
    """Of an answer; one that is longer is refused."""
    min_query_chars: Annotated[AtLeastOne, at_most_field("max_query_chars")] = 4
    """Of a query, without white space around it (AutoIF: 20; ours is for languages that are short)."""
    max_query_chars: AtLeastOne = 2000
    """Likewise (AutoIF: 300)."""
    toxic: bool = False
    """Take records that say `toxic: true`, as WildChat's do."""

    def problems(self) -> list[SettingsProblem]:
        file = constraints_file(self)
        return find_broken_rules(
            self, "", (bool(self.constraints), "constraints", "is not set",
                       "name the folder that `sov-data synth constraints` has written"),
            (not self.constraints or file.is_file(), "constraints", f"has no file {file}",
             "let `sov-data synth constraints` come to its end there"))


def constraints_file(settings: QuerySettings) -> Path:
    """Return the file of the constraints."""
    path = Path(settings.constraints)
    return path / ACCEPTED_SAMPLES if path.is_dir() else path


@dataclass(frozen=True)
class KeptConstraint:
    """One constraint with its functions."""

    wordings: tuple[str, ...]
    """The constraint, and what its functions ask for in words; one of them is used."""
    functions: tuple[str, ...]
    """Sources, the best first."""


def read_constraints(file: Path) -> list[KeptConstraint]:
    """Return the constraints of a JSONL file in the form of the generator `constraints`.

    Raises:
        UserError: it cannot be read, has none, or one has no function; all such lines are named.
    """
    found, problems = [], []
    for where, record in read_objects(file):
        constraint, back = record.get("prompt"), record.get("back", [])
        try:
            functions = get_functions(record, ())
        except Refused as e:
            problems.append(f"{where}: {e}")
            continue
        if not isinstance(constraint, str) or wording_problem(constraint):
            problems.append(f"{where}: prompt must be the constraint, a line of text")
            continue
        wordings = [constraint]
        for other in back if isinstance(back, list) else []:
            if isinstance(other, str) and not wording_problem(other.strip()):
                wordings.append(other.strip())
        found.append(KeptConstraint(tuple(dict.fromkeys(wordings)), tuple(functions)))
    if problems:
        raise UserError(format_problems("constraints", problems[:MAX_LISTED]))
    if not found:
        raise UserError(f"constraints = {file}: has none; make some with `sov-data synth constraints`")
    return found


def first_user_turn(record: dict[str, Any], where: str) -> str:
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
    """Yield each different query of JSONL and Parquet files with a constraint, drawn by the hash of the
    query, so that it has the same constraint in every run and in any order of the input.

    Raises:
        UserError: constraints or queries cannot be read, or a record has no prompt.
    """
    constraints = read_constraints(constraints_file(settings))
    seen: set[str] = set()
    for file in (file for path in inputs for file in list_files(path)):
        for where, record in read_objects(file):
            if record.get("toxic") is True and not settings.toxic:
                continue
            text = first_user_turn(record, where).strip()
            digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
            if digest in seen or not settings.min_query_chars <= len(text) <= settings.max_query_chars:
                continue
            seen.add(digest)
            constraint = choose(constraints, digest)
            fields = {"query": text, "constraint": choose(constraint.wordings, digest, "wording"),
                      "functions": list(constraint.functions)}
            licence = record.get("licence", record.get("license"))
            yield GeneratorItem(digest, fields, file.name, licence if isinstance(licence, str) else "")


@dataclass(frozen=True)
class AcceptedBy:
    """How many functions accept a text."""

    num: int
    why: str
    """Reason of the first function that gave no verdict."""


def accepted_by(functions: Sequence[str], text: str, segmenter: Literal["none", "rules", "pythainlp"]
                ) -> AcceptedBy:
    """Return how many functions accept a text, or its view with sentences or words set apart.

    Raises:
        NoReply: the machine could not run a function: the item is made again.
        UserError: the segmenter is not installed.
    """
    if len(text) > MAX_TEXT_CHARS:
        return AcceptedBy(0, f"has {len(text):,} characters")
    try:
        views = segment_text(text, segmenter)
    except ImportError:
        raise UserError("segmenter = pythainlp: is not installed; pip install pythainlp, or set "
                        "segmenter=rules") from None
    # one view that a function accepts is enough: functions do not know which one a language needs
    verdicts = [run_check(function, views) for function in functions]
    why = next((one.reason for each in verdicts for one in each if one.reason), "no function accepts it")
    return AcceptedBy(sum(any(one.accepts for one in each) for each in verdicts), why)
