"""Generator `answers`: how often one configuration of a model solves each problem.

What comes out is a measurement and no training data: `sov-data difficulty label` puts those of several
configurations together (Solar Open, arXiv 2601.07022, has five answer each problem).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Le

from data_prep.synth.final_answers import Way, boxes, check, ends_in_box
from data_prep.synth.generator import (
    Ask, GeneratedSample, Generator, GeneratorItem, NoUsableReply, SampleVerdict, Temperature)
from data_prep.synth.problems import read_problems
from megatron_sov.base.settings import AtLeastOne


@dataclass(frozen=True)
class AnswersSettings:
    """Settings of `answers`."""

    num_draws: Annotated[AtLeastOne, Le(10_000)] = 8
    """Answers to each problem."""
    way: Way = "auto"
    """How answers are compared: the reward `math`, the reward `stem`, or auto: as the answer looks."""
    temperature: Temperature = 0.8
    """Of sampling."""
    max_tokens: AtLeastOne = 4096
    """That an answer may have; one that is cut off is wrong."""
    thinking: bool | None = None
    """Whether a reasoning model thinks first."""


class AnswerGenerator(Generator):
    """Right answers of those that were asked for."""

    name: ClassVar[str] = "answers"
    kind = "prompt"
    help: ClassVar[str] = "how often a model solves each problem, for `sov-data difficulty label`"
    templates: ClassVar[Mapping[str, Sequence[str]]] = {
        "solutions/solve": ("problem", "choices", "language")}
    Settings = AnswersSettings
    settings: AnswersSettings

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield the problems of files of JSON lines."""
        return read_problems(inputs, needs_answer="add it: a model's answers are compared with it")

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        """Yield the measurement of one problem; a draw without an answer of use is a wrong one, and not asked
        again: the share of right answers would be that of the usable ones."""
        s = self.settings
        problem, choices, wanted = (item.fields[name] for name in ("problem", "choices", "answer"))
        finals = []
        for draw in range(s.num_draws):
            try:
                (reply,) = ask("solutions/solve", first=draw, temperature=s.temperature,
                               max_tokens=s.max_tokens, thinking=s.thinking, problem=problem,
                               choices=choices, language="", attempts=1)
            except NoUsableReply:
                continue
            if not reply.is_cut and ends_in_box(reply.text):
                finals.append(boxes(reply.text)[0])
        num_right = sum(checked.right for checked in check(finals, wanted, choices, s.way))
        yield GeneratedSample({"prompt": problem, "answer": wanted, "domain": item.fields["domain"],
                               "problem_id": item.id, "num_right": num_right, "num_answers": s.num_draws},
                              (SampleVerdict("measured", True),), notes={"num_in_form": len(finals)})
