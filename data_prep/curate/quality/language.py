"""The step `language`: which language a document is in, and whether it is prose, code or markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import MinLen

from data_prep.curate.pipeline.step import ColumnType, Doc, Step, StepOutcome
from data_prep.curate.quality.identify import (
    FORMS, KNOWN, UNKNOWN, Form, form_of, identify, language_part, model_file)
from data_prep.libraries import require
from megatron_sov.base.settings import SettingsProblem, Share, as_problem, one_of


@dataclass(frozen=True)
class LanguageSettings:
    """What the step `language` keeps."""

    keep: tuple[Annotated[str, one_of(lambda: KNOWN)], ...] = ()
    """Languages that stay, as ISO 639-1 codes such as ko, en; none: all of them."""
    min_score: Share = 0.5
    """Below this score the language of a document is not sure enough to stay."""
    forms: Annotated[tuple[Form, ...], MinLen(1)] = FORMS
    """Forms that stay: prose, code, markup.  Code stays whatever language its comments are in."""

    def problems(self) -> list[SettingsProblem]:
        """Return what does not fit together."""
        return list(map(as_problem, require("the step language", "py3langid")))


class Language(Step):
    """Adds the language of each document, how sure it is, and its form."""

    kind = "language"
    adds: ClassVar[dict[str, ColumnType]] = {
        "language": "string", "language_score": "float32", "form": "string"}
    Settings = LanguageSettings
    settings: LanguageSettings

    def files(self) -> Sequence[Path]:
        """Return the model, so that another one is another step."""
        return [model_file()]

    def outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        """Return each document with its language and form, or why it does not stay."""
        return [self._outcome(document.text) for document in documents]

    def _outcome(self, text: str) -> StepOutcome:
        form = form_of(text)
        language, score = identify(language_part(text, form))
        values = {"language": language, "language_score": score, "form": form}
        return StepOutcome(reason=self._reason(language, score, form), values=values)

    def _reason(self, language: str, score: float, form: Form) -> str:
        if form not in self.settings.forms:
            return f"form {form}"
        if form == "code":
            return ""
        if language == UNKNOWN:
            return "no language" if self.settings.keep or self.settings.min_score else ""
        if score < self.settings.min_score:
            return "language not sure"
        if self.settings.keep and language not in self.settings.keep:
            return f"language {language}"
        return ""
