"""Difficulty written into rows: of an estimator, or as it was measured; and the band that is kept."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from data_prep.json_lines import read_objects
from data_prep.synth.difficulty.estimator import Estimator, load_estimator
from data_prep.synth.difficulty.labels import read_labels
from data_prep.synth.problems import TEXT_FIELDS, problem_text
from megatron_sov.artifacts import new_artifact, refuse_existing
from megatron_sov.errors import UserError
from megatron_sov.settings import (
    RISING,
    SettingsError,
    Share,
    as_problem,
    name_options,
    problems_of,
)

KIND = "corpus"
BUCKETS = ("hard", "middle", "easy")
FIELDS = ("pass_rate", "difficulty", "difficulty_from", "bucket")
"""What a row is given; what it has of these is replaced."""


@dataclass(frozen=True)
class GradeSettings:
    """Settings of `difficulty grade`."""

    cuts: Annotated[tuple[Share, Share], RISING] = (0.2, 0.8)
    """A pass rate below the first is hard, from the second on easy, and between them middle."""
    keep: Annotated[tuple[Share, Share], RISING] = (0.0, 1.0)
    """Rows whose pass rate is from the first to the second are written, both included."""

    def bucket(self, pass_rate: float) -> str:
        """Return the bucket of a pass rate."""
        return BUCKETS[sum(pass_rate >= cut for cut in self.cuts)]


def grade(files: Sequence[Path], output: Path, settings: GradeSettings, model: Path | None,
          labels: Path | None, *, overwrite: bool = False) -> dict[str, Any]:
    """Write an artifact of kind "corpus" with a file for each input, its rows graded; returns its content.

    Args:
        files: of JSON lines, each with a name of its own.
        output: the artifact.
        settings: buckets and band.
        model: the estimator; None: only what was measured can be graded.
        labels: of problems whose pass rates were measured; these go before what the estimator expects.
        overwrite: replace a corpus that is already there.

    Raises:
        UserError: a setting breaks a rule, or a row has no problem, or one that nothing is known of.
    """
    problems = name_options(problems_of(settings)) + list(map(as_problem, _names(files)))
    if model is None and labels is None:
        problems.append(as_problem("names neither --model nor --labels; give one of them"))
    if problems:
        raise SettingsError("difficulty grade", problems)
    refuse_existing(output, KIND, overwrite)
    estimator = load_estimator(model) if model is not None else None
    measured = {p.text: p.pass_rate for p in read_labels(labels).problems.values()} if labels else {}
    counts: dict[str, Counter[str]] = {bucket: Counter() for bucket in BUCKETS}
    with new_artifact(output, KIND, overwrite=overwrite) as artifact:
        for file in files:
            with open(artifact.path / file.name, "w", encoding="utf-8") as out:
                for where, row in tqdm(read_objects(file), desc=file.name, unit=" rows", disable=None):
                    found = _graded(row, where, settings, estimator, measured)
                    is_kept = settings.keep[0] <= found["pass_rate"] <= settings.keep[1]
                    counts[found["bucket"]].update(["kept" if is_kept else "left_out",
                                                    found["difficulty_from"]])
                    if is_kept:
                        out.write(json.dumps(found, ensure_ascii=False) + "\n")
        for path in (model, labels):
            if path is not None:
                artifact.add_input(path)
        num_kept = sum(count["kept"] for count in counts.values())
        if not num_kept:
            raise UserError(f"--keep {settings.keep[0]:g}:{settings.keep[1]:g}: no row is in this band; "
                            "widen it, or look at the pass rates without it")
        artifact.settings = {**vars(settings), "inputs": list(files)}
        artifact.content = {"buckets": {bucket: dict(count) for bucket, count in counts.items()},
                            "num_kept": num_kept, "keep": list(settings.keep)}
    return artifact.content


def _names(files: Sequence[Path]) -> list[str]:
    return [f"--input {name}: {count} files bear this name, and the output has a file for each; rename them"
            for name, count in Counter(file.name for file in files).items() if count > 1] + [
            f"--input {file}: must be a .jsonl file" for file in files if file.suffix != ".jsonl"]


def _graded(row: Mapping[str, Any], where: str, settings: GradeSettings, estimator: Estimator | None,
            measured: Mapping[str, float]) -> dict[str, Any]:
    text = problem_text(row)
    if text is None:
        raise UserError(f"{where}: has a problem in none of the fields {', '.join(TEXT_FIELDS)} (fields: "
                        f"{', '.join(row) or 'none'}); add one")
    source = "measured" if text in measured else "expected"
    if source == "expected" and estimator is None:
        raise UserError(f"{where}: its problem was not measured; give an estimator with --model")
    rate = measured[text] if source == "measured" else estimator.pass_rate(text) if estimator else math.nan
    return {**row, "pass_rate": rate, "difficulty": 1.0 - rate, "difficulty_from": source,
            "bucket": settings.bucket(rate)}
