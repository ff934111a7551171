"""Constraint: whether check functions, which a model wrote and which were tested, accept a response."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from megatron_sov.chat.marks import as_written, behind_thoughts
from megatron_sov.rewards.check_functions import MAX_TEXT_CHARS, problem_of, verdicts
from megatron_sov.rewards.reward import OPERATION, Refused, Row, Score, short, text_of, told_short
from megatron_sov.rewards.text_views import Segmenter, views_of
from megatron_sov.rewards.version import code_of
from megatron_sov.settings import Share
from megatron_sov.work.sandbox import shared_sandbox

MAX_FUNCTIONS = 20


@dataclass(frozen=True)
class Constraint:
    """1 where enough of the row's check functions accept the response, else 0; or the share that does."""

    LIBRARIES = ("pythainlp",)

    min_share: Share = 0.5
    """Of the functions, that must accept: half, as for the chosen answers of AutoIF's pairs (arXiv
    2406.13542); one alone, as in its data for fine-tuning, a policy gets around sooner; 0: one."""
    give_share: bool = False
    """Give the share of the functions that accept, instead of 1 or 0."""
    segmenter: Segmenter = "none"
    """Whether functions see sentences and words set apart as well."""
    call_time_s: Annotated[float, Ge(1), Le(60)] = 5.0
    """Of a processor, for a function and a text."""
    modules: tuple[str, ...] = ()
    """That functions may import beside those that compute on texts, where the machine has them."""
    hide_thinking: bool = True
    """Check what stands behind the last </think> alone."""
    enclosure: Literal["auto", "namespaces", "landlock"] = field(default="auto", metadata=OPERATION)
    """What encloses the functions; auto: the best that this machine gives."""
    command: tuple[str, ...] = field(default=(), metadata=OPERATION)
    """A command that encloses them instead, as ["bwrap", ...]; `{folder}` stands for its folder."""

    def inputs(self) -> dict[str, Any]:
        """Return what judges beside this process: the code of the sandbox's server, and its Python."""
        return {"server": code_of("megatron_sov.work.sandbox.server"),
                "python": list(sys.version_info[:2])}

    def prepare(self) -> None:
        """Start the sandbox.

        Raises:
            UserError: this machine has none.
        """
        shared_sandbox(self.enclosure, self.command)

    def score(self, row: Row) -> Score:
        """Return whether the row's `functions` accept its response; one that gives no verdict does not.

        Raises:
            Refused: there are no functions, or one is none.
            TimeoutError: the machine was too busy.
        """
        response = text_of(row, "response")
        response = behind_thoughts(response) if self.hide_thinking else as_written(response)
        if len(response) > MAX_TEXT_CHARS:
            raise Refused(f"response has {len(response):,} characters; at most {MAX_TEXT_CHARS:,} are "
                          "checked")
        functions = functions_of(row, self.modules)
        views = views_of(response.strip(), self.segmenter)
        sandbox = shared_sandbox(self.enclosure, self.command)
        told = [verdicts(sandbox, function, views, call_s=self.call_time_s) for function in functions]
        accepting = sum(any(one.accepts for one in each) for each in told)
        share = accepting / len(functions)
        why = next((one.reason for each in told for one in each if one.reason), "")
        kept = accepting > 0 and share >= self.min_share and bool(response.strip())
        reward = share * bool(response.strip()) if self.give_share else float(kept)
        return Score(reward, {"accepting": accepting, "functions": len(functions), "why": short(why)})


def functions_of(row: Row, modules: tuple[str, ...] = ()) -> list[str]:
    """Return the sources of a row's check functions.

    Raises:
        Refused: there are none, too many, or one is none.
    """
    functions = row.get("functions")
    if not isinstance(functions, list) or not 0 < len(functions) <= MAX_FUNCTIONS:
        raise Refused(f"functions = {told_short(functions)} must be a list of 1 to {MAX_FUNCTIONS} texts of "
                      "Python, each with a function evaluate(response)")
    for place, function in enumerate(functions):
        if not isinstance(function, str):
            raise Refused(f"functions[{place}] = {told_short(function)} must be a text of Python")
        if problem := problem_of(function, modules):
            raise Refused(f"functions[{place}] {problem}")
    return functions
