"""The generator `constraints`: instructions that code can check, each with functions that have been tested.

Seeds -> 50 instructions a call -> five functions with three cases each, run against each other in the
sandbox -> what the functions ask for, told back in words -> kept where nothing in it contradicts the
instruction.  `queries.read_constraints` reads kept constraints for `autoif`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Gt

from data_prep.synth.generator import (
    Ask, GeneratedSample, Generator, GeneratorItem, Grade, Kind, SampleVerdict)
from data_prep.synth.generators.autoif.queries import wording_problem
from data_prep.synth.generators.autoif.texts import SPACELESS, Named, texts_of
from data_prep.synth.generators.drawing import shuffled
from data_prep.synth.replies import NoReply, NoUsableReply
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    AtLeastOne, NotNegativeInt, SettingsProblem, Share, at_most, find_broken)
from megatron_sov.judge.rewards import constraint as constraint_checks
from megatron_sov.judge.rewards.constraint import MAX_TEXT_CHARS, ConstraintVerdict, problem_of
from megatron_sov.judge.rewards.patterns import json_of
from megatron_sov.judge.rewards.program_text import program_in
from megatron_sov.judge.rewards.reward import Refused
from megatron_sov.sandbox.sandbox import shared_sandbox

# Cross-validation: functions and cases of several answers judge each other. AutoIF keeps a case that one
# function agrees with, and then functions by their share of kept cases. Where all functions make one mistake,
# such as to accept everything, each case that shows it goes, and all functions stay. Here a share of the
# cases must stay as well, and a function must reject an ordinary text, one of its own kept false cases or
# one written for another constraint, and accept one of its own true ones.

Judging = Callable[[str, Sequence[str]], Sequence[ConstraintVerdict]]
"""Source of a check and texts -> what it says of each."""
MAX_CASES = 10
"""That are taken of one answer."""
MAX_JSON_CHARS = 200_000
MAX_UNENDED = 2
"""Functions of a constraint that may take all their time; the others are not asked then."""
_JSON = re.compile(r"^[ \t]*```[ \t]*json[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE | re.IGNORECASE)
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Case:
    """A text, and whether it keeps the constraint."""

    text: str
    """A response."""
    keeps: bool
    """What its writer says."""


@dataclass(frozen=True)
class CrossingDraft:
    """What one answer says: a check with its cases."""

    source: str
    """Python, with no problem."""
    cases: tuple[Case, ...]
    """In the answer's order."""


@dataclass(frozen=True)
class Crossed:
    """What is left of drafts."""

    functions: tuple[str, ...] = ()
    """Sources that stay, the best first."""
    accuracies: tuple[float, ...] = ()
    """Share of the kept cases that each agrees with."""
    cases: tuple[Case, ...] = ()
    """That stay."""
    check: str = ""
    """Name of the check that nothing passed; empty: functions are left."""
    detail: str = ""
    """What was seen, where nothing passed."""


def read_draft(answer: str) -> CrossingDraft | str:
    """Return the check and the cases of an answer: a block of Python and a block of JSON; or what is wrong
    with it, as the end of a sentence."""
    source = program_in(answer, ("evaluate",)).strip()
    if problem := problem_of(source, ()):
        return problem
    blocks = _JSON.findall(answer)
    try:
        # the last block: a draft before it is not meant
        listed = json.loads(blocks[-1][:MAX_JSON_CHARS]) if blocks else None
    except (ValueError, RecursionError):
        listed = None
    if not isinstance(listed, list):
        return "has no block of JSON with a list of cases"
    cases = [_case(one) for one in listed[:MAX_CASES]]
    return CrossingDraft(source, tuple(case for case in cases if case))


def _case(given: object) -> Case | None:
    if not isinstance(given, dict) or not isinstance(given.get("input"), str):
        return None
    output = given.get("output")
    keeps = _TRUTH.get(output.strip().lower()) if isinstance(output, str) else output
    if not isinstance(keeps, bool) or len(given["input"]) > MAX_TEXT_CHARS:
        return None
    return Case(given["input"], keeps)


def crossed(drafts: Sequence[CrossingDraft], others: Sequence[str], judging: Judging, *, min_functions: int,
            min_cases: int, min_kept_share: float, min_accuracy: float) -> Crossed:
    """Return what is left of the drafts of one constraint.

    Args:
        drafts: those that can be read.
        others: texts that were not written for this constraint.
        judging: runs a check.
        min_functions: different ones that there must be.
        min_cases: different ones that there must be.
        min_kept_share: of the cases, that one function or another must agree with.
        min_accuracy: of a function that stays.
    """
    sources = list(dict.fromkeys(draft.source for draft in drafts))
    cases = list(dict.fromkeys(case for draft in drafts for case in draft.cases))
    if len(sources) < min_functions:
        return Crossed(check="functions", detail=f"{len(sources)} different ones; {min_functions} are needed")
    if len(cases) < min_cases:
        return Crossed(check="cases", detail=f"{len(cases)} different ones; {min_cases} are needed")
    # every function sees every text once: its own cases, those of others, and ordinary ones
    texts = list(dict.fromkeys([*(case.text for case in cases), *others]))
    # source -> text -> what it says; functions that did not end are not there
    said: dict[str, dict[str, bool | None]] = {}
    unended = 0
    for source in sources:
        told = judging(source, texts)
        if all(verdict.ended for verdict in told):
            said[source] = {text: one.accepts for text, one in zip(texts, told, strict=True)}
        else:
            unended += 1
        # the others of this constraint would most likely take all their time as well
        if unended == MAX_UNENDED:
            return Crossed(check="ends", detail=f"{unended} functions did not end in time")
    # AutoIF: a case stays that one function agrees with, and a function by its share of these
    kept = [case for case in cases if any(verdicts[case.text] == case.keeps for verdicts in said.values())]
    scored = [(sum(verdicts[case.text] == case.keeps for case in kept) / max(1, len(kept)), source)
              for source, verdicts in said.items()]
    # not of AutoIF: where all functions make one mistake, the cases that show it are those that went
    if len(kept) < min_kept_share * len(cases):
        return Crossed(cases=tuple(kept), check="agreement", detail=f"{len(kept)} of {len(cases)} cases "
                       f"have a function that agrees; {unended} functions did not end")
    exact = [(accuracy, source) for accuracy, source in scored if accuracy >= min_accuracy]
    if not exact:
        best = max((accuracy for accuracy, _ in scored), default=0.0)
        return Crossed(cases=tuple(kept), check="accuracy", detail=f"the best function agrees with "
                       f"{best:.0%} of {len(kept)} cases")
    # a function that accepts everything agrees with every true case
    telling = [(accuracy, source) for accuracy, source in exact if _tells(said[source], kept, others)]
    if not telling:
        return Crossed(cases=tuple(kept), check="tells apart", detail=f"{len(exact)} functions accept, or "
                       f"reject, each of {len(texts)} texts")
    telling.sort(key=lambda one: -one[0])  # stable: the writer's order among equals
    return Crossed(tuple(source for _, source in telling), tuple(accuracy for accuracy, _ in telling),
                   tuple(kept))


def _tells(said: dict[str, bool | None], kept: Sequence[Case], others: Sequence[str]) -> bool:
    """Return whether a function rejects a text that it ought to look at, and accepts one that keeps the
    constraint; to reject nothing but blanks tells nothing."""
    wrong = [*(case.text for case in kept if not case.keeps), *others]
    right = [case.text for case in kept if case.keeps]
    return (any(said[text] is False for text in wrong if text.strip())
            and any(said[text] is True for text in right if text.strip()))


SANDBOX_WORKERS, CALL_TIME_S = 2, 5.0
"""Functions that run at a time, and seconds of a processor for a function and a text."""
BACK_TEMPERATURE = 0.7
"""Of what functions ask for, in words."""
FUNCTION_TEMPERATURE = 0.2
IDEA_TEMPERATURE = 0.7
"""Of new instructions, as AutoIF has it."""
MAX_OTHERS = 24
"""Texts of other constraints that a function is shown."""
RUBRIC = """The first text is an instruction for how an answer is written. The second one says, in other \
words, what a program checks of that answer. Do they ask for the same?
10: who follows one follows the other. 5: they differ, but one answer can follow both. 0: they contradict \
each other, or are about different things: who follows one does not follow the other."""
_LINE = re.compile(r"^\s*(?:[-*•]|\d{1,3}[.)])\s+(.+?)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class ConstraintsSettings:
    """How constraints are made; the values are AutoIF's and Typhoon-S's where nothing else is said."""

    language: Named = "ko"
    """Of the answers that are checked."""
    rounds: NotNegativeInt = 8
    """Calls for new instructions, beside the seeds, which are tried as well; a number of ours."""
    per_call: AtLeastOne = 50
    """Instructions that a call asks for."""
    num_functions: AtLeastOne = 5
    """Answers with a function and its cases, for each instruction."""
    num_cases: AtLeastOne = 3
    """Cases that each of them is asked for."""
    min_functions: Annotated[AtLeastOne, at_most("num_functions")] = 3
    """Different functions that there must be before any is run."""
    min_cases: AtLeastOne = 10
    """Different cases that there must be before any is run."""
    min_kept_share: Share = 0.5
    """Of the cases, that one function or another must agree with: where all make the same mistake, the cases
    that show it are those that nothing agrees with.  A value of ours; AutoIF: 0."""
    min_accuracy: Annotated[Share, Gt(0)] = 0.8
    """Share of the cases that a function must agree with."""
    min_agreement: Grade = 3.0
    """Of the judge, from 0 (contradicts) to 10 (the same); below it is a contradiction.  A value of ours."""

    def problems(self) -> list[SettingsProblem]:
        most_cases = self.num_functions * self.num_cases
        return find_broken(
            self, "", (self.min_cases <= most_cases, "min_cases",
             f"is more than num_functions x num_cases = {most_cases}: nothing would be kept"))


class Constraints(Generator):
    """Makes constraints with their functions, for `autoif` and for the reward `constraint`."""

    name = "constraints"
    kind: Kind = "prompt"
    needs_input: ClassVar[bool] = False
    help = "instructions that code can check, with tested functions (AutoIF): what `autoif` starts from"
    Settings = ConstraintsSettings
    settings: ConstraintsSettings

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield each seed, then the rounds of new instructions.

        Raises:
            UserError: a file of seeds cannot be read, or has none.
        """
        seeds = seeds_of(inputs, self.settings.language)
        source = inputs[0].name if inputs else "packaged seeds"
        for seed in seeds:
            yield GeneratorItem(f"seed.{hashlib.sha256(seed.encode()).hexdigest()[:16]}",
                                {"constraint": seed}, source)
        for number in range(self.settings.rounds):
            yield GeneratorItem(f"round.{number}", {"seeds": seeds}, source)

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        wanted = [item.fields["constraint"]] if "constraint" in item.fields else self._ideas(item, ask)
        # all drafts first: cases of one constraint are texts for the functions of the others
        drafts = {constraint: self._drafts(constraint, ask) for constraint in wanted
                  if not wording_problem(constraint)}
        for constraint in wanted:
            if problem := wording_problem(constraint):
                yield GeneratedSample({"prompt": constraint}, (SampleVerdict("wording", False, problem),))
            else:
                yield self._sample(constraint, drafts, item.id, ask)

    def _ideas(self, item: GeneratorItem, ask: Ask) -> list[str]:
        seeds = shuffled(item.fields["seeds"], item.id)
        reply, = ask("constraints/ideas", temperature=IDEA_TEMPERATURE, max_tokens=4096,
                     seeds=seeds, wanted=self.settings.per_call, language=self._language)
        lines = _LINE.findall(reply.text)
        if reply.is_cut and lines:
            lines.pop()  # half of an instruction
        told = {_plain(seed) for seed in seeds}
        found: dict[str, str] = {}
        for line in lines:
            if _plain(line) not in told:
                found.setdefault(_plain(line), line)
        return list(found.values())[:2 * self.settings.per_call]

    def _drafts(self, constraint: str, ask: Ask) -> list[CrossingDraft | str]:
        """Return what can be read of each answer, or what is wrong with it."""
        try:
            replies = ask("constraints/check", count=self.settings.num_functions, max_tokens=2048,
                          temperature=FUNCTION_TEMPERATURE, constraint=constraint,
                          language=self._language, num_cases=self.settings.num_cases,
                          modules=", ".join(sorted(constraint_checks.MODULES - {"__future__"})),
                          spaceless=self.settings.language in SPACELESS)
        except NoUsableReply as e:  # one instruction, not the fifty of its round
            return [f"was no answer ({e})"]
        return ["was cut off" if reply.is_cut else read_draft(reply.text)
                for reply in replies]

    def _sample(self, constraint: str, drafts: Mapping[str, Sequence[CrossingDraft | str]], item_id: str,
                ask: Ask) -> GeneratedSample:
        sound = [draft for draft in drafts[constraint] if isinstance(draft, CrossingDraft)]
        faults = [draft for draft in drafts[constraint] if isinstance(draft, str)]
        settings = self.settings
        left = crossed(sound, self._others(constraint, drafts, item_id), self._judging,
                       min_functions=settings.min_functions, min_cases=settings.min_cases,
                       min_kept_share=settings.min_kept_share, min_accuracy=settings.min_accuracy)
        passed = [SampleVerdict("wording", True)]
        record = {"prompt": constraint, "functions": list(left.functions), "language": settings.language,
                  "cases": [{"input": case.text, "output": case.keeps} for case in left.cases]}
        notes = {"accuracies": [round(accuracy, 4) for accuracy in left.accuracies],
                 "faults": faults, "num_cases": len(left.cases)}
        # `crossed` stops at the first that fails: those before it in this order were passed
        for check in ("functions", "cases", "ends", "agreement", "accuracy", "tells apart"):
            if check == left.check:
                detail = f"{left.detail}; one {faults[0]}" if faults and check == "functions" else left.detail
                return GeneratedSample(record, (*passed, SampleVerdict(check, False, detail)), notes=notes)
            passed.append(SampleVerdict(check, True))
        back, verdicts = self._told_back(constraint, left, ask)
        return GeneratedSample({**record, "back": back}, (*passed, *verdicts), notes=notes)

    def _others(self, constraint: str, drafts: Mapping[str, Sequence[CrossingDraft | str]],
                item_id: str) -> list[str]:
        """Return ordinary answers, and answers that keep other constraints of the item."""
        sound = [draft for other, found in drafts.items() if other != constraint
                 for draft in found if isinstance(draft, CrossingDraft)]
        written = [case.text for draft in sound for case in draft.cases if case.keeps]
        plain = texts_of(self.settings.language).plain
        return [*plain, *shuffled(list(dict.fromkeys(written)), item_id, constraint)[:MAX_OTHERS]]

    def _judging(self, source: str, texts: Sequence[str]) -> Sequence[constraint_checks.ConstraintVerdict]:
        try:
            return constraint_checks.verdicts(shared_sandbox(workers=SANDBOX_WORKERS), source,
                                            texts, call_s=CALL_TIME_S)
        except (RuntimeError, TimeoutError) as e:  # nothing is known about the function
            raise NoReply(str(e)) from None

    def _told_back(self, constraint: str, left: Crossed, ask: Ask) -> tuple[list[str], list[SampleVerdict]]:
        """Return what the functions ask for in words, and the verdicts on that."""
        try:
            reply, = ask("constraints/back", temperature=BACK_TEMPERATURE, max_tokens=2048,
                         functions=list(left.functions))
            told = _listed(reply.text)
            if told is None or len(told) != len(left.functions):
                return [], [SampleVerdict("told back", False, f"no list of {len(left.functions)} sentences")]
            grades = [ask.judge(RUBRIC, {"instruction": constraint, "what is checked": one}) for one in told]
        except NoUsableReply as e:
            return [], [SampleVerdict("told back", False, str(e))]
        against = next((f"{one} ({grade:g} of 10)" for one, grade in zip(told, grades, strict=True)
                        if grade < self.settings.min_agreement), "")
        return told, [SampleVerdict("told back", True),
                      SampleVerdict("judge: consistent", not against, against)]

    @cached_property
    def _language(self) -> str:
        return texts_of(self.settings.language).name


def seeds_of(inputs: Sequence[Path], language: str) -> list[str]:
    """Return the seeds of files, one a line; without files those that come with the program.

    Raises:
        UserError: a file cannot be read, or has none.
    """
    if not inputs:
        return list(texts_of(language).seeds)
    try:
        lines = [line.strip() for file in inputs for line in file.read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--input {' '.join(map(str, inputs))}: cannot be read as UTF-8 text ({e}); name a "
                        "file of one seed a line") from None
    # placeholders are for the packaged seeds, which fill them in
    seeds = [line for line in dict.fromkeys(lines) if not wording_problem(line)]
    if not seeds:
        raise UserError(f"{inputs[0]}: has no seed; write one instruction a line, each complete in itself, "
                        "without a {placeholder}")
    return seeds


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _listed(text: str) -> list[str] | None:
    """Return the strings of a JSON list; None: it is no such list."""
    try:
        found = json_of(text.strip())
    except Refused:
        return None
    if not isinstance(found, list) or not all(isinstance(one, str) and one.strip() for one in found):
        return None
    return [one.strip() for one in found]
