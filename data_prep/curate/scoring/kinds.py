"""Steps that write what a scorer says: `quality` and `education` a score, and perhaps a bar below which a
document is dropped; `kind` the tag that blends are written in (Solar Open's table has six of them).

The first rule for `kind` that speaks decides:

1. the source's own `kind`, where the pipeline file gives one other than `auto`;
2. `math_code`: the step `language` calls its form code or markup, or it is dense with formulas;
3. `domain:NAME`: a classifier of that domain gives at least `min_score`, the highest one of several;
4. its language: `en`, `ko`, `ja`, and `multilingual` for any other;
5. nothing, where the language is not known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from data_prep.curate.pipeline.step import ColumnType, Doc, Step, StepOutcome, View
from data_prep.curate.scoring.labels import HIGHEST_LABELS, Kind
from data_prep.curate.scoring.scorer import Scorer, find_scorer_problems, list_scorer_files, load_scorer
from megatron_sov.base.settings import (
    AboveZero, AtLeastOne, Bound, NotNegative, ProblemCode, SettingsProblem, Share)


@dataclass(frozen=True)
class ScoreStepSettings:
    """Settings of both steps."""

    model: Path
    """Folder that `sov-data scorer train` wrote."""
    min_score: NotNegative | None = None
    """Documents with a lower score are dropped; without it all are kept."""

    scorer_kind: ClassVar[Kind]
    """What the model has to be."""

    def problems(self) -> list[SettingsProblem]:
        p = find_scorer_problems("model", self.model, self.scorer_kind)
        highest = HIGHEST_LABELS[self.scorer_kind]
        if self.min_score is not None and self.min_score > highest:
            p.append(SettingsProblem(ProblemCode.RULE, "min_score",
                                     f"must be at most {highest}, the highest score of a "
                                     f"{self.scorer_kind}", self.min_score))
        return p


@dataclass(frozen=True)
class QualitySettings(ScoreStepSettings):
    """Settings of `quality`."""

    scorer_kind: ClassVar[Kind] = "classifier"


@dataclass(frozen=True)
class EducationSettings(ScoreStepSettings):
    """Settings of `education`."""

    scorer_kind: ClassVar[Kind] = "regressor"


class _Grade(Step):
    """A column of scores, named like the step."""

    def __init__(self, settings: ScoreStepSettings) -> None:
        super().__init__(settings)
        self._scorer: Scorer | None = None

    def list_files(self) -> Sequence[Path]:
        return list_scorer_files(Path(self.settings.model))

    def load_inputs(self, view: View) -> None:
        self._scorer = load_scorer(Path(self.settings.model))

    def compute_outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
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
    added_columns: ClassVar[Mapping[str, ColumnType]] = {"quality": "float32"}
    Settings = QualitySettings


class Education(_Grade):
    """How much a document teaches, from 0 to 5 (FineWeb-Edu, arXiv 2406.17557, section 4)."""

    kind: ClassVar[str] = "education"
    added_columns: ClassVar[Mapping[str, ColumnType]] = {"education": "float32"}
    Settings = EducationSettings


AUTO = "auto"
MATH_CODE, MULTILINGUAL = "math_code", "multilingual"
OWN_KINDS = ("en", "ko", "ja")
"""Languages that are kinds of their own."""
_UNKNOWN = ("", "und")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")
_FORMULA = re.compile(r"\\(?:frac|sum|int|sqrt|alpha|beta|theta|lambda|sigma|infty|mathbb|mathcal|mathrm"
                      r"|left|right|leq?|geq?|cdot|partial|begin\{(?:equation|align|pmatrix|cases))\b|\$\$|\\\(|\\\["
                      r"|[∑∫√∂∇∈∀∃≤≥≠≈∞]")
DomainName = Annotated[str, Bound(lambda name: None if _NAME.fullmatch(name) else (
    ProblemCode.BOUND, "must be a name of small letters, digits and '_', e.g. law", ""))]


@dataclass(frozen=True)
class KindSettings:
    """Settings of `kind`."""

    domains: dict[DomainName, Path] = field(default_factory=dict)
    """Domain -> folder of a classifier by `sov-data scorer train`, label 1 for documents of the domain."""
    min_score: Share = 0.5
    """Score from which a classifier's domain is taken."""
    min_formulas_per_1000_chars: AboveZero = 4.0
    """Signs and commands of formulas in 1,000 characters that make a document one of mathematics."""
    code_forms: tuple[str, ...] = ("code", "markup")
    """Values of the column `form` that are taken for code."""
    max_chars: AtLeastOne = 20_000
    """Characters of a document that are read, from its beginning."""

    def problems(self) -> list[SettingsProblem]:
        p = []
        for name, folder in self.domains.items():
            p += find_scorer_problems(f"domains.{name}", folder, "classifier")
        return p


class ScorerKind(Step):
    """A column of kinds."""

    kind: ClassVar[str] = "kind"
    added_columns: ClassVar[Mapping[str, ColumnType]] = {"kind": "string"}
    needed_columns: ClassVar[Sequence[str]] = ("language",)
    Settings = KindSettings

    def __init__(self, settings: KindSettings) -> None:
        super().__init__(settings)
        self._scorers: dict[str, Scorer] = {}

    def list_files(self) -> Sequence[Path]:
        """Return what decides the classifiers' scores."""
        return [file for _, folder in sorted(self.settings.domains.items())
                for file in list_scorer_files(Path(folder))]

    def load_inputs(self, view: View) -> None:
        self._scorers = {name: load_scorer(Path(folder))
                         for name, folder in sorted(self.settings.domains.items())}

    def compute_outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        return [StepOutcome(values={"kind": self._kind(document)}) for document in documents]

    def _kind(self, document: Doc) -> str:
        # What the pipeline file says of a source is better known than what a model guesses.
        own = document.columns.get("kind") or ""
        if own not in ("", AUTO):
            return str(own)
        language = document.columns.get("language") or ""
        text = document.text[: self.settings.max_chars]
        if document.columns.get("form") in self.settings.code_forms or self._is_mathematics(text):
            return MATH_CODE
        if domain := self._domain(document.text):
            return f"domain:{domain}"
        if language in _UNKNOWN:
            return ""
        return language if language in OWN_KINDS else MULTILINGUAL

    def _is_mathematics(self, text: str) -> bool:
        # At least three: in a short text one sign would be enough.
        wanted = self.settings.min_formulas_per_1000_chars * len(text) / 1000
        return len(text) > 0 and len(_FORMULA.findall(text)) >= max(wanted, 3)

    def _domain(self, text: str) -> str:
        scores = {name: scorer.score(text) for name, scorer in self._scorers.items()}
        best = max(scores, key=lambda name: scores[name], default="")
        return best if best and scores[best] >= self.settings.min_score else ""
