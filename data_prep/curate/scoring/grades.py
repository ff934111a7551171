"""Steps `quality` and `education`: a score from a scorer of one's own, and perhaps a bar below which a
document is dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data_prep.curate.pipeline.step import ColumnType, Doc, Step, StepOutcome, View
from data_prep.curate.scoring.labels import HIGHEST, Kind
from data_prep.curate.scoring.scorer import Scorer, load_scorer, scorer_files, scorer_problems
from megatron_sov.base.settings import NotNegative, ProblemCode, SettingsProblem


@dataclass(frozen=True)
class GradeSettings:
    """Settings of both steps."""

    model: Path
    """Folder that `sov-data scorer train` wrote."""
    min_score: NotNegative | None = None
    """Documents with a lower score are dropped; without it all are kept."""

    wanted: ClassVar[Kind]
    """What the model has to be."""

    def problems(self) -> list[SettingsProblem]:
        """Return what does not fit together."""
        p = scorer_problems("model", self.model, self.wanted)
        highest = HIGHEST[self.wanted]
        if self.min_score is not None and self.min_score > highest:
            p.append(SettingsProblem(ProblemCode.RULE, "min_score",
                                     f"must be at most {highest}, the highest score of a "
                                     f"{self.wanted}", self.min_score))
        return p


@dataclass(frozen=True)
class QualitySettings(GradeSettings):
    """Settings of `quality`."""

    wanted: ClassVar[Kind] = "classifier"


@dataclass(frozen=True)
class EducationSettings(GradeSettings):
    """Settings of `education`."""

    wanted: ClassVar[Kind] = "regressor"


class _Grade(Step):
    """A column of scores, named like the step."""

    def __init__(self, settings: GradeSettings) -> None:
        super().__init__(settings)
        self._scorer: Scorer | None = None

    def files(self) -> Sequence[Path]:
        """Return what decides the model's scores."""
        return scorer_files(Path(self.settings.model))

    def start(self, view: View) -> None:
        """Load the model."""
        self._scorer = load_scorer(Path(self.settings.model))

    def outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        """Return the score of each document."""
        assert self._scorer is not None, "outcomes before start"
        lowest = self.settings.min_score
        found = []
        for document in documents:
            score = self._scorer.score(document.text)
            low = lowest is not None and score < lowest
            found.append(StepOutcome(f"{self.kind} below {lowest:g}" if low else "",
                                     values={self.kind: score}))
        return found


class Quality(_Grade):
    """The probability that a team's own reader would keep a document."""

    kind: ClassVar[str] = "quality"
    adds: ClassVar[Mapping[str, ColumnType]] = {"quality": "float32"}
    Settings = QualitySettings


class Education(_Grade):
    """How much a document teaches, from 0 to 5 (FineWeb-Edu, arXiv 2406.17557, section 4)."""

    kind: ClassVar[str] = "education"
    adds: ClassVar[Mapping[str, ColumnType]] = {"education": "float32"}
    Settings = EducationSettings
