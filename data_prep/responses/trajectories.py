"""`sov-data trajectories`: join a query with two to five different solutions to a document for mid-training.

Solar Open (arXiv 2601.07022) trains on such documents. Solutions are chosen by farthest-point selection
(Gonzalez, 1985): each next solution has the smallest maximum similarity to the chosen ones. The similarity is
the Jaccard index of word triples (Broder, 1997).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

from data_prep.tags import CORPUS
from megatron_sov.base.artifacts import check_output_folder, create_artifact
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.accounting import RecordAccount, RecordTally
from megatron_sov.base.documents.messages import parse_messages
from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import AtLeastOne, DeclaredCommand, Flag, Share, at_most_field, require_that

FILE = "trajectories.jsonl"
SHINGLE_WORDS = 3
Think = Literal["tags", "plain", "drop"]


@dataclass(frozen=True)
class Solution:
    """A solution: final answer and preceding thoughts."""

    answer: str
    thinking: str = ""


@dataclass(frozen=True)
class TrajectorySettings:
    """Settings for choosing solutions and formatting documents."""

    least: Annotated[AtLeastOne, at_most_field("most")] = 2
    """Leave out queries with fewer different solutions."""
    most: AtLeastOne = 5
    """Maximum solutions per document."""
    max_similarity: Annotated[Share, Flag(value="S")] = 0.8
    """Jaccard index over word triples; more similar solutions count as equal."""
    think: Think = "tags"
    """Thoughts between <think> tags, without tags, or left out."""
    heading: Annotated[str, require_that(lambda heading: heading.count("{}") == 1, "must hold {} once, "
                                         "for the solution's number")] = "Solution {}"
    """Line above a solution, {} for the number."""


@dataclass(frozen=True, kw_only=True)
class TrajectoriesOptions:
    """Join each query with two to five different solutions to a document for `sov-data pack`. An input line
    is {"query": ..., "solutions": [...]}; a solution is a string or {"thinking": ..., "answer": ...}. Or a
    line is a chat with a question and an answer; successive chats with the same question, e.g. from `sov-data
    synth solutions`, give the solutions."""

    input: Annotated[tuple[Path, ...], Flag(value="FILE", many=True)]
    """JSON lines, each with a query and solutions; takes several paths, and may be repeated."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for trajectories.jsonl."""
    settings: TrajectorySettings = field(default_factory=TrajectorySettings)
    overwrite: bool = False
    """Replace an existing corpus."""


def write_trajectories(options: TrajectoriesOptions) -> None:
    """Write an artifact of kind "corpus" with a document per query. Raises `UserError`, without output, for a
    malformed record, or if every query lacks solutions."""
    settings = options.settings
    check_output_folder(options.output, CORPUS, options.overwrite)
    num_queries = num_documents = 0
    tally = RecordTally()
    with create_artifact(options.output, CORPUS, overwrite=options.overwrite) as artifact:
        with open(artifact.path / FILE, "w", encoding="utf-8") as out:
            for query, solutions in (item for file in options.input for item in read_queries(file, tally)):
                num_queries += 1
                chosen = choose_diverse(solutions, settings.most, settings.max_similarity)
                if len(chosen) < settings.least:
                    tally.set_aside["query with too few different solutions"] += len(solutions)
                    continue
                num_documents += 1
                tally.num_written += len(chosen)
                reason = "more than --most" if len(chosen) == settings.most else "similar"
                tally.set_aside[reason] += len(solutions) - len(chosen)
                record = {"id": num_queries, "text": format_document(query, chosen, settings)}
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
        num_short = num_queries - num_documents
        if not num_documents:
            raise UserError(f"{', '.join(map(str, options.input))}: none of {num_short} queries has "
                            f"{settings.least} different solutions; add solutions, or lower --least or raise "
                            "--max-similarity")
        account = tally.account("solutions")
        artifact.content = {"trajectories": {"num_documents": num_documents,
                                             "num_solutions": tally.num_written, "num_left_out": num_short},
                            "account": account.to_dict()}
        artifact.settings = vars(settings)
    print(RecordAccount(num_queries, num_documents, {"too few different solutions": num_short},
                        "queries").describe())
    print(account.describe())


TRAJECTORIES = DeclaredCommand(TrajectoriesOptions, write_trajectories)


def read_queries(file: Path, tally: RecordTally) -> Iterator[tuple[str, list[Solution]]]:
    """Yield queries with solutions, from a line or from successive chats; count solutions in `num_read`.
    Raises `UserError`: an unreadable file or a malformed line."""
    for _, group in groupby(_iter_lines(file, tally), key=lambda line: line[0]):
        lines = list(group)
        yield lines[0][1], [solution for _, _, solutions in lines for solution in solutions]


def _iter_lines(file: Path, tally: RecordTally) -> Iterator[tuple[str, str, list[Solution]]]:
    """Yield (group key, query, solutions) per line. Chats with equal questions have equal keys."""
    for where, record in read_records(file):
        if "messages" in record:
            tally.num_read += 1
            question, solution = _parse_chat(record, where)
            yield f"question {question}", question, [solution]
            continue
        query, solutions = record.get("query"), record.get("solutions")
        if not isinstance(query, str) or not query.strip() or not isinstance(solutions, list):
            raise UserError(f"{where}: needs a string 'query' and a list 'solutions'; add them")
        tally.num_read += len(solutions)
        # lines with equal queries stay separate
        yield f"line {where}", query, [_parse_solution(value, f"{where}: solutions[{i}]")
                                       for i, value in enumerate(solutions)]


def _parse_chat(record: dict[str, Any], where: str) -> tuple[str, Solution]:
    try:
        messages = parse_messages(record["messages"], "messages")
    except BadRecord as e:
        raise UserError(f"{where}: {e.reason}") from None
    turns = [message for message in messages if message.role != "system"]
    roles = [message.role for message in turns]
    if roles != ["user", "assistant"]:
        raise UserError(f"{where}: has turns of {', '.join(roles) or 'nobody'}; a "
                        "chat that is a solution has one of the user and one of the assistant")
    return turns[0].content, Solution(turns[1].content, turns[1].reasoning)


def _parse_solution(value: Any, where: str) -> Solution:
    fields = {"answer": value} if isinstance(value, str) else value
    if (not isinstance(fields, dict) or not set(fields) <= {"answer", "thinking"}
            or not isinstance(fields.get("answer"), str) or not isinstance(fields.get("thinking", ""), str)
            or not fields["answer"].strip()):
        raise UserError(f"{where} is {json.dumps(value, ensure_ascii=False)[:80]}, must be a string or an "
                        "object with the strings 'answer' and, if you like, 'thinking'")
    return Solution(**fields)


def choose_diverse(solutions: list[Solution], most: int, max_similarity: float) -> list[Solution]:
    """Choose up to `most` solutions: the first, and repeatedly the solution least similar to `chosen`."""
    shingles = [_build_shingles(f"{s.thinking} {s.answer}") for s in solutions]
    similarities = [0.0] * len(solutions)
    chosen: list[int] = [0] if solutions else []
    while chosen and len(chosen) < most:
        # maximum similarity to all chosen solutions: update by the last
        last = shingles[chosen[-1]]
        similarities = [max(similarity, len(last & candidate) / len(last | candidate))  # Jaccard
                        for similarity, candidate in zip(similarities, shingles, strict=True)]
        candidates = [i for i, similarity in enumerate(similarities)
                      if i not in chosen and similarity <= max_similarity]
        if not candidates:
            break
        chosen.append(min(candidates, key=lambda i: similarities[i]))
    return [solutions[i] for i in chosen]


def _build_shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i:i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def format_document(query: str, solutions: list[Solution], settings: TrajectorySettings) -> str:
    parts = [query.strip()]
    for number, solution in enumerate(solutions, 1):
        parts.append(f"{settings.heading.format(number)}\n{_format_solution(solution, settings.think)}")
    return "\n\n".join(parts)


def _format_solution(solution: Solution, think: Think) -> str:
    thinking, answer = solution.thinking.strip(), solution.answer.strip()
    if not thinking or think == "drop":
        return answer
    return f"<think>\n{thinking}\n</think>\n\n{answer}" if think == "tags" else f"{thinking}\n\n{answer}"
