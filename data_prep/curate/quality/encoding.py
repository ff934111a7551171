"""The step `encoding`: restores text that was read in a wrong encoding ("â€™" for "’"), by the library ftfy.

ftfy (Speer, 2019, doi:10.5281/zenodo.2591652) recognises sequences of characters that no language has and
that are UTF-8 read as Windows-1252, Latin-1 or another encoding of one byte.  Of its repairs only
`fix_encoding` is used: quotes, ligatures, widths, HTML entities and normal forms stay as they are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from data_prep.curate.line_ends import unify_line_ends
from data_prep.curate.pipeline.step import ColumnType, Doc, Step, StepOutcome
from data_prep.curate.quality.identify import detect_form
from data_prep.libraries import find_library_problems
from megatron_sov.base.settings import SettingsProblem, to_problem


@dataclass(frozen=True)
class EncodingRepairSettings:
    """The step has no settings; its library has to be installed."""

    def problems(self) -> list[SettingsProblem]:
        return list(map(to_problem, find_library_problems("the step encoding", "ftfy")))


class RepairEncoding(Step):
    """Restores text that was read in a wrong encoding, except in code."""

    kind = "encoding"
    added_columns: ClassVar[dict[str, ColumnType]] = {"lines_repaired": "int64"}
    Settings = EncodingRepairSettings

    def compute_outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        return [self._outcome(document) for document in documents]

    def _outcome(self, document: Doc) -> StepOutcome:
        text, num_lines = repair_encoding(document.text)
        # Programs may hold such sequences on purpose, as tests of encodings do.
        if num_lines and document.columns.get("kind") != "math_code" and detect_form(document.text) != "code":
            return StepOutcome(text=text, values={"lines_repaired": num_lines})
        return StepOutcome(values={"lines_repaired": 0})


def repair_encoding(text: str) -> tuple[str, int]:
    """Return a text with its wrongly read lines restored, and the number of these lines."""
    from ftfy import TextFixerConfig, fix_encoding

    if text.isascii():
        return text, 0
    config = TextFixerConfig(explain=False)
    lines = text.split("\n")
    # Line by line: a text may have been put together from parts in several encodings.
    repaired = [line if line.isascii() else fix_encoding(line, config) for line in lines]
    num_lines = sum(before != after for before, after in zip(lines, repaired, strict=True))
    # A restored character may be a line separator or a blank at the end of a line.
    return (unify_line_ends("\n".join(repaired)) if num_lines else text), num_lines
