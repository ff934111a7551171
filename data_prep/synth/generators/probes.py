"""Generator `probes`: problems with verified answers in each subdomain, to choose checkpoints by.

VibeThinker (arXiv 2511.06221, section 2.3) probes checkpoints of fine-tuning with sets D_i of algebra,
geometry, calculus and statistics that a capable model wrote; how many problems they have is not published.
An answer is verified by solutions that do not see it, and by a program.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from annotated_types import Ge, Gt, Le
from tqdm import tqdm

from data_prep.curate.decontamination.step import DecontaminateSettings, benchmark_files, find_hits, text_in
from data_prep.json_lines import read_objects
from data_prep.synth.final_answers import boxes, check, ends_in_box
from data_prep.synth.generator import (
    Ask, GeneratedSample, Generator, GeneratorItem, NoReply, NoUsableReply, Reply, SampleVerdict, Temperature)
from data_prep.synth.generators.code_parts import reaches_out
from data_prep.synth.problems import line_files, stated_id
from megatron_sov.base.artifacts import new_artifact, refuse_existing
from megatron_sov.base.documents.item_search import ItemSearch, SearchItem, forms
from megatron_sov.base.documents.overlap import WORDS, find_units
from megatron_sov.base.errors import UserError, list_problems
from megatron_sov.base.settings import (
    AtLeastOne, Flag, NotNegativeInt, SettingsProblem, Share, add_options, at_most, read_options, rules_of)
from megatron_sov.judge.rewards.program_text import program_in
from megatron_sov.sandbox.program import Limits, Program
from megatron_sov.sandbox.sandbox import Sandbox

TOPICS = Path(__file__).parents[1] / "taxonomies" / "mathematics.yaml"
STEPS = (2, 4, 6)
"""Steps that problems are asked to need, in turns: checkpoints differ at what some of them can."""
DOMAIN = re.compile(r"[\w.-]{1,60}")
_FORM = re.compile(r"Problem:\s*(.+?)\s*^\W*Answer:\W*?[ \t]*(\S[^\n]*)", re.DOTALL | re.MULTILINE)
MAX_ANSWER_CHARS = 200
MAX_PROBLEM_CHARS = 5_000


@dataclass(frozen=True)
class ProbesSettings:
    """Settings of `probes`."""

    per_topic: Annotated[AtLeastOne, Le(10_000)] = 6
    """Problems that are asked for on each topic."""
    num_solutions: Annotated[int, Ge(2), Le(1000)] = 5
    """Solutions that verify an answer; none sees it."""
    min_agreement: Annotated[Share, Gt(0)] = 0.6
    """Share of them that has to give the stated answer."""
    num_programs: Annotated[NotNegativeInt, Le(100)] = 1
    """Programs that are asked to compute it; 0: none."""
    min_programs: Annotated[NotNegativeInt, at_most("num_programs")] = 0
    """Programs that have to compute it; one that prints something else refuses the problem in any case."""
    benchmarks: tuple[str, ...] = ()
    """.jsonl files, or folders of them, whose items no problem may share ten words in a row with."""
    language: str = ""
    """Language of the problems, as "Korean"; empty: the model's choice."""
    temperature: Temperature = 0.8
    """Of sampling."""
    max_tokens: AtLeastOne = 4096
    """That an answer may have."""
    thinking: bool | None = None
    """Whether a reasoning model thinks first."""

    def problems(self) -> list[SettingsProblem]:
        return rules_of(self.search_settings()) if self.benchmarks else []

    def search_settings(self) -> DecontaminateSettings:
        return DecontaminateSettings(benchmarks=tuple(map(Path, self.benchmarks)))


class Probes(Generator):
    """Problems whose answers solutions and programs have found as well."""

    name: ClassVar[str] = "probes"
    kind = "prompt"
    help: ClassVar[str] = "probing sets: problems of each subdomain with verified answers"
    needs_input: ClassVar[bool] = False
    templates: ClassVar[Mapping[str, Sequence[str]]] = {
        "probes/problem": ("domain", "topic", "number", "steps", "language"),
        "solutions/solve": ("problem", "choices", "language"), "probes/program": ("problem",)}
    Settings = ProbesSettings
    settings: ProbesSettings

    def files(self) -> Sequence[Path]:
        """Return the benchmarks, and the topics that are taken without input."""
        return [TOPICS, *benchmark_files(map(Path, self.settings.benchmarks))]

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        """Yield topic after topic; without input those of `taxonomies/mathematics.yaml`."""
        # id -> where it stood first: a topic that is repeated is passed over
        seen: dict[str, str] = {}
        for where, record in _topics(inputs):
            domain, topic = record.get("domain"), record.get("topic")
            if not isinstance(domain, str) or not DOMAIN.fullmatch(domain):
                raise UserError(f"{where}: domain = {repr(domain)[:60]} must be a name of letters, digits, "
                                "'.', '_' and '-', such as algebra")
            if not isinstance(topic, str) or not 0 < len(topic.strip()) <= 1000:
                raise UserError(f"{where}: topic = {repr(topic)[:60]} must be a text of up to 1,000 "
                                "characters")
            id_ = stated_id(record, f"{domain}\n{topic}", where)
            if seen.setdefault(id_, where) != where:
                continue
            for number in range(1, self.settings.per_topic + 1):
                yield GeneratorItem(f"{id_}.{number}",
                                    {"domain": domain, "topic": topic.strip(), "number": number},
                                    where.rpartition(":")[0])

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        s = self.settings
        drawn: dict[str, Any] = {"temperature": s.temperature, "max_tokens": s.max_tokens,
                                 "thinking": s.thinking}
        number = item.fields["number"]
        (reply,) = ask("probes/problem", **drawn, domain=item.fields["domain"], topic=item.fields["topic"],
                       number=number, steps=STEPS[number % len(STEPS)],
                       language=s.language)
        problem, answer, why = read_problem(reply)
        record = {"prompt": problem, "answer": answer, "domain": item.fields["domain"]}
        if why:
            yield GeneratedSample(record, (SampleVerdict("form", False, why),))
            return
        verdicts = [SampleVerdict("form", True), self._leaked(problem)]
        notes: dict[str, Any] = {"topic": item.fields["topic"]}
        if verdicts[-1].passed:  # what is refused anyway is not paid for
            solutions = ask("solutions/solve", count=s.num_solutions, **drawn, problem=problem, choices=[],
                            language="")
            verdicts.append(self._agreed(solutions, answer, notes))
        if all(verdict.passed for verdict in verdicts) and s.num_programs:
            programs: list[Reply] = []
            with contextlib.suppress(NoUsableReply):  # none that ends; how many must, min_programs says
                programs = ask("probes/program", count=s.num_programs, **drawn, problem=problem)
            verdicts.append(self._computed(programs, answer, notes))
        yield GeneratedSample(record, tuple(verdicts), notes=notes)

    def _leaked(self, problem: str) -> SampleVerdict:
        hits = find_hits(problem, self._search, 0) if self._search else []
        return SampleVerdict("leaked", not hits, f"{hits[0].benchmark}:{hits[0].item}" if hits else "")

    def _agreed(self, solutions: Sequence[Reply], answer: str, notes: dict[str, Any]) -> SampleVerdict:
        finals = [boxes(reply.text)[0] for reply in solutions
                  if not reply.is_cut and ends_in_box(reply.text)]
        num_right = sum(checked.right for checked in check(finals, answer))
        num_asked = self.settings.num_solutions  # one of no use does not agree
        notes |= {"num_solutions": num_asked, "num_right": num_right}
        return SampleVerdict("agreement", num_right >= self.settings.min_agreement * num_asked,
                             f"{num_right} of {num_asked} solutions give the stated answer")

    def _computed(self, programs: Sequence[Reply], answer: str, notes: dict[str, Any]) -> SampleVerdict:
        printed = [found for reply in programs
                   if not reply.is_cut and (found := run_program(program_in(reply.text)))]
        right = [checked.right for checked in check(printed, answer)]
        notes |= {"num_programs": len(printed), "num_computed": sum(right)}
        # one program that prints something else is reason enough to doubt the stated answer
        if not all(right):
            return SampleVerdict("program", False, f"a program prints {printed[right.index(False)][:100]}")
        enough = len(right) >= self.settings.min_programs
        return SampleVerdict("program", enough,
                             f"{len(right)} programs of {self.settings.num_programs} end with an answer")

    @cached_property
    def _search(self) -> ItemSearch | None:
        return self.settings.search_settings().search() if self.settings.benchmarks else None


def read_problem(reply: Reply) -> tuple[str, str, str]:
    """Return problem, answer, and why they cannot be taken; empty: they can."""
    found = _FORM.search(reply.text.strip())
    if reply.is_cut or found is None:
        return reply.text, "", "is not in the form that was asked for"
    problem, answer = found[1].strip().strip("*").strip(), found[2].strip().strip("*").strip()
    answer = (boxes(answer) or [answer.rstrip(".").strip("$").strip()])[0]
    if not 20 <= len(problem) <= MAX_PROBLEM_CHARS or not 0 < len(answer) <= MAX_ANSWER_CHARS:
        return problem, answer, f"problem of {len(problem):,} and answer of {len(answer):,} characters"
    return problem, answer, ""


def run_program(source: str) -> str:
    """Return what a program prints as its only line; empty: it prints something else, or does not end well.

    Raises:
        NoReply: the machine could not run it: the item is made again.
    """
    if reaches_out(source):
        return ""
    limits = Limits(wall_s=30, cpu_s=10)
    outcome = _sandbox().run(Program(source), limits)
    if outcome.status == "infrastructure":
        raise NoReply(f"the sandbox: {outcome.reason}")
    printed = outcome.stdout.strip()
    short = "\n" not in printed and len(printed) <= MAX_ANSWER_CHARS
    return printed if outcome.status == "ok" and short else ""


@lru_cache(maxsize=1)
def _sandbox() -> Sandbox:
    return Sandbox()


def _topics(inputs: Sequence[Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not inputs:
        for domain, topics in yaml.safe_load(TOPICS.read_text(encoding="utf-8")).items():
            yield from ((f"{TOPICS.stem}:{domain}", {"domain": domain, "topic": topic}) for topic in topics)
    for file in line_files(inputs):
        yield from read_objects(file)


# `sov-data probing-sets`: problems of `probes` frozen into sets that `megatron-sov ssp probe` takes.
# Checkpoints are chosen by these problems, so none may be in what they were trained on: the training input is
# read once, and each problem that shares ten words in a row with it is left out.

KIND = "probing_sets"
MIN_WORDS = 5
"""A shorter problem cannot be looked for, and is left out."""


@dataclass(frozen=True, kw_only=True)
class ProbingSetsOptions:
    """Write one file of problems for each domain."""

    input: Annotated[tuple[Path, ...], Flag(many=True)]
    """The folder of `sov-data synth probes`, or lines with prompt, answer and domain."""
    against: Annotated[tuple[Path, ...], Flag(many=True)] = ()
    """.jsonl files, or folders of them, of what checkpoints are trained on: text, chats or prompts."""
    per_domain: NotNegativeInt = 0
    """Problems of a set at most (default: all)."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the sets."""
    overwrite: bool = False
    """Replace sets that are already there."""


@dataclass(frozen=True)
class ProbingProblem:
    """A problem that checkpoints may be probed by."""

    domain: str
    """Its set."""
    prompt: str
    """What is asked."""
    answer: str
    """What is right."""
    id: str
    """Of its line."""
    model: str
    """Who wrote it; empty: not said."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Write one file of problems for each domain, without those in the training "
                          "input, as an artifact whose hashes prove that they stay the same.")
    add_options(parser, ProbingSetsOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(ProbingSetsOptions, typed)
    content = freeze(args.input, args.against, args.output, args.per_domain, overwrite=args.overwrite)
    for domain, count in content["domains"].items():
        print(f"{domain}: {count:,} problems")
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in content["left_out"].items())
    print(f"left out: {left_out or 'none'}; {content['num_lines_against']:,} lines of training input read")
    if not args.against:
        print("no training input was given (--against), so nothing is known of what these sets share with it")
    print(f"wrote {args.output}; megatron-sov ssp probe ... --problems {args.output} --reward math")
    return 0


def freeze(files: Sequence[Path], against: Sequence[Path], output: Path, per_domain: int = 0, *,
           overwrite: bool = False) -> dict[str, Any]:
    """Write an artifact of kind "probing_sets"; returns its content.

    Args:
        files: of problems, and folders of them.
        against: of training input, likewise.
        output: the artifact.
        per_domain: problems of a set at most; 0: all.
        overwrite: replace sets that are already there.

    Raises:
        UserError: a line is no problem or cannot be read, or a domain has no problem left.
    """
    if per_domain < 0:
        raise UserError(list_problems("probing-sets", [f"--per-domain {per_domain}: must not be negative"]))
    refuse_existing(output, KIND, overwrite)
    problems, left_out = _read(files)
    search = ItemSearch([SearchItem(p.domain, p.id, "prompt", p.prompt) for p in problems], WORDS, MIN_WORDS)
    # what cannot be looked for cannot be cleared either
    gone = dict.fromkeys(search.too_short, "too short to be looked for")
    num_lines = 0
    for file in line_files(against):
        for _, record in tqdm(read_objects(file), desc=file.name, unit=" records", disable=None):
            num_lines += 1
            for form in forms(text_in(record)):
                gone.update((found.item, "in the training input") for found in search.find(find_units(form)))
    left_out.update(gone.values())
    sets: dict[str, list[ProbingProblem]] = defaultdict(list)
    for number, problem in enumerate(problems):
        # this makes the set also where the problem goes, so that a domain that loses all is seen below
        of_domain = sets[problem.domain]
        if number not in gone and not 0 < per_domain <= len(of_domain):
            of_domain.append(problem)
    if empty := [domain for domain, found in sets.items() if not found]:
        raise UserError(f"{empty[0]}: no problem of this domain is left "
                        f"({', '.join(f'{n:,} {why}' for why, n in left_out.items())}); write more with "
                        "`sov-data synth probes`")
    with new_artifact(output, KIND, overwrite=overwrite) as artifact:
        for domain, left in sets.items():
            with open(artifact.path / f"{domain}.jsonl", "w", encoding="utf-8") as out:
                for p in left:
                    row = {"prompt": p.prompt, "answer": p.answer, "domain": domain, "id": p.id}
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
        models = sorted({p.model for left in sets.values() for p in left if p.model})
        artifact.settings = {"inputs": list(files), "against": list(against), "per_domain": per_domain}
        artifact.content = {"domains": {domain: len(found) for domain, found in sets.items()},
                            "left_out": dict(left_out), "num_lines_against": num_lines, "models": models}
    return artifact.content


def _read(files: Sequence[Path]) -> tuple[list[ProbingProblem], Counter[str]]:
    """Return the problems that differ, in order, and how many were left out for what reason."""
    found: dict[bytes, ProbingProblem] = {}
    left_out: Counter[str] = Counter()
    for file in line_files(files):
        for where, row in read_objects(file):
            prompt, answer, domain = (row.get(name) for name in ("prompt", "answer", "domain"))
            if not all(isinstance(value, str) and value.strip() for value in (prompt, answer, domain)):
                raise UserError(f"{where}: needs the texts prompt, answer and domain (fields: "
                                f"{', '.join(row) or 'none'}); `sov-data synth probes` writes them")
            if not DOMAIN.fullmatch(str(domain)) or set(str(domain)) <= {"."}:
                raise UserError(f"{where}: domain = {str(domain)[:60]!r} must be a name of letters, digits, "
                                "'.', '_' and '-', such as algebra")
            made = row.get("synthetic")
            problem = ProbingProblem(str(domain), str(prompt), str(answer), str(row.get("id") or where),
                                     str(made.get("model") or "") if isinstance(made, dict) else "")
            # by the hashes of its words: case and punctuation make no other problem
            if found.setdefault(find_units(problem.prompt).hashes.tobytes(), problem) is not problem:
                left_out["repeated"] += 1
    if not found:
        raise UserError(f"{', '.join(map(str, files))}: has no problems; run `sov-data synth probes` first")
    return list(found.values()), left_out
