"""The step `pii`: personal data is masked by the name of what stood there."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, ClassVar

import yaml
from annotated_types import MinLen

from data_prep.libraries import require
from data_prep.pipeline.step import ColumnType, Doc, Outcome, Step
from data_prep.quality.pii.finders import FINDERS
from megatron_sov.settings import Bound, Breach, Code, Problem, as_problem, one_of

NAME = "{name}"
"""What the name of the masked stands for in a placeholder."""
NAMES_FILE = Path(__file__).with_name("names.yaml")


Finder = Annotated[str, one_of(lambda: FINDERS)]
"""A kind of personal data."""


def _other_braces(placeholder: str) -> Breach | None:
    if set(placeholder.replace(NAME, "")) & set("{}"):
        return Code.BOUND, f"must have no braces but {NAME}", ""
    return None


@dataclass(frozen=True)
class PiiSettings:
    """What is masked, and by what."""

    mask: Annotated[tuple[Finder, ...], MinLen(1)] = tuple(FINDERS)
    """Kinds that are masked: api_key, email, iban, korean_rrn, thai_id, card, ip, phone."""
    mask_in_code: tuple[Finder, ...] = ("api_key", "email")
    """Of them, those that are masked in code and markup too, where a masked number would break what runs."""
    placeholder: Annotated[str, Bound(_other_braces)] = "[{name}]"
    """What stands in the place; {name}: what it was, in the document's language."""
    names_in: Annotated[str, one_of(lambda: ("", *masked_names()["email"]))] = ""
    """Language of the names; "": each document's own, and English where there are no names in it."""

    def problems(self) -> list[Problem]:
        """Return what does not fit together."""
        return list(map(as_problem, require("the step pii", "phonenumbers"))) if "phone" in self.mask else []


@lru_cache(maxsize=1)
def masked_names() -> dict[str, dict[str, str]]:
    """Return kind -> language -> what stands in its place."""
    names: dict[str, dict[str, str]] = yaml.safe_load(NAMES_FILE.read_text(encoding="utf-8"))
    return names


class Pii(Step):
    """Masks personal data, and says how much of each kind was there."""

    kind = "pii"
    adds: ClassVar[dict[str, ColumnType]] = {"pii": "string"}
    Settings = PiiSettings
    settings: PiiSettings

    def files(self) -> Sequence[Path]:
        """Return the file of the names."""
        return [NAMES_FILE]

    def outcomes(self, documents: Sequence[Doc]) -> Sequence[Outcome]:
        """Return each document with its personal data masked and counted."""
        return [self._outcome(document) for document in documents]

    def _outcome(self, document: Doc) -> Outcome:
        language = document.columns.get("language") or ""
        in_prose = (document.columns.get("form") or "prose") == "prose"
        kinds = [kind for kind in FINDERS
                 if kind in self.settings.mask and (in_prose or kind in self.settings.mask_in_code)]
        spans = found_in(document.text, language, kinds)
        if not spans:
            return Outcome(values={"pii": ""})
        counts = {kind: sum(of == kind for _, _, of in spans) for kind in kinds}
        return Outcome(text=self._masked(document.text, spans, self.settings.names_in or language),
                       values={"pii": " ".join(f"{kind}={n}" for kind, n in counts.items() if n)})

    def _masked(self, text: str, spans: list[tuple[int, int, str]], language: str) -> str:
        parts, end = [], 0
        for start, stop, kind in spans:
            names = masked_names()[kind]
            name = names.get(language, names["en"])
            parts += [text[end:start], self.settings.placeholder.replace(NAME, name)]
            end = stop
        return "".join([*parts, text[end:]])


def found_in(text: str, language: str, kinds: Sequence[str]) -> list[tuple[int, int, str]]:
    """Return (start, stop, kind) of what is found, in order; where spans overlap, the one of the kind that is
    named first."""
    taken: list[tuple[int, int, str]] = []
    for kind in kinds:
        for start, stop in FINDERS[kind](text, language):
            place = bisect_left(taken, (start,))
            if (place == 0 or taken[place - 1][1] <= start) and (
                    place == len(taken) or taken[place][0] >= stop):
                taken.insert(place, (start, stop, kind))
    return taken
