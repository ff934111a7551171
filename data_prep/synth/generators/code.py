"""Generator `code`: tasks with programs and tests that were written apart and judge each other.

Tasks come from seeds, as of OSS-Instruct (arXiv 2312.02120), or are given.  Tests are written from the task
alone; programs and tests vote (CodeT, arXiv 2207.10397); and tests are kept only where they notice programs
that know nothing, and small mistakes planted into one that is right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Le

from data_prep.json_lines import read_objects
from data_prep.responses.trajectories import Solution, diverse
from data_prep.synth.generator import (
    Ask, GeneratedSample, Generator, GeneratorItem, NoReply, Reply, SampleVerdict, Temperature)
from data_prep.synth.generators.code_parts import (
    MAX_CHARS, CodeTask, assertions, defines, mutants, reaches_out, read_task, stubs)
from data_prep.synth.problems import line_files, problem_text, stated_id
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import AboveZero, AtLeastOne, Share, at_most
from megatron_sov.judge.rewards.code import CodeReward
from megatron_sov.judge.rewards.program_text import program_in
from megatron_sov.judge.rewards.reward import Refused

MOST_ENDLESS = 2
"""Tests of a program that take too long, each tried by itself; then all others count as failed."""
PATIENCE = 30.0
"""Times a program's seconds of processors that it may take by the clock, on a machine with other work."""
Count = Annotated[AtLeastOne, Le(100_000)]


# Programs against tests in the sandbox, and which of both may be believed.


@dataclass(frozen=True)
class TestAgreement:
    """The programs and tests that agree best."""

    programs: tuple[int, ...]
    """Numbers of the programs that pass the same tests."""
    tests: tuple[int, ...]
    """Numbers of these tests."""


def passed(code: CodeReward, program: str, tests: Sequence[str]) -> list[bool]:
    """Return which tests a program passes; where one takes too long the others are run without it.

    Raises:
        NoReply: the machine could not say: the item is made again.
    """
    # all tests run in one process: the first that does not end hides the results of those after it
    found = _run(code, program, tests)
    if all(found) or len(tests) == 1:
        return found
    first = found.index(False)
    if any(found[first:]):  # they were all reached
        return found
    # alone, each shows its own result; two that do not end are enough to give up
    endless = 0
    for i in range(first, len(tests)):
        if endless == MOST_ENDLESS:
            break
        alone = _timed(code, program, tests[i])
        found[i] = alone is True
        if alone is None:
            endless += 1
    return found


def fails(code: CodeReward, program: str, tests: Sequence[str]) -> bool:
    """Return whether a program fails a test, or does not end."""
    return not all(_run(code, program, tests))


def agreement(matrix: Sequence[Sequence[bool]]) -> TestAgreement:
    """Return the programs and tests that agree best: of programs that pass the same tests those whose number
    times that of these tests is largest (CodeT, arXiv 2207.10397, section 3.2; of equals the earlier ones).

    Args:
        matrix: for each program, which tests it passes.
    """
    # CodeT: score of a consensus set = number of its programs x number of its tests
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, row in enumerate(matrix):
        groups[tuple(i for i, right in enumerate(row) if right)].append(number)
    tests, programs = max(groups.items(), key=lambda group: len(group[0]) * len(group[1]), default=((), []))
    return TestAgreement(tuple(programs), tests)


def telling(code: CodeReward, entry_point: str, tests: Sequence[str]) -> tuple[list[str], str]:
    """Return the tests that some program fails which knows nothing of the task, and the first such program
    that passes all of these; empty: none does."""
    programs = stubs(entry_point)
    # A test that every such program passes checks nothing; one of them may still pass all that are left.
    rows = [passed(code, program, tests) for program in programs]
    kept = [i for i in range(len(tests)) if not all(row[i] for row in rows)]
    blind = next((program for program, row in zip(programs, rows, strict=True)
                  if all(row[i] for i in kept)), "")
    return [tests[i] for i in kept], blind


def killed(code: CodeReward, program: str, tests: Sequence[str], most: int) -> tuple[int, int]:
    found = mutants(program, most)
    return sum(fails(code, mutant, tests) for mutant in found), len(found)


def _timed(code: CodeReward, program: str, test: str) -> bool | None:
    """Return whether a program passes a test; None: it takes too long."""
    try:
        score = code.score_unproved({"response": program, "tests": [test]})
    except Refused:
        return False
    except (TimeoutError, RuntimeError) as e:
        raise NoReply(f"the sandbox: {e}") from None
    return None if score.timed_out else score.reward == 1.0


def _run(code: CodeReward, program: str, tests: Sequence[str]) -> list[bool]:
    try:
        return code.passed({"response": program, "tests": list(tests)})
    except Refused:
        return [False] * len(tests)
    except (TimeoutError, RuntimeError) as e:
        raise NoReply(f"the sandbox: {e}") from None


@dataclass(frozen=True)
class CodeSettings:
    """Settings of `code`."""

    num_solutions: Count = 5
    """Programs that are asked for."""
    num_test_draws: Count = 3
    """Times that tests are asked for; none of them sees a program."""
    num_tests: Count = 8
    """Tests that are asked for each time."""
    max_tests: Count = 30
    """Tests that are looked at."""
    min_tests: Annotated[Count, at_most("max_tests")] = 5
    """Tests that have to be left."""
    min_solutions: Annotated[Count, at_most("num_solutions")] = 2
    """Programs that have to pass the same tests."""
    min_agreement: Share = 0.5
    """Share of the tests looked at that these programs have to pass: else the task is not clear."""
    max_mutants: Count = 12
    """Programs with a planted mistake."""
    min_killed: Share = 0.7
    """Share of them that has to fail; some are no mistakes, so not all can."""
    most: Count = 3
    """Conversations that are kept of a task: its right programs that differ."""
    max_similarity: Share = 0.8
    """Jaccard index of word triples above which two answers are the same one."""
    test_time_s: Annotated[AboveZero, Le(90)] = 3.0
    """Seconds of processors that a program has for its tests."""
    language: str = ""
    """Language that tasks are written in, as "Korean"; empty: the model's choice."""
    temperature: Temperature = 0.8
    """Of sampling."""
    max_tokens: Count = 4096
    """That an answer may have."""
    thinking: bool | None = None
    """Whether a reasoning model thinks first; its thoughts are kept as `reasoning_content`."""


@dataclass(frozen=True)
class CodeProgram:
    """An answer with the program in it."""

    reply: Reply
    """As the model gave it."""
    source: str
    """The program."""
    fault: tuple[str, str]
    """Name of the check that it does not pass, and why; ("", ""): it can be run."""

    @staticmethod
    def of(reply: Reply, task: CodeTask) -> CodeProgram:
        source = program_in(reply.text, (task.entry_point,))
        why = reaches_out(source) if len(source) <= MAX_CHARS else f"has {len(source):,} characters"
        if reply.is_cut:
            return CodeProgram(reply, source, ("finished", "ended at the limit of tokens"))
        if why:
            return CodeProgram(reply, source, ("alone", why))
        if not defines(source, task.entry_point):
            return CodeProgram(reply, source, ("function", f"has no {task.entry_point}"))
        return CodeProgram(reply, source, ("", ""))


class CodeTasks(Generator):
    """A prompt with tests for reinforcement learning, and conversations with programs that pass them."""

    name: ClassVar[str] = "code"
    kind = "prompt"
    help: ClassVar[str] = "programming tasks with tests, and programs that pass them"
    templates: ClassVar[Mapping[str, Sequence[str]]] = {
        "code/task": ("seed", "language"), "code/tests": ("task", "entry_point", "num_tests"),
        "code/solve": ("task",)}
    Settings = CodeSettings
    settings: CodeSettings

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield tasks (`task`, perhaps `entry_point`) and seeds (`seed`, or another text)."""
        seen: dict[str, str] = {}
        for file in line_files(inputs):
            for where, record in read_objects(file):
                fields = _fields(record, where)
                id_ = stated_id(record, fields["task"] or fields["seed"], where)
                if seen.setdefault(id_, where) == where:
                    yield GeneratorItem(id_, fields, str(record.get("source") or file.stem),
                                        str(record.get("licence") or record.get("license") or ""))

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        """Yield the prompt with its tests, then each program's conversation."""
        s = self.settings
        drawn: dict[str, Any] = {"temperature": s.temperature, "max_tokens": s.max_tokens,
                                 "thinking": s.thinking}
        text = item.fields["task"]
        if not text:
            (reply,) = ask("code/task", **drawn, seed=item.fields["seed"], language=s.language)
            text = reply.text if not reply.is_cut else ""
        task = read_task(text, item.fields["entry_point"])
        if isinstance(task, str):
            yield GeneratedSample({"prompt": text, "tests": []}, (SampleVerdict("task", False, task),),
                                  group=item.id)
            return
        offered = ask("code/tests", count=s.num_test_draws, **drawn, task=task.text,
                      entry_point=task.entry_point, num_tests=s.num_tests)
        # each test once, in the order of draws
        tests = list(dict.fromkeys(test for reply in offered
                                   for test in assertions(reply.text, task.entry_point)))[:s.max_tests]
        programs = [CodeProgram.of(reply, task)
                    for reply in ask("code/solve", count=s.num_solutions, **drawn, task=task.text)]
        yield from self._samples(item, task, tests, programs)

    def _samples(self, item: GeneratorItem, task: CodeTask, tests: list[str],
                 programs: list[CodeProgram]) -> Iterator[GeneratedSample]:
        sound = [program for program in programs if not program.fault[0]]
        known: dict[str, list[bool]] = {}
        # equal programs run once, and still are several votes
        for program in sound:
            if tests and program.source not in known:
                known[program.source] = passed(self._code, program.source, tests)
        agreed = agreement([known.get(program.source, []) for program in sound])
        right = [sound[i] for i in agreed.programs]
        verdicts, kept, notes = self._judged(task, tests, right, [tests[i] for i in agreed.tests])
        yield GeneratedSample({"prompt": task.text, "tests": kept, "entry_point": task.entry_point}, verdicts,
                              group=item.id, notes={**notes, "num_solutions": len(programs),
                                                    "num_right": len(right)})
        # by identity: of two equal programs one alone is kept
        said = {id(p): Solution(p.reply.text, p.reply.thinking) for p in right}
        apart = {id(one) for one in diverse(list(said.values()), self.settings.most,
                                            self.settings.max_similarity)}
        for program in programs:
            yield GeneratedSample(_conversation(task, program.reply), self._of_program(
                program, verdicts, id(program) in said, id(said.get(id(program))) in apart),
                group=item.id, kind="chat")

    def _of_program(self, program: CodeProgram, verdicts: tuple[SampleVerdict, ...], is_right: bool,
                    is_apart: bool) -> tuple[SampleVerdict, ...]:
        if program.fault[0]:
            return (SampleVerdict(program.fault[0], False, program.fault[1]),)
        own = SampleVerdict("passes", is_right, "" if is_right else "fails tests that others pass")
        if not is_right:
            return (own,)
        return (own, *verdicts, SampleVerdict("different", is_apart, "" if is_apart else "as another one is"))

    def _judged(self, task: CodeTask, tests: Sequence[str], right: Sequence[CodeProgram], agreed: list[str]
                ) -> tuple[tuple[SampleVerdict, ...], list[str], dict[str, Any]]:
        """Return the verdicts of a task, the tests that are kept, and figures."""
        s = self.settings
        least = max(s.min_tests, s.min_agreement * len(tests))
        agree = len(right) >= s.min_solutions and len(agreed) >= least
        # in order of their price: mutants run only where all before them passed
        said = f"{len(right)} programs pass {len(agreed)} of {len(tests)} tests"
        verdicts = [SampleVerdict("agreement", agree, said)]
        notes: dict[str, Any] = {"num_tests": len(tests), "num_agreed": len(agreed)}
        if not agree:
            return tuple(verdicts), agreed, notes
        kept, blind = telling(self._code, task.entry_point, agreed)
        verdicts += [SampleVerdict("tests", len(kept) >= s.min_tests,
                                   f"{len(agreed) - len(kept)} of {len(agreed)} accept everything"),
                     SampleVerdict("stubs", not blind, f"passed by {blind.strip().splitlines()[-1].strip()}"
                                   if blind else "")]
        if all(verdict.passed for verdict in verdicts):
            num_killed, num_mutants = killed(self._code, right[0].source, kept, s.max_mutants)
            notes |= {"num_mutants": num_mutants, "num_killed": num_killed}
            # without one mutant that is noticed nothing is known of the tests
            verdicts.append(SampleVerdict("mutants", num_killed >= max(1, s.min_killed * num_mutants),
                                          f"{num_killed} of {num_mutants} noticed"))
            # run once more: what changes from run to run is no test
            verdicts.append(SampleVerdict("steady", all(passed(self._code, right[0].source, kept))))
        return tuple(verdicts), kept, notes

    @cached_property
    def _code(self) -> CodeReward:
        # what `reaches_out` lets through cannot sleep: what takes long by the clock waits for a processor
        time_s = self.settings.test_time_s
        return CodeReward(test_time_s=time_s, patience=PATIENCE,
                          time_limit_s=max(300.0, 2 * PATIENCE * time_s))


def _conversation(task: CodeTask, reply: Reply) -> dict[str, Any]:
    thought = {"reasoning_content": reply.thinking} if reply.thinking else {}
    return {"messages": [{"role": "user", "content": task.text},
                         {"role": "assistant", **thought, "content": reply.text.strip()}]}


def _fields(record: Mapping[str, Any], where: str) -> dict[str, str]:
    """Return the task of a record, or what one may be inspired by.

    Raises:
        UserError: it has neither.
    """
    task, seed, entry_point = (record.get(name, "") for name in ("task", "seed", "entry_point"))
    if not (isinstance(task, str) and isinstance(seed, str) and isinstance(entry_point, str)):
        raise UserError(f"{where}: task, seed and entry_point must be texts")
    if not task.strip() and not seed.strip():
        seed = problem_text(record) or ""
    if not task.strip() and not seed.strip():
        raise UserError(f"{where}: has neither a task nor a seed (fields: {', '.join(record) or 'none'}); "
                        "add `task`, or `seed`: a text or program that a task may be inspired by")
    if len(task) > MAX_CHARS or len(seed) > MAX_CHARS:
        raise UserError(f"{where}: its task or seed has more than {MAX_CHARS:,} characters; shorten it")
    return {"task": task, "seed": seed, "entry_point": entry_point}
