"""Functions that prompts and values of a generator's file may call; they ask no model."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import regex
import yaml

from data_prep.synth.declared.parsers import read_tagged
from data_prep.synth.final_answers import (
    boxed_or_plain, boxes, count_right, different_solutions, final_answers, right_solutions, run_programs)
from data_prep.synth.generators.constraints import cases_of, cross_check, list_items, wording_problem
from data_prep.synth.generators.documents import fenced
from data_prep.synth.generators.drawing import choose, share_of
from data_prep.synth.generators.queries import accepted_by
from data_prep.synth.generators.texts import (
    changed_numbers, chrf, code_in, copied_share, fill_phrasing, in_language, language_name, language_of,
    numbers_in, prose_of, quotations, size_ratio, with_texts)
from data_prep.synth.generators.worlds import (
    draft_problem, json_object, json_text, task_problem, task_verdicts, world_verdicts)
from data_prep.synth.replies import Reply
from data_prep.synth.templates import add_functions

REFUSALS = Path(__file__).parents[1] / "generators/refusals.yaml"
BEGINNING_CHARS = 240
"""A refusal comes first; a text further on may quote one."""
TIMEOUT_S = 2.0


class Answer(str):
    """The text of a reply, with whether it ended at the limit of tokens, and the thoughts before it."""

    cut: bool = False
    thinking: str = ""

    @classmethod
    def of(cls, reply: Reply) -> Answer:
        made = cls(reply.text)
        made.cut, made.thinking = reply.is_cut, reply.thinking
        return made


def text_between(text: str, tag: str) -> str:
    """Return the text between two tags of a reply, or ""."""
    return (read_tagged(text, [tag]) or {tag: ""})[tag]


def without(text: str, pattern: str) -> str:
    """Return a text without the parts that match a regular expression."""
    return str(regex.sub(pattern, "", text, timeout=TIMEOUT_S))


def matches(text: str, pattern: str) -> list[str]:
    """Return the parts of a text that match a regular expression."""
    return [match[0] for match in regex.finditer(pattern, text, timeout=TIMEOUT_S)]


@lru_cache(maxsize=1)
def _refusals() -> dict[str, list[regex.Pattern[str]]]:
    listed = yaml.safe_load(REFUSALS.read_text(encoding="utf-8"))
    return {language: [regex.compile(pattern, regex.IGNORECASE) for pattern in patterns]
            for language, patterns in listed.items()}


def refuses(answer: str, language: str) -> bool:
    """Return whether an answer begins with a refusal in a language, or in English, which models fall back
    to."""
    # cut twice: a long answer costs no time, and blanks do not use up the beginning
    beginning = " ".join(answer[:2 * BEGINNING_CHARS].replace("’", "'").split())[:BEGINNING_CHARS]
    return any(pattern.search(beginning, timeout=TIMEOUT_S)
               for name in dict.fromkeys((language, "en")) for pattern in _refusals().get(name, ()))


def is_dialogue(text: str, min_turns: int = 4) -> bool:
    """Return whether each line is a turn of A or B, who alternate and begin with A."""
    lines = [line for line in text.split("\n") if line.strip()]
    return len(lines) >= min_turns and all(
        regex.fullmatch(rf"{'AB'[number % 2]}: \S.*", line) for number, line in enumerate(lines))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    # of texts
    "changed_numbers": changed_numbers, "chrf": chrf, "code_in": code_in, "copied_share": copied_share,
    "fenced": fenced, "fill_phrasing": fill_phrasing, "in_language": in_language, "is_dialogue": is_dialogue,
    "json_object": json_object, "json_text": json_text, "language_name_of": language_name,
    "language_of": language_of, "matches": matches, "numbers_in": numbers_in, "prose_of": prose_of,
    "quotations": quotations, "refuses": refuses, "size_ratio": size_ratio, "text_between": text_between,
    "with_texts": with_texts, "without": without,
    # of problems
    "boxed_or_plain": boxed_or_plain, "boxes": boxes, "count_right": count_right,
    "different_solutions": different_solutions, "final_answers": final_answers,
    "right_solutions": right_solutions, "run_programs": run_programs,
    # of constraints
    "accepted_by": accepted_by, "cases_of": cases_of, "choose": choose, "cross_check": cross_check,
    "list_items": list_items, "share_of": share_of, "wording_problem": wording_problem,
    # of worlds
    "draft_problem": draft_problem, "task_problem": task_problem, "task_verdicts": task_verdicts,
    "world_verdicts": world_verdicts}
"""Name in a template -> function."""
add_functions(FUNCTIONS)
