"""Measurements for `sov-data difficulty label`, which are no training data.

The generator `answers`: how often one configuration of a model solves each problem (Solar Open, arXiv
2601.07022, has five answer each problem).  `comparisons`: which of two problems the judge takes for the
harder one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Le

from data_prep.synth.final_answers import Way, boxes, check, ends_in_box
from data_prep.synth.generator import (
    Ask, GeneratedSample, Generator, GeneratorItem, NoUsableReply, SampleVerdict, Temperature)
from data_prep.synth.problems import read_problems
from megatron_sov.base.errors import UserError
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
        return read_problems(inputs, needs_answer="add it: a model's answers are compared with it")

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        """Yield the measurement of one problem; a draw without an answer of use is a wrong one, and not asked
        again: the share of right answers would be that of the usable ones."""
        s = self.settings
        problem, choices, wanted = (item.fields[name] for name in ("problem", "choices", "answer"))
        finals = []
        # one call a draw: with `count` draws of no use would be left out of the share without a trace
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


# A judge prefers what comes first, or last: each pair is shown in both orders, and counts where both say the
# same.

MIN_LEAD = 0.5
"""Points of 10 by which the mean of both orders has to differ from 5, for a verdict that counts."""
HIGH = 10.0
RUBRIC = ("The material is two problems. Which one will a good student of the subject more likely get wrong? "
          "0: the first is by far the harder one; 5: they are alike; 10: the second is by far the harder "
          "one. Solve neither; think of the number of steps, of what has to be known, and of what is easily "
          "overlooked.")


@dataclass(frozen=True)
class ComparisonsSettings:
    """Settings of `comparisons`."""

    per_problem: Annotated[AtLeastOne, Le(1000)] = 4
    """Problems that each is compared with, about."""


class Comparisons(Generator):
    """Pairs of problems with the harder one named."""

    name: ClassVar[str] = "comparisons"
    kind = "prompt"
    help: ClassVar[str] = "which of two problems is the harder one, for `sov-data difficulty label`"
    templates: ClassVar[Mapping[str, Sequence[str]]] = {}
    Settings = ComparisonsSettings
    settings: ComparisonsSettings

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield pairs: problems in the order of hashes form a ring, and each meets those behind it.

        Raises:
            UserError: a line is no problem, or there is one alone.
        """
        # in order of hashes, so that neighbours do not come from one source
        ring = sorted(read_problems(inputs), key=lambda item: hashlib.sha256(item.id.encode()).digest())
        if len(ring) < 2:
            raise UserError(f"{', '.join(map(str, inputs))}: holds {len(ring)} problems; pairs need two")
        # half of them: each pair counts for both of its problems
        steps = min((self.settings.per_problem + 1) // 2, len(ring) - 1)
        pairs: dict[tuple[str, str], None] = {}
        for step in range(1, steps + 1):
            for place, one in enumerate(ring):
                other = ring[(place + step) % len(ring)]
                # in a small ring a pair comes again from its other side
                if (other.id, one.id) in pairs:
                    continue
                pairs[one.id, other.id] = None
                fields = {"first_id": one.id, "first": one.fields["problem"],
                          "second_id": other.id, "second": other.fields["problem"]}
                joined = hashlib.sha256(f"{one.id}\n{other.id}".encode()).hexdigest()[:16]
                yield GeneratorItem(joined, fields, one.source, one.licence)

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        one, other = item.fields["first"], item.fields["second"]
        # in both orders above 0 where the second of the pair is the harder one
        ahead = ask.judge(RUBRIC, {"first problem": one, "second problem": other}, high=HIGH) - HIGH / 2
        back = HIGH / 2 - ask.judge(RUBRIC, {"first problem": other, "second problem": one}, high=HIGH)
        lead = (ahead + back) / 2
        ids = item.fields["first_id"], item.fields["second_id"]
        easier, harder = ids if lead > 0 else ids[::-1]
        record = {"prompt": f"{one}\n\n{other}", "easier": easier, "harder": harder, "lead": abs(lead)}
        yield GeneratedSample(record, (
            SampleVerdict("judge: consistent", ahead * back > 0,
                          f"{ahead:+g}, and {back:+g} in the other order"),
            SampleVerdict("judge: clear", abs(lead) >= MIN_LEAD, f"{lead:+g}")),
            notes={"ahead": ahead, "back": back})
