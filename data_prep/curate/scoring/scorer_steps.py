"""Steps that apply scorers: `quality` and `education` add a score, `kind` the tag that blends select by.

The step `kind` applies the first rule that fits:

1. the source's `kind` in the pipeline file, unless it is `auto`; 2. `math_code`: the column `form` is code or
markup, or the text is dense with formulas; 3. `domain:NAME`: the domain's classifier gives the highest score,
at least `min_score`; 4. the language: `en`, `ko`, `ja`, or `multilingual`; 5. "": the language is unknown.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from data_prep.curate.pipeline.step import Doc, Step, StepOutcome, View
from data_prep.curate.scoring.labels import HIGHEST_LABELS, Kind
from data_prep.curate.scoring.scorer import Scorer, find_scorer_problems, list_scorer_files, load_scorer
from megatron_sov.base.settings import (
    AboveZero, AtLeastOne, NotNegative, ProblemCode, SettingsProblem, Share, require_that)

AUTO = "auto"
MATH_CODE, MULTILINGUAL = "math_code", "multilingual"
LANGUAGE_KINDS = ("en", "ko", "ja")
"""Languages that are kinds; documents in other languages are `MULTILINGUAL`."""
MIN_FORMULAS = 3
"""Minimum formula signs in a text of mathematics, however short."""
_UNKNOWN_LANGUAGES = ("", "und")
_DOMAIN = re.compile(r"[a-z][a-z0-9_]{0,30}")
_FORMULA = re.compile(r"\\(?:frac|sum|int|sqrt|alpha|beta|theta|lambda|sigma|infty|mathbb|mathcal|mathrm"
                      r"|left|right|leq?|geq?|cdot|partial|begin\{(?:equation|align|pmatrix|cases))\b"
                      r"|\$\$|\\\(|\\\[|[∑∫√∂∇∈∀∃≤≥≠≈∞]")
DomainName = Annotated[str, require_that(
    _DOMAIN.fullmatch, "must be a name of small letters, digits and '_', e.g. law")]


@dataclass(frozen=True)
class ScoreSettings:
    """Settings for `quality` and `education`."""

    model: Path
    """Folder from `sov-data scorer train`."""
    min_score: NotNegative | None = None
    """Documents with a lower score are dropped; None keeps all documents."""

    scorer_kind: ClassVar[Kind]
    """Required kind of the model."""

    def problems(self) -> list[SettingsProblem]:
        problems = find_scorer_problems("model", self.model, self.scorer_kind)
        highest = HIGHEST_LABELS[self.scorer_kind]
        if self.min_score is not None and self.min_score > highest:
            problems.append(SettingsProblem(
                ProblemCode.RULE, "min_score",
                f"must be at most {highest}, the highest score of a {self.scorer_kind}", self.min_score))
        return problems


@dataclass(frozen=True)
class QualitySettings(ScoreSettings):
    scorer_kind = "classifier"


@dataclass(frozen=True)
class EducationSettings(ScoreSettings):
    scorer_kind = "regressor"


class _ScoreStep(Step):
    """Adds a column with scores, named after the step."""

    settings: ScoreSettings

    def list_libraries(self) -> Sequence[str]:
        return ("sklearn",)

    def list_files(self) -> Sequence[Path]:
        return list_scorer_files(self.settings.model)

    def load_inputs(self, view: View) -> None:
        self._scorer = load_scorer(self.settings.model)

    def judge_document(self, document: Doc) -> StepOutcome:
        score, lowest = self._scorer.score(document.text), self.settings.min_score
        is_low = lowest is not None and score < lowest
        return StepOutcome(f"{self.kind} below {lowest:g}" if is_low else "", values={self.kind: score})


class Quality(_ScoreStep):
    """Adds the probability that the team's labels call the document good."""

    kind = "quality"
    added_columns = {"quality": "float32"}
    Settings = QualitySettings


class Education(_ScoreStep):
    """Adds an educational score from 0 to 5 (FineWeb-Edu, arXiv 2406.17557, section 4)."""

    kind = "education"
    added_columns = {"education": "float32"}
    Settings = EducationSettings


@dataclass(frozen=True)
class KindSettings:
    """Settings for `kind`."""

    domains: dict[DomainName, Path] = field(default_factory=dict)
    """Domain -> folder of a classifier from `sov-data scorer train`; label 1 marks the domain's documents."""
    min_score: Share = 0.5
    """Minimum score for a domain."""
    min_formulas_per_1000_chars: AboveZero = 4.0
    """Minimum formula signs and commands in 1,000 characters of a text of mathematics."""
    code_forms: tuple[str, ...] = ("code", "markup")
    """Values of the column `form` that count as code."""
    max_chars: AtLeastOne = 20_000
    """Characters searched for formulas, from the start."""

    def problems(self) -> list[SettingsProblem]:
        return [problem for name, folder in self.domains.items()
                for problem in find_scorer_problems(f"domains.{name}", folder, "classifier")]


class DocumentKind(Step):
    """Adds the column `kind`."""

    kind = "kind"
    added_columns = {"kind": "string"}
    needed_columns = ("language",)
    Settings = KindSettings
    settings: KindSettings

    def list_libraries(self) -> Sequence[str]:
        return ("sklearn",) if self.settings.domains else ()

    def list_files(self) -> Sequence[Path]:
        return [file for _, folder in sorted(self.settings.domains.items())
                for file in list_scorer_files(folder)]

    def load_inputs(self, view: View) -> None:
        self._scorers: dict[str, Scorer] = {
            name: load_scorer(folder) for name, folder in sorted(self.settings.domains.items())}

    def judge_document(self, document: Doc) -> StepOutcome:
        return StepOutcome(values={"kind": self._choose_kind(document)})

    def _choose_kind(self, document: Doc) -> str:
        # The pipeline file is more reliable than a model's guess.
        source_kind = document.columns.get("kind") or ""
        if source_kind not in ("", AUTO):
            return str(source_kind)
        text = document.text[:self.settings.max_chars]
        if document.columns.get("form") in self.settings.code_forms or self._is_mathematics(text):
            return MATH_CODE
        if domain := self._find_domain(document.text):
            return f"domain:{domain}"
        language = document.columns.get("language") or ""
        if language in _UNKNOWN_LANGUAGES:
            return ""
        return language if language in LANGUAGE_KINDS else MULTILINGUAL

    def _is_mathematics(self, text: str) -> bool:
        min_formulas = self.settings.min_formulas_per_1000_chars * len(text) / 1000
        return len(text) > 0 and len(_FORMULA.findall(text)) >= max(min_formulas, MIN_FORMULAS)

    def _find_domain(self, text: str) -> str:
        """Return the domain with the highest score; "": all scores are below `min_score`."""
        scores = {name: scorer.score(text) for name, scorer in self._scorers.items()}
        best = max(scores, key=lambda name: scores[name], default="")
        return best if best and scores[best] >= self.settings.min_score else ""
