"""Reader `queries`: users' prompts for `autoif`, each with a constraint from `sov-data synth constraints`."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from data_prep.synth.functions.constraints import find_wording_problem
from data_prep.synth.functions.draws import draw_choice
from data_prep.synth.functions.texts import LanguageCode
from data_prep.synth.requests import Temperature
from data_prep.synth.samples import GeneratorItem
from megatron_sov.base.documents.files import ACCEPTED_SAMPLES, list_files
from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.errors import RowProblems, UserError
from megatron_sov.base.settings import AtLeastOne, SettingsProblem, at_most_field, find_broken_rules
from megatron_sov.judge.rewards.constraint import get_functions
from megatron_sov.judge.rewards.reward import Refused

CONVERSATION_FIELDS = ("conversation", "messages", "conversations", "prompt")
"""Fields that may hold turns; WildChat uses the first."""
QUERY_FIELDS = ("prompt", "query", "question", "instruction")
"""Fields that may hold the query as text."""


@dataclass(frozen=True)
class QuerySettings:

    constraints: str = ""
    """Output folder of the generator `constraints`, or a JSONL file in the same form."""
    language: LanguageCode = "ko"
    """Language for queries and answers."""
    temperature: Temperature = 0.7
    """Sampling temperature for answers."""
    max_tokens: Annotated[int, Ge(16)] = 4096
    """Longest answer; longer answers are rejected."""
    min_query_chars: Annotated[AtLeastOne, at_most_field("max_query_chars")] = 4
    """Shortest query, without white space around it (AutoIF: 20; ours suits dense scripts)."""
    max_query_chars: AtLeastOne = 2000
    """Longest query (AutoIF: 300)."""
    toxic: bool = False
    """Take records with `toxic: true`, a field of WildChat."""

    def problems(self) -> list[SettingsProblem]:
        file = get_constraints_file(self)
        return find_broken_rules(
            self, "", (bool(self.constraints), "constraints", "is not set",
                       "name the folder that `sov-data synth constraints` has written"),
            (not self.constraints or file.is_file(), "constraints", f"has no file {file}",
             "let `sov-data synth constraints` come to its end there"))


def get_constraints_file(settings: QuerySettings) -> Path:
    path = Path(settings.constraints)
    return path / ACCEPTED_SAMPLES if path.is_dir() else path


@dataclass(frozen=True)
class TestedConstraint:
    """A constraint with its check functions."""

    wordings: tuple[str, ...]
    """The constraint, and descriptions from functions in words; a query gets a random wording."""
    functions: tuple[str, ...]
    """Sources, best first."""


def read_constraints(file: Path) -> list[TestedConstraint]:
    """Read `kept.jsonl` from the generator `constraints`. Raises `UserError`: the file is unreadable or
    empty, or constraints are invalid."""
    constraints, problems = [], RowProblems()
    for place, record in read_records(file):
        constraint, descriptions = record.get("prompt"), record.get("back", [])
        try:
            functions = get_functions(record, ())
        except Refused as e:
            problems.add(place, str(e))
            continue
        if not isinstance(constraint, str) or find_wording_problem(constraint):
            problems.add(place, "prompt must be the constraint, a line of text")
            continue
        wordings = [constraint]
        for description in descriptions if isinstance(descriptions, list) else []:
            if isinstance(description, str) and not find_wording_problem(description.strip()):
                wordings.append(description.strip())
        constraints.append(TestedConstraint(tuple(dict.fromkeys(wordings)), tuple(functions)))
    if problems:
        raise UserError(problems.format(f"constraints = {file}", "correct or remove these lines"))
    if not constraints:
        raise UserError(f"constraints = {file}: has none; make some with `sov-data synth constraints`")
    return constraints


def get_first_user_turn(record: dict[str, Any], place: str) -> str:
    """Return a record's first user turn; raises `UserError` without a user turn."""
    for name in CONVERSATION_FIELDS:
        turns = record.get(name)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("user", "human"):
                text = turn.get("content", turn.get("value"))
                if isinstance(text, str):
                    return text
    for name in QUERY_FIELDS:
        text = record.get(name)
        if isinstance(text, str):
            return text
    raise UserError(f"{place}: has no prompt of a user; give a conversation "
                    f"({', '.join(CONVERSATION_FIELDS)}: turns with role and content) or a string "
                    f"({', '.join(QUERY_FIELDS)})")


def read_query_items(inputs: Sequence[Path], settings: QuerySettings) -> Iterator[GeneratorItem]:
    """Yield the queries in JSONL and Parquet files with a constraint each.

    The hash of the query chooses the constraint, so that a query keeps its constraint in every run and input
    order. Raises `UserError`: constraints or queries are unreadable, or a record has no prompt.
    """
    constraints = read_constraints(get_constraints_file(settings))
    for file in (file for path in inputs for file in list_files(path)):
        for place, record in read_records(file):
            if record.get("toxic") is True and not settings.toxic:
                continue
            text = get_first_user_turn(record, place).strip()
            if not settings.min_query_chars <= len(text) <= settings.max_query_chars:
                continue
            digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
            constraint = draw_choice(constraints, digest)
            fields = {"query": text, "constraint": draw_choice(constraint.wordings, digest, "wording"),
                      "functions": list(constraint.functions)}
            licence = record.get("licence", record.get("license"))
            yield GeneratorItem(digest, fields, file.name, licence if isinstance(licence, str) else "")
