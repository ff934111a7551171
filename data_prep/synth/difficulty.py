"""`sov-data difficulty label|grade`: problem difficulty, measured by models or estimated by a scorer.

`label` joins answers of models (`sov-data synth answers`) and comparisons of a judge (`sov-data synth
comparisons`) into labels for `sov-data scorer train --kind regressor`: 0 for a problem that every answer
solves, 5 for an unsolved problem. `grade` writes measured or estimated pass rates into rows.
"""

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from data_prep.synth.readers.problems import get_problem_text
from data_prep.tags import CORPUS
from megatron_sov.base.artifacts import (
    check_output_folder, create_artifact, find_damaged_files, read_manifest)
from megatron_sov.base.documents.files import ACCEPTED_SAMPLES, check_lines_files, name_lines
from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.settings import ActionGroup, DeclaredCommand, Flag

KIND = "difficulty_labels"
LABELS = "labels.jsonl"
MAX_LABEL = 5.0
"""Label for an unsolved problem; regressors have labels from 0 to 5."""
BUCKETS = ("hard", "middle", "easy")
MAX_LEVEL = 24
"""Highest count in `append_form_words`."""
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_OPERATOR = re.compile(r"[-+*/^=<>×÷·≤≥≠∫∑√±%]|\\[A-Za-z]+")


@dataclass(frozen=True, kw_only=True)
class DifficultyOutputOptions:
    """Output options."""

    output: Annotated[Path, Flag(value="DIR")]
    """Output folder."""
    overwrite: bool = False
    """Replace an existing output."""


@dataclass(frozen=True, kw_only=True)
class DifficultyLabelOptions(DifficultyOutputOptions):
    """Join outputs from `sov-data synth answers`, one for each model configuration, and from `sov-data synth
    comparisons`, into labels for `sov-data scorer train --kind regressor`."""

    answers: Annotated[tuple[Path, ...], Flag(value="DIR", many=True)]
    """Output from `synth answers`, or its kept.jsonl; the folder name is the configuration name."""
    comparisons: Annotated[tuple[Path, ...], Flag(value="DIR", many=True)] = ()
    """Output from `synth comparisons`, or its kept.jsonl."""


@dataclass(frozen=True, kw_only=True)
class DifficultyGradeOptions(DifficultyOutputOptions):
    """Write `pass_rate`, `difficulty` (1 - pass_rate) and `bucket` (hard, middle, easy) into rows with
    problems, prompts or chats, and leave out rows outside a band."""

    input: Annotated[tuple[Path, ...], Flag(value="FILE", many=True)]
    """A file of JSON lines; several may follow, and the option may be repeated."""
    model: Annotated[Path | None, Flag(value="DIR")] = None
    """Regressor that `sov-data scorer train` fitted to labels from `difficulty label`."""
    labels: Annotated[Path | None, Flag(value="DIR")] = None
    """Output from `difficulty label`, for measured pass rates."""
    cuts: Annotated[str, Flag(value="LOW:HIGH")] = "0.2:0.8"
    """Pass rates below LOW are hard, from HIGH on easy."""
    keep: Annotated[str, Flag(value="LOW:HIGH")] = "0:1"
    """Write only rows with pass rates from LOW to HIGH."""


@dataclass
class LabelledProblem:
    """A problem with the measurements from each model configuration."""

    id: str
    text: str
    answers: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Configuration -> (right answers, all answers)."""
    num_easier: int = 0
    """Pairs that the judge ranked this problem easier in."""
    num_harder: int = 0

    @property
    def pass_rate(self) -> float:
        """Mean of `right / count` over the configurations."""
        return sum(right / count for right, count in self.answers.values()) / len(self.answers)

    def build_label(self) -> dict[str, Any]:
        """Build a row for `labels.jsonl`; a judged pair counts as an answer, right for the easier problem."""
        num_answers = sum(count for _, count in self.answers.values())
        num_right = self.pass_rate * num_answers + self.num_easier
        rate = num_right / (num_answers + self.num_easier + self.num_harder)
        return {"text": append_form_words(self.text), "label": MAX_LABEL * (1.0 - rate), "id": self.id,
                "problem": self.text, "pass_rate": self.pass_rate,
                "answers": {name: list(counts) for name, counts in self.answers.items()}}


def append_form_words(text: str) -> str:
    """Append words that describe a problem's form: a scorer sees n-grams, and few numbers twice."""
    numbers = _NUMBER.findall(text)
    counts = {"numbers": len(numbers), "digits": max(map(len, numbers), default=0),
              "alldigits": sum(map(len, numbers)), "operators": len(_OPERATOR.findall(text)),
              "length": len(text).bit_length()}
    # a word for each level up to the count: a linear model can express any step function of the count
    return " ".join([text, *(f"form_{name}_{level}" for name, count in counts.items()
                             for level in range(1, min(count, MAX_LEVEL) + 1))])


def write_labels(options: DifficultyLabelOptions) -> ExitCode:
    check_output_folder(options.output, KIND, options.overwrite)
    problems: dict[str, LabelledProblem] = {}
    names = _name_configurations(options.answers)
    for name, path in zip(names, options.answers, strict=True):
        _read_answers(_find_file(path), name, problems)
    pairs = [pair for path in options.comparisons for pair in _iter_pairs(_find_file(path), problems)]
    num_compared, num_agreeing = 0, 0
    for easier, harder in pairs:
        problems[easier].num_easier += 1
        problems[harder].num_harder += 1
        lead = problems[easier].pass_rate - problems[harder].pass_rate
        num_compared += lead != 0
        num_agreeing += lead > 0
    content: dict[str, Any] = {
        "num_problems": len(problems), "num_pairs": len(pairs),
        "configurations": {name: _summarize_configuration(name, problems) for name in names},
        "judge_agrees": num_agreeing / num_compared if num_compared else None}
    with create_artifact(options.output, KIND, overwrite=options.overwrite) as artifact:
        with open(artifact.path / LABELS, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(problem.build_label(), ensure_ascii=False) + "\n"
                            for problem in problems.values())
        artifact.content = content
        artifact.settings = {"answers": list(options.answers), "comparisons": list(options.comparisons)}
    print(f"{len(problems):,} problems, {len(pairs):,} pairs")
    for name, summary in content["configurations"].items():
        print(f"  {name}: {summary['num_problems']:,} problems, {summary['pass_rate']:.1%} of answers right, "
              f"{summary['solves_none']:,} never, {summary['solves_all']:,} always solved")
    if num_compared:
        print(f"  the judge agrees with the pass rates on {num_agreeing / num_compared:.1%} of "
              f"{num_compared:,} pairs")
    print(f"wrote {options.output}; sov-data scorer train --labels {options.output / LABELS} --kind "
          "regressor ...")
    return ExitCode.OK


def _find_file(path: Path) -> Path:
    return path / ACCEPTED_SAMPLES if path.is_dir() else path


def _name_configurations(paths: Sequence[Path]) -> list[str]:
    # all files are called kept.jsonl: use the folder's name
    names = [path.name if path.is_dir() or path.name != ACCEPTED_SAMPLES else path.absolute().parent.name
             for path in paths]
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"--answers: {count} configurations are called {name}; give their folders names "
                            "of their own")
    return names


def _read_answers(file: Path, name: str, problems: dict[str, LabelledProblem]) -> None:
    """Add measurements to `problems` as configuration `name`."""
    for place, record in read_records(file):
        problem_id, text, right, count = (record.get(key) for key in ("problem_id", "prompt", "num_right",
                                                                      "num_answers"))
        # `type`, because bool is an int
        if not (isinstance(problem_id, str) and isinstance(text, str) and type(right) is int
                and type(count) is int and 0 <= right <= count > 0):
            raise UserError(f"{place}: is no measurement of `sov-data synth answers` (problem_id, prompt, "
                            "num_right, num_answers); name its folder, or its kept.jsonl")
        problem = problems.setdefault(problem_id, LabelledProblem(problem_id, text))
        if problem.text != text:
            raise UserError(f"{place}: problem {problem_id} has another text than in the files before; have "
                            "all configurations answer the same problems")
        if name in problem.answers:
            raise UserError(f"{place}: problem {problem_id} stands twice in {file}; remove one of the lines")
        problem.answers[name] = (right, count)
    if not any(name in problem.answers for problem in problems.values()):
        raise UserError(f"{file}: has no measurements; run `sov-data synth answers` to its end")


def _iter_pairs(file: Path, problems: Mapping[str, LabelledProblem]) -> Iterator[tuple[str, str]]:
    """Yield the ids (easier, harder) for pairs of answered problems."""
    has_pairs = False
    for place, record in read_records(file):
        easier, harder = record.get("easier"), record.get("harder")
        if not isinstance(easier, str) or not isinstance(harder, str) or easier == harder:
            raise UserError(f"{place}: is no pair of `sov-data synth comparisons` (easier, harder); name its "
                            "folder, or its kept.jsonl")
        if easier in problems and harder in problems:
            has_pairs = True
            yield easier, harder
    if not has_pairs:
        raise UserError(f"{file}: no pair is of problems that were answered; compare the same problems")


def _summarize_configuration(name: str, problems: Mapping[str, LabelledProblem]) -> dict[str, Any]:
    counts = [problem.answers[name] for problem in problems.values() if name in problem.answers]
    rates = [right / count for right, count in counts]
    return {"num_problems": len(rates), "pass_rate": sum(rates) / len(rates),
            "solves_none": rates.count(0.0), "solves_all": rates.count(1.0)}


def grade_rows(options: DifficultyGradeOptions) -> ExitCode:
    cuts, keep = _parse_band("--cuts", options.cuts), _parse_band("--keep", options.keep)
    _check_grading(options)
    scorer = _load_scorer(options.model) if options.model else None
    measured = _read_measured_rates(options.labels) if options.labels else {}
    counts: dict[str, Counter[str]] = {bucket: Counter() for bucket in BUCKETS}
    with create_artifact(options.output, CORPUS, overwrite=options.overwrite) as artifact:
        for path in options.input:
            with open(artifact.path / name_lines(path), "w", encoding="utf-8") as file:
                for place, record in read_records(path):
                    rate, origin = _estimate_pass_rate(record, place, scorer, measured)
                    bucket, is_kept = BUCKETS[bisect_right(cuts, rate)], keep[0] <= rate <= keep[1]
                    counts[bucket].update(["kept" if is_kept else "left_out", origin])
                    if is_kept:
                        row = {**record, "pass_rate": rate, "difficulty": 1.0 - rate,
                               "difficulty_from": origin, "bucket": bucket}
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        num_kept = sum(count["kept"] for count in counts.values())
        if not num_kept:  # an empty artifact is never published
            raise UserError(f"--keep {options.keep}: no row is in this band; widen it, or look at the pass "
                            "rates without it")
        for folder in filter(None, (options.model, options.labels)):
            artifact.add_input(folder)
        artifact.settings = {"cuts": list(cuts), "keep": list(keep), "inputs": list(options.input)}
        artifact.content = {"buckets": {bucket: dict(count) for bucket, count in counts.items()},
                            "num_kept": num_kept}
    for bucket, count in counts.items():
        print(f"  {bucket}: {count['kept'] + count['left_out']:,} rows, {count['kept']:,} kept")
    print(f"  kept band of pass rates: {keep[0]:g} to {keep[1]:g}, {num_kept:,} rows\nwrote {options.output}")
    return ExitCode.OK


def _parse_band(option: str, text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    try:
        band = float(low), float(high)
    except ValueError:
        raise UserError(f"{option} {text!r} must have the form LOW:HIGH, e.g. 0.2:0.8") from None
    if not 0 <= band[0] <= band[1] <= 1:
        raise UserError(f"{option} {text}: must be two shares from 0 to 1, the lower one first")
    return band


def _check_grading(options: DifficultyGradeOptions) -> None:
    if options.model is None and options.labels is None:
        raise UserError("difficulty grade: names neither --model nor --labels; give one of them")
    check_lines_files(options.input)
    check_output_folder(options.output, CORPUS, options.overwrite)


def _load_scorer(model: Path) -> Any:
    from data_prep.curate.scoring.scorer import find_scorer_problems, load_scorer  # numpy: not for --help

    if problems := find_scorer_problems("--model", model, "regressor"):
        raise UserError(str(problems[0]))
    return load_scorer(model)


def _read_measured_rates(labels: Path) -> dict[str, float]:
    """Return problem -> measured pass rate."""
    read_manifest(labels, KIND)
    if damage := find_damaged_files(labels):
        raise UserError(f"{labels}: {damage[0]}; write the labels again")
    return {row["problem"]: row["pass_rate"] for _, row in read_records(labels / LABELS)}


def _estimate_pass_rate(record: Mapping[str, Any], place: str, scorer: Any, measured: Mapping[str, float]
                        ) -> tuple[float, str]:
    """Return a problem's pass rate, and "measured" or "expected"."""
    text = get_problem_text(record, place)
    if text in measured:
        return measured[text], "measured"
    if scorer is None:
        raise UserError(f"{place}: its problem was not measured; give a scorer with --model")
    return 1.0 - scorer.score(append_form_words(text)) / MAX_LABEL, "expected"


DIFFICULTY = ActionGroup({"label": DeclaredCommand(DifficultyLabelOptions, write_labels),
                          "grade": DeclaredCommand(DifficultyGradeOptions, grade_rows)},
                         "Label problems by models that answered them, and grade problems by a scorer.")
