"""Labels of difficulty: how often each configuration of models solves a problem, and which of two problems a
judge takes for the harder one.

An artifact of kind "difficulty_labels": `problems.jsonl` (id, problem, for each configuration right and all
answers, and the mean of the rates) and `pairs.jsonl` (easier, harder); its manifest says what agrees.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from data_prep.json_lines import read_objects
from megatron_sov.base.artifacts import damaged_files, new_artifact, read_manifest, refuse_existing
from megatron_sov.base.errors import UserError

KIND = "difficulty_labels"
PROBLEMS, PAIRS = "problems.jsonl", "pairs.jsonl"
KEPT = "kept.jsonl"


@dataclass
class LabelledProblem:
    """A problem and what is known of it."""

    id: str
    """As the measurements have it."""
    text: str
    """What was asked."""
    answers: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Configuration -> right answers, answers."""

    @property
    def pass_rate(self) -> float:
        """Return the mean of the configurations' shares of right answers."""
        return fmean(right / count for right, count in self.answers.values())

    @property
    def num_answers(self) -> int:
        return sum(count for _, count in self.answers.values())

    def row(self) -> dict[str, Any]:
        return {"id": self.id, "problem": self.text, "pass_rate": self.pass_rate,
                "answers": {name: list(counts) for name, counts in self.answers.items()}}


@dataclass(frozen=True)
class DifficultyLabels:
    """What an estimator is fitted to."""

    problems: dict[str, LabelledProblem]
    """Id -> problem, in the order in which they came."""
    pairs: list[tuple[str, str]]
    """Ids of the easier and the harder problem of each pair."""


def write_labels(answers: Sequence[Path], comparisons: Sequence[Path], output: Path, *,
                 overwrite: bool = False) -> dict[str, Any]:
    """Put the outputs of `synth answers` and `synth comparisons` together; returns the manifest's content.

    Args:
        answers: folders, or their `kept.jsonl`, each of one configuration.
        comparisons: folders, or their `kept.jsonl`.
        output: the artifact.
        overwrite: replace labels that are already there.

    Raises:
        UserError: a file is none of these, two configurations bear one name, or one id means two problems.
    """
    refuse_existing(output, KIND, overwrite)
    problems: dict[str, LabelledProblem] = {}
    names = _names(answers)
    for name, path in zip(names, answers, strict=True):
        _read_answers(_file(path), name, problems)
    pairs = [pair for path in comparisons for pair in _read_pairs(_file(path), problems)]
    content = _content(names, problems, pairs)
    with new_artifact(output, KIND, overwrite=overwrite) as artifact:
        _write(artifact.path / PROBLEMS, (problem.row() for problem in problems.values()))
        _write(artifact.path / PAIRS, ({"easier": easier, "harder": harder} for easier, harder in pairs))
        artifact.content = content
        artifact.settings = {"answers": list(answers), "comparisons": list(comparisons)}
    return content


def read_labels(folder: Path) -> DifficultyLabels:
    """Return the labels of an artifact.

    Raises:
        UserError: it is none, or damaged.
    """
    read_manifest(folder, KIND)
    if damage := damaged_files(folder):
        raise UserError(f"{folder}: {damage[0]}; write the labels again")
    problems: dict[str, LabelledProblem] = {}
    try:
        for _, row in read_objects(folder / PROBLEMS):
            counts = {str(name): (int(right), int(count)) for name, (right, count) in row["answers"].items()}
            if not counts or not all(0 <= right <= count > 0 for right, count in counts.values()):
                raise ValueError(f"answers = {row['answers']}")
            problems[str(row["id"])] = LabelledProblem(str(row["id"]), str(row["problem"]), counts)
        pairs = [(str(row["easier"]), str(row["harder"])) for _, row in read_objects(folder / PAIRS)]
        if lacking := {id_ for pair in pairs for id_ in pair} - set(problems):
            raise ValueError(f"pairs name {min(lacking)}")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{folder}: is damaged ({e!r:.200}); write the labels again") from None
    return DifficultyLabels(problems, pairs)


def _file(path: Path) -> Path:
    return path / KEPT if path.is_dir() else path


def _names(paths: Sequence[Path]) -> list[str]:
    # of a file kept.jsonl the name of its folder: that file is called so everywhere
    names = [path.name if path.is_dir() or path.name != KEPT else path.absolute().parent.name
             for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--answers: {names.count(name)} configurations are called {name}; give their "
                            "folders names of their own")
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


def _read_pairs(file: Path, problems: Mapping[str, LabelledProblem]) -> list[tuple[str, str]]:
    found = []
    for where, row in read_objects(file):
        easier, harder = row.get("easier"), row.get("harder")
        if not isinstance(easier, str) or not isinstance(harder, str) or easier == harder:
            raise UserError(f"{where}: is no pair of `sov-data synth comparisons` (easier, harder); name its "
                            "folder, or its kept.jsonl")
        # a pair says nothing of problems without a pass rate
        if easier in problems and harder in problems:
            found.append((easier, harder))
    if not found:
        raise UserError(f"{file}: no pair is of problems that were answered; compare the same problems")
    return found


def _content(names: Sequence[str], problems: Mapping[str, LabelledProblem], pairs: Sequence[tuple[str, str]]
             ) -> dict[str, Any]:
    told = [(problems[easier].pass_rate, problems[harder].pass_rate) for easier, harder in pairs]
    # pairs of equal rates can neither confirm the judge nor contradict it
    differ = [(easier, harder) for easier, harder in told if easier != harder]
    configurations: dict[str, dict[str, float]] = {}
    for name in names:
        rates = _rates(problems, name)
        configurations[name] = {"num_problems": len(rates), "pass_rate": fmean(rates),
                                "solves_none": rates.count(0.0), "solves_all": rates.count(1.0)}
    return {
        "num_problems": len(problems), "num_pairs": len(pairs), "configurations": configurations,
        "agreement": [{"between": [one, other], "spearman": _spearman(problems, one, other)}
                      for one, other in combinations(names, 2)],
        "judge": {"num_pairs": len(differ),
                  "agrees_with_pass_rates": fmean(easier > harder for easier, harder in differ)
                  if differ else None}}


def _rates(problems: Mapping[str, LabelledProblem], name: str) -> list[float]:
    counts = [problem.answers[name] for problem in problems.values() if name in problem.answers]
    return [right / count for right, count in counts]


def _spearman(problems: Mapping[str, LabelledProblem], one: str, other: str) -> float | None:
    from scipy.stats import spearmanr

    both = [(p.answers[one], p.answers[other]) for p in problems.values()
            if one in p.answers and other in p.answers]
    first = [right / count for (right, count), _ in both]
    second = [right / count for _, (right, count) in both]
    # a rank correlation needs two ranks on both sides
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


def _write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with open(file, "w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
