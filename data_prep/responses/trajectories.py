"""`sov-data trajectories`: a query with two to five solutions that differ, as one document of mid-training.

Solar Open (arXiv 2601.07022) trains on such documents.  Of many solutions those are kept that lie farthest
apart: each next one is the solution whose largest similarity to those chosen before is smallest (Gonzalez,
1985), where the similarity is the Jaccard index of the sets of three words in a row (Broder, 1997).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

from data_prep.json_lines import read_objects
from megatron_sov.base.artifacts import check_output_folder, create_artifact
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.accounting import RecordAccount, RecordTally
from megatron_sov.base.documents.messages import parse_messages
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    AtLeastOne, Bound, Flag, ProblemCode, SettingsError, Share, Violation, add_options, at_most_field,
    find_all_problems, read_options)

KIND = "corpus"
FILE = "trajectories.jsonl"
SHINGLE_WORDS = 3
Think = Literal["tags", "plain", "drop"]


@dataclass(frozen=True)
class Solution:
    answer: str
    """What is told at the end."""
    thinking: str = ""
    """What was thought before."""


def _no_number(heading: str) -> Violation | None:
    return None if heading.count("{}") == 1 else (
        ProblemCode.BOUND, "must hold {} once, for the solution's number", "")


@dataclass(frozen=True)
class TrajectorySettings:
    """How documents are made."""

    least: Annotated[AtLeastOne, at_most_field("most")] = 2
    """Leave out queries with fewer different solutions."""
    most: AtLeastOne = 5
    """Solutions of a document at most."""
    max_similarity: Annotated[Share, Flag(value="S")] = 0.8
    """Jaccard index of word triples above which two solutions are the same one."""
    think: Think = "tags"
    """Thoughts between <think> tags, without tags, or left out."""
    heading: Annotated[str, Bound(_no_number)] = "Solution {}"
    """Line above each solution, {} for its number."""


@dataclass(frozen=True, kw_only=True)
class TrajectoriesOptions:
    """Join each query with solutions that differ."""

    input: Annotated[tuple[Path, ...], Flag(value="FILE", many=True)]
    """A .jsonl file, one query with its solutions a line; several may follow, and it may be repeated."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for trajectories.jsonl."""
    settings: TrajectorySettings = field(default_factory=TrajectorySettings)
    overwrite: bool = False
    """Replace a corpus that is already there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Join each query with two to five solutions that differ to one document of text, "
                          "for `sov-data pack`. "
                          'A line of the input is {"query": ..., "solutions": [...]}; '
                          'a solution is a string or {"thinking": ..., "answer": ...}. '
                          "Or it is a chat of one question and one answer; chats of one question in a row, "
                          "as of `sov-data synth solutions`, are its solutions.")
    add_options(parser, TrajectoriesOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(TrajectoriesOptions, typed)
    write_trajectories(args.input, args.output, args.settings, overwrite=args.overwrite)
    return 0


def write_trajectories(files: Sequence[Path], output: Path, settings: TrajectorySettings, *,
                       overwrite: bool = False) -> None:
    """Write an artifact of kind "corpus" with one document for each query that has enough solutions.

    Raises:
        UserError: settings or a record break a rule, or no query has enough solutions;
            nothing is written then.
    """
    if problems := find_all_problems(settings):
        raise SettingsError("trajectories", problems)
    check_output_folder(output, KIND, overwrite)
    made = short = 0
    tally = RecordTally()
    with create_artifact(output, KIND, overwrite=overwrite) as artifact:
        with open(artifact.path / FILE, "w", encoding="utf-8") as out:
            queries = (query for path in files for query in read_queries(path, tally))
            for number, (query, offered) in enumerate(queries, 1):
                chosen = choose_diverse(offered, settings.most, settings.max_similarity)
                if len(chosen) < settings.least:
                    short += 1
                    tally.set_aside["query with too few different solutions"] += len(offered)
                    continue
                made, tally.num_written = made + 1, tally.num_written + len(chosen)
                is_full = len(chosen) == settings.most
                tally.set_aside["more than --most" if is_full else "similar"] += len(offered) - len(chosen)
                out.write(json.dumps({"id": number, "text": format_document(query, chosen, settings)},
                                     ensure_ascii=False) + "\n")
        if not made:
            raise UserError(f"{', '.join(map(str, files))}: none of {short} queries has {settings.least} "
                            "different solutions; add solutions, or lower --least or raise --max-similarity")
        account = tally.account("solutions")
        artifact.content = {"trajectories": {"num_documents": made, "num_solutions": tally.num_written,
                                             "num_left_out": short}, "account": account.to_dict()}
        artifact.settings = vars(settings)
    print(RecordAccount(number, made, {"too few different solutions": short}, "queries").describe())
    print(account.describe())


def read_queries(file: Path, tally: RecordTally) -> Iterator[tuple[str, list[Solution]]]:
    """Yield each query with its solutions, which are counted as read: a line that has both, or successive
    chats of one question.

    Raises:
        UserError: the file cannot be read, or a line is not as it should be; the message names it.
    """
    for _, lines in groupby(_read_lines(file, tally), key=lambda line: line[0]):
        (_, query, solutions), *more = lines
        yield query, [*solutions, *(solution for line in more for solution in line[2])]


def _read_lines(file: Path, tally: RecordTally) -> Iterator[tuple[str, str, list[Solution]]]:
    """Yield for each line what it shares with those of the same query (a chat: its question; another line:
    its place alone), the query and its solutions."""
    for where, record in read_objects(file):
        if "messages" in record:
            tally.num_read += 1
            question, solution = _chat(record, where)
            yield f"question {question}", question, [solution]
            continue
        query, solutions = record.get("query"), record.get("solutions")
        if not isinstance(query, str) or not query.strip() or not isinstance(solutions, list):
            raise UserError(f"{where}: needs a string 'query' and a list 'solutions'; add them")
        tally.num_read += len(solutions)
        # The place keeps lines apart that happen to have the same query.
        yield f"line {where}", query, [_solution(value, f"{where}: solutions[{i}]")
                                       for i, value in enumerate(solutions)]


def _chat(record: dict[str, Any], where: str) -> tuple[str, Solution]:
    try:
        messages = parse_messages(record["messages"], "messages")
    except BadRecord as e:
        raise UserError(f"{where}: {e.reason}") from None
    said = [message for message in messages if message.role != "system"]
    if [message.role for message in said] != ["user", "assistant"]:
        raise UserError(f"{where}: has turns of {', '.join(message.role for message in said) or 'nobody'}; a "
                        "chat that is a solution has one of the user and one of the assistant")
    return said[0].content, Solution(said[1].content, said[1].reasoning)


def _solution(value: Any, where: str) -> Solution:
    fields = {"answer": value} if isinstance(value, str) else value
    if (not isinstance(fields, dict) or not set(fields) <= {"answer", "thinking"}
            or not isinstance(fields.get("answer"), str) or not isinstance(fields.get("thinking", ""), str)
            or not fields["answer"].strip()):
        raise UserError(f"{where} is {json.dumps(value, ensure_ascii=False)[:80]}, must be a string or an "
                        "object with the strings 'answer' and, if you like, 'thinking'")
    return Solution(**fields)


def choose_diverse(solutions: list[Solution], most: int, max_similarity: float) -> list[Solution]:
    """Return up to `most` solutions, the first one and then always the one that is least similar
    to those before it."""
    shingles = [_shingles(f"{s.thinking} {s.answer}") for s in solutions]
    nearest = [0.0] * len(solutions)
    chosen: list[int] = [0] if solutions else []
    while chosen and len(chosen) < most:
        last = shingles[chosen[-1]]
        # Only the last choice is compared with the rest: largest similarities to earlier ones are kept.
        nearest = [max(known, _jaccard(last, own)) for known, own in zip(nearest, shingles, strict=True)]
        left = [i for i in range(len(solutions)) if i not in chosen and nearest[i] <= max_similarity]
        if not left:
            break
        chosen.append(min(left, key=lambda i: nearest[i]))
    return [solutions[i] for i in chosen]


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i:i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def _jaccard(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    return len(one & other) / len(one | other)


def format_document(query: str, solutions: list[Solution], settings: TrajectorySettings) -> str:
    parts = [query.strip()]
    for number, solution in enumerate(solutions, 1):
        parts.append(f"{settings.heading.format(number)}\n{_told(solution, settings.think)}")
    return "\n\n".join(parts)


def _told(solution: Solution, think: Think) -> str:
    thinking, answer = solution.thinking.strip(), solution.answer.strip()
    if not thinking or think == "drop":
        return answer
    return f"<think>\n{thinking}\n</think>\n\n{answer}" if think == "tags" else f"{thinking}\n\n{answer}"
