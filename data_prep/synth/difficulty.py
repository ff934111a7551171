"""`sov-data difficulty label|grade`: how hard problems are, measured by models and estimated by a scorer.

`label` joins what models answered (`sov-data synth answers`) and what a judge compared (`sov-data synth
comparisons`) into labels of `sov-data scorer train --kind regressor`: 0 for a problem that is always solved,
5 for one that never is. `grade` writes measured or estimated pass rates into rows.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from data_prep.json_lines import read_objects
from data_prep.synth.problems import TEXT_FIELDS, problem_text
from megatron_sov.base.artifacts import (
    check_output_folder, create_artifact, find_damaged_files, read_manifest)
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import ActionGroup, DeclaredCommand, Flag

KIND, GRADED = "difficulty_labels", "corpus"
LABELS, KEPT = "labels.jsonl", "kept.jsonl"
HARDEST = 5.0
"""Label of a problem that no model solves; regressors have labels from 0 to 5."""
BUCKETS = ("hard", "middle", "easy")
MAX_LEVEL = 24
"""Of a count in `with_form`."""
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_OPERATOR = re.compile(r"[-+*/^=<>×÷·≤≥≠∫∑√±%]|\\[A-Za-z]+")


@dataclass(frozen=True, kw_only=True)
class DifficultyOutputOptions:
    """Where it is written."""

    output: Annotated[Path, Flag(value="DIR")]
    """Folder that is written."""
    overwrite: bool = False
    """Replace what is already there."""


@dataclass(frozen=True, kw_only=True)
class DifficultyLabelOptions(DifficultyOutputOptions):
    """Join the outputs of `sov-data synth answers`, one for each configuration of models, and of
    `sov-data synth comparisons`, into labels of `sov-data scorer train --kind regressor`."""

    answers: Annotated[tuple[Path, ...], Flag(value="DIR", many=True)]
    """Output of `synth answers`, or its kept.jsonl; the folder's name is the configuration's."""
    comparisons: Annotated[tuple[Path, ...], Flag(value="DIR", many=True)] = ()
    """Output of `synth comparisons`, or its kept.jsonl."""


@dataclass(frozen=True, kw_only=True)
class DifficultyGradeOptions(DifficultyOutputOptions):
    """Write `pass_rate`, `difficulty` (1 - pass_rate) and `bucket` (hard, middle, easy) into rows of
    problems, prompts or chats, and leave out those beyond a band."""

    input: Annotated[tuple[Path, ...], Flag(value="FILE", many=True)]
    """A .jsonl file; several may follow, and it may be repeated."""
    model: Annotated[Path | None, Flag(value="DIR")] = None
    """Regressor that `sov-data scorer train` fitted to labels of `difficulty label`."""
    labels: Annotated[Path | None, Flag(value="DIR")] = None
    """Output of `difficulty label`: its problems are graded as measured."""
    cuts: Annotated[str, Flag(value="LOW:HIGH")] = "0.2:0.8"
    """Pass rates below LOW are hard, from HIGH on easy."""
    keep: Annotated[str, Flag(value="LOW:HIGH")] = "0:1"
    """Write rows with pass rates from LOW to HIGH alone."""


@dataclass
class LabelledProblem:
    """A problem with the right answers and all answers of each configuration of models."""

    id: str
    text: str
    answers: dict[str, tuple[int, int]] = field(default_factory=dict)
    easier_and_harder: list[int] = field(default_factory=lambda: [0, 0])
    """Number of pairs in which the judge takes it for the easier, and for the harder problem."""

    @property
    def pass_rate(self) -> float:
        """Mean share of right answers over the configurations."""
        return sum(right / count for right, count in self.answers.values()) / len(self.answers)

    def row(self) -> dict[str, Any]:
        """Return the label; a pair of the judge counts like one answer, right of the easier problem."""
        num_answers = sum(count for _, count in self.answers.values())
        easier, harder = self.easier_and_harder
        rate = (self.pass_rate * num_answers + easier) / (num_answers + easier + harder)
        return {"text": with_form(self.text), "label": HARDEST * (1.0 - rate), "id": self.id,
                "problem": self.text, "pass_rate": self.pass_rate,
                "answers": {name: list(counts) for name, counts in self.answers.items()}}


def with_form(text: str) -> str:
    """Append words for the form of a problem: a scorer sees n-grams, and no number twice."""
    numbers = _NUMBER.findall(text)
    counts = {"numbers": len(numbers), "digits": max(map(len, numbers), default=0),
              "alldigits": sum(map(len, numbers)), "operators": len(_OPERATOR.findall(text)),
              "length": len(text).bit_length()}
    # a word for each level up to the count: a linear model of them is any step function of the count
    return " ".join([text, *(f"form_{name}_{level}" for name, count in counts.items()
                             for level in range(1, min(count, MAX_LEVEL) + 1))])


def _label(args: DifficultyLabelOptions) -> int:
    check_output_folder(args.output, KIND, args.overwrite)
    problems: dict[str, LabelledProblem] = {}
    names = _names(args.answers)
    for name, path in zip(names, args.answers, strict=True):
        _read_answers(_file(path), name, problems)
    num_pairs, num_told, num_agreeing = 0, 0, 0
    for easier, harder in (pair for path in args.comparisons for pair in _read_pairs(_file(path), problems)):
        problems[easier].easier_and_harder[0] += 1
        problems[harder].easier_and_harder[1] += 1
        lead = problems[easier].pass_rate - problems[harder].pass_rate
        num_pairs, num_told, num_agreeing = num_pairs + 1, num_told + (lead != 0), num_agreeing + (lead > 0)
    content: dict[str, Any] = {"num_problems": len(problems), "num_pairs": num_pairs,
               "configurations": {name: _figures(name, problems) for name in names},
               "judge_agrees": num_agreeing / num_told if num_told else None}
    with create_artifact(args.output, KIND, overwrite=args.overwrite) as artifact:
        with open(artifact.path / LABELS, "w", encoding="utf-8") as out:
            out.writelines(json.dumps(one.row(), ensure_ascii=False) + "\n" for one in problems.values())
        artifact.content = content
        artifact.settings = {"answers": list(args.answers), "comparisons": list(args.comparisons)}
    print(f"{len(problems):,} problems, {num_pairs:,} pairs")
    for name, row in content["configurations"].items():
        print(f"  {name}: {row['num_problems']:,} problems, {row['pass_rate']:.1%} of answers right, "
              f"{row['solves_none']:,} never, {row['solves_all']:,} always solved")
    if num_told:
        print(f"  the judge agrees with the pass rates on {num_agreeing / num_told:.1%} of {num_told:,} "
              "pairs")
    print(f"wrote {args.output}; sov-data scorer train --labels {args.output / LABELS} --kind regressor ...")
    return 0


def _file(path: Path) -> Path:
    return path / KEPT if path.is_dir() else path


def _names(paths: Sequence[Path]) -> list[str]:
    # the name of the folder of a file kept.jsonl: all such files have that name
    names = [path.name if path.is_dir() or path.name != KEPT else path.absolute().parent.name
             for path in paths]
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"--answers: {count} configurations are called {name}; give their folders names "
                            "of their own")
    return names


def _read_answers(file: Path, name: str, problems: dict[str, LabelledProblem]) -> None:
    for where, row in read_objects(file):
        id_, text, right, count = (row.get(key) for key in ("problem_id", "prompt", "num_right",
                                                            "num_answers"))
        # `type`, since a bool is an int
        if not (isinstance(id_, str) and isinstance(text, str) and type(right) is int and type(count) is int
                and 0 <= right <= count > 0):
            raise UserError(f"{where}: is no measurement of `sov-data synth answers` (problem_id, prompt, "
                            "num_right, num_answers); name its folder, or its kept.jsonl")
        problem = problems.setdefault(id_, LabelledProblem(id_, text))
        if problem.text != text:
            raise UserError(f"{where}: problem {id_} has another text than in the files before; have all "
                            "configurations answer the same problems")
        if name in problem.answers:
            raise UserError(f"{where}: problem {id_} stands twice in {file}; remove one of the lines")
        problem.answers[name] = (right, count)
    if not any(name in problem.answers for problem in problems.values()):
        raise UserError(f"{file}: has no measurements; run `sov-data synth answers` to its end")


def _read_pairs(file: Path, problems: Mapping[str, LabelledProblem]) -> Iterator[tuple[str, str]]:
    num_found = 0
    for where, row in read_objects(file):
        easier, harder = row.get("easier"), row.get("harder")
        if not isinstance(easier, str) or not isinstance(harder, str) or easier == harder:
            raise UserError(f"{where}: is no pair of `sov-data synth comparisons` (easier, harder); name its "
                            "folder, or its kept.jsonl")
        if easier in problems and harder in problems:
            num_found += 1
            yield easier, harder
    if not num_found:
        raise UserError(f"{file}: no pair is of problems that were answered; compare the same problems")


def _figures(name: str, problems: Mapping[str, LabelledProblem]) -> dict[str, Any]:
    counts = [problem.answers[name] for problem in problems.values() if name in problem.answers]
    rates = [right / count for right, count in counts]
    return {"num_problems": len(rates), "pass_rate": sum(rates) / len(rates),
            "solves_none": rates.count(0.0), "solves_all": rates.count(1.0)}


def _grade(args: DifficultyGradeOptions) -> int:
    cuts, keep = _band("--cuts", args.cuts), _band("--keep", args.keep)
    _check_grading(args)
    grader = _Grader.load(args.model, args.labels)
    counts: dict[str, Counter[str]] = {bucket: Counter() for bucket in BUCKETS}
    with create_artifact(args.output, GRADED, overwrite=args.overwrite) as artifact:
        for file in args.input:
            with open(artifact.path / file.name, "w", encoding="utf-8") as out:
                for where, row in read_objects(file):
                    rate, source = grader.pass_rate(row, where)
                    bucket, is_kept = BUCKETS[bisect_right(cuts, rate)], keep[0] <= rate <= keep[1]
                    counts[bucket].update(["kept" if is_kept else "left_out", source])
                    if is_kept:
                        out.write(json.dumps({**row, "pass_rate": rate, "difficulty": 1.0 - rate,
                                              "difficulty_from": source, "bucket": bucket},
                                             ensure_ascii=False) + "\n")
        num_kept = sum(count["kept"] for count in counts.values())
        if not num_kept:  # an empty artifact is never published
            raise UserError(f"--keep {args.keep}: no row is in this band; widen it, or look at the pass "
                            "rates without it")
        for path in filter(None, (args.model, args.labels)):
            artifact.add_input(path)
        artifact.settings = {"cuts": list(cuts), "keep": list(keep), "inputs": list(args.input)}
        artifact.content = {"buckets": {bucket: dict(count) for bucket, count in counts.items()},
                            "num_kept": num_kept}
    for bucket, count in counts.items():
        print(f"  {bucket}: {count['kept'] + count['left_out']:,} rows, {count['kept']:,} kept")
    print(f"  kept band of pass rates: {keep[0]:g} to {keep[1]:g}, {num_kept:,} rows\nwrote {args.output}")
    return 0


def _band(option: str, text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    try:
        found = float(low), float(high)
    except ValueError:
        raise UserError(f"{option} {text!r} must have the form LOW:HIGH, e.g. 0.2:0.8") from None
    if not 0 <= found[0] <= found[1] <= 1:
        raise UserError(f"{option} {text}: must be two shares from 0 to 1, the lower one first")
    return found


def _check_grading(args: DifficultyGradeOptions) -> None:
    if args.model is None and args.labels is None:
        raise UserError("difficulty grade: names neither --model nor --labels; give one of them")
    for name, count in Counter(file.name for file in args.input).items():
        if count > 1:
            raise UserError(f"--input {name}: {count} files bear this name, and the output has a file for "
                            "each; rename them")
    for file in args.input:
        if file.suffix != ".jsonl":
            raise UserError(f"--input {file}: must be a .jsonl file")
    check_output_folder(args.output, GRADED, args.overwrite)


@dataclass(frozen=True)
class _Grader:
    """Tells pass rates: those that were measured first."""

    scorer: Any
    measured: Mapping[str, float]

    @classmethod
    def load(cls, model: Path | None, labels: Path | None) -> _Grader:
        scorer = None
        if model is not None:
            from data_prep.curate.scoring.scorer import find_scorer_problems, load_scorer

            if problems := find_scorer_problems("--model", model, "regressor"):
                raise UserError(str(problems[0]))
            scorer = load_scorer(model)
        measured: dict[str, float] = {}
        if labels is not None:
            read_manifest(labels, KIND)
            if damage := find_damaged_files(labels):
                raise UserError(f"{labels}: {damage[0]}; write the labels again")
            measured = {row["problem"]: row["pass_rate"] for _, row in read_objects(labels / LABELS)}
        return cls(scorer, measured)

    def pass_rate(self, row: Mapping[str, Any], where: str) -> tuple[float, str]:
        """Return the pass rate of a row's problem, and whether it was measured or is expected."""
        text = problem_text(row)
        if text is None:
            raise UserError(f"{where}: has a problem in none of the fields {', '.join(TEXT_FIELDS)} (fields: "
                            f"{', '.join(row) or 'none'}); add one")
        if text in self.measured:
            return self.measured[text], "measured"
        if self.scorer is None:
            raise UserError(f"{where}: its problem was not measured; give a scorer with --model")
        return 1.0 - self.scorer.score(with_form(text)) / HARDEST, "expected"


DIFFICULTY = ActionGroup({"label": DeclaredCommand(DifficultyLabelOptions, _label),
                          "grade": DeclaredCommand(DifficultyGradeOptions, _grade)},
                         "Label problems by models that answered them, and grade problems by a scorer.")
