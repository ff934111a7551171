"""Generator `solutions`: of several solutions of a problem those that are right and differ.

Solar Open (arXiv 2601.07022) trains on two to five solutions of a query that differ, each verified by its
answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Le

from data_prep.responses.trajectories import Solution, diverse
from data_prep.synth.final_answers import Way, boxes, check, ends_in_box
from data_prep.synth.generator import (
    Ask, GeneratedSample, Generator, GeneratorItem, Grade, SampleVerdict, Temperature)
from data_prep.synth.problems import read_problems
from data_prep.synth.replies import Reply
from megatron_sov.base.settings import AtLeastOne, Share, at_most

RUBRIC = ("Material is a problem and a solution whose final answer is known to be right. Is each step of the "
          "working true, and does it follow from what stands before it? 10: every step; 5: a gap that a "
          "reader can close; 0: the answer is guessed, or steps are false.")


@dataclass(frozen=True)
class SolutionsSettings:
    """Settings of `solutions`."""

    num_draws: Annotated[AtLeastOne, Le(1000)] = 8
    """Solutions that are asked for."""
    least: Annotated[AtLeastOne, at_most("most")] = 2
    """Right solutions that differ which a problem has to have; of one with fewer none is kept."""
    most: Annotated[AtLeastOne, at_most("num_draws")] = 5
    """Solutions of a problem that are kept."""
    max_similarity: Share = 0.8
    """Jaccard index of word triples above which two solutions are the same one, as `sov-data trajectories`
    has it."""
    way: Way = "auto"
    """How answers are compared: the reward `math`, the reward `stem`, or auto: as the answer looks."""
    min_judge: Grade = 0.0
    """Score from 0 to 10 that the judge has to give the working; 0: it is not asked."""
    language: str = ""
    """Language that solutions are written in, as "Korean"; empty: that of the problem."""
    temperature: Temperature = 0.8
    """Of sampling."""
    max_tokens: AtLeastOne = 4096
    """That a solution may have."""
    thinking: bool | None = None
    """Whether a reasoning model thinks first; its thoughts are kept as `reasoning_content`."""


@dataclass(frozen=True)
class Draft:
    """A solution with what is known of it."""

    reply: Reply
    """As the model gave it."""
    answer: str
    """Its final answer; empty where it has none in its place."""
    verdicts: tuple[SampleVerdict, ...]
    """So far."""

    @staticmethod
    def of(reply: Reply) -> Draft:
        """Return a solution after the checks that need no other one."""
        found = boxes(reply.text)
        marked = ends_in_box(reply.text)
        answer = found[0] if marked and not reply.is_cut else ""
        return Draft(reply, answer, ()).with_verdict(
            "finished", not reply.is_cut, "ended at the limit of tokens").with_verdict(
            "ending", marked, "does not end with its answer in a box")

    def with_verdict(self, check_: str, passed: bool, detail: str = "") -> Draft:
        return replace(self, verdicts=(*self.verdicts,
                                       SampleVerdict(check_, passed, "" if passed else detail)))

    @property
    def is_good(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def solution(self) -> Solution:
        return Solution(self.reply.text, self.reply.thinking)


def judged(drafts: Sequence[Draft], wanted: str, choices: Sequence[str], way: Way) -> list[Draft]:
    """Return solutions with whether their answer is the wanted one, and no other box of theirs says else."""
    # all boxes, since one that says two answers is not consistent
    inside = [boxes(draft.reply.text) if draft.answer else [] for draft in drafts]
    asked = [answer for found in inside for answer in found]
    # one call for all: each is a round trip to the process that compares
    right = dict(zip(asked, check(asked, wanted, choices, way), strict=True)) if asked else {}
    result = []
    for draft, found in zip(drafts, inside, strict=True):
        if not found:
            result.append(draft)
            continue
        last = right[found[0]]
        other = next((answer for answer in found if not right[answer].right), "")
        draft = draft.with_verdict("answer", last.right, last.why or f"{found[0][:100]}, not {wanted[:100]}")
        result.append(draft.with_verdict("consistent", not other, f"says {other[:100]} as well"))
    return result


class Solutions(Generator):
    """Right solutions that differ, each a conversation."""

    name: ClassVar[str] = "solutions"
    kind = "chat"
    help: ClassVar[str] = "two to five solutions of each problem that differ, verified by its answer"
    Settings = SolutionsSettings
    settings: SolutionsSettings

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        return read_problems(inputs, needs_answer="solutions are compared with it; add it")

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        """Yield each solution of a problem; a draw without an answer of use counts as a wrong one."""
        s, choices = self.settings, item.fields["choices"]
        replies = ask("solutions/solve", count=s.num_draws, temperature=s.temperature,
                      max_tokens=s.max_tokens, thinking=s.thinking, problem=item.fields["problem"],
                      choices=choices, language=s.language)
        wanted: str = item.fields["answer"]
        drafts = judged([Draft.of(reply) for reply in replies], wanted, choices, s.way)
        # counted here: the pass rate depends neither on the judge nor on how alike solutions are
        num_right = sum(draft.is_good for draft in drafts)
        drafts = self._apart([self._judge(draft, item, ask) for draft in drafts])
        notes = {"answer": wanted, "num_draws": s.num_draws, "num_right": num_right,
                 "pass_rate": num_right / s.num_draws}
        asked = _with_choices(item.fields["problem"], choices)
        for draft in drafts:
            thought = {"reasoning_content": draft.reply.thinking} if draft.reply.thinking else {}
            record = {"messages": [{"role": "user", "content": asked},
                                   {"role": "assistant", **thought, "content": draft.reply.text.strip()}],
                      "answer": wanted}
            yield GeneratedSample(record, draft.verdicts, group=item.id, notes=notes)

    def _judge(self, draft: Draft, item: GeneratorItem, ask: Ask) -> Draft:
        if not self.settings.min_judge or not draft.is_good:
            return draft
        score = ask.judge(RUBRIC, {"problem": item.fields["problem"], "solution": draft.reply.text})
        return draft.with_verdict("judge", score >= self.settings.min_judge, f"{score:g}")

    def _apart(self, drafts: list[Draft]) -> list[Draft]:
        """Return solutions with whether they are among those that lie apart, and these are enough."""
        s = self.settings
        good = [draft for draft in drafts if draft.is_good]
        solutions = [draft.solution for draft in good]
        chosen = {id(solution) for solution in diverse(solutions, s.most, s.max_similarity)}
        # by identity: equal solutions are different drafts
        kept = {id(draft) for draft, solution in zip(good, solutions, strict=True) if id(solution) in chosen}
        found = []
        for draft in drafts:
            if draft.is_good:
                draft = draft.with_verdict("different", id(draft) in kept, f"more similar than "
                                           f"{s.max_similarity:g} to one that is kept, or beyond {s.most}")
            found.append(draft.with_verdict("enough", len(kept) >= s.least,
                                            f"{len(kept)} right ones that differ"))
        return found


def _with_choices(problem: str, choices: Sequence[str]) -> str:
    """Return a problem with its choices, as it is asked."""
    if not choices:
        return problem
    listed = [f"{letter}. {choice}" for letter, choice in zip("ABCDEFGHIJ", choices, strict=False)]
    return "\n".join([problem, "", *listed])
