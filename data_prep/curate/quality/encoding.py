"""Step `encoding`: restore text decoded with a wrong encoding ("â€™" for "’") with the library ftfy.

ftfy (Speer, 2019, doi:10.5281/zenodo.2591652) recognises UTF-8 bytes read as Windows-1252, Latin-1 or another
one-byte encoding. The step calls `fix_encoding` only: quotes, ligatures, widths, HTML entities and normal
forms stay unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.curate.line_ends import unify_line_ends
from data_prep.curate.pipeline.step import Doc, Step, StepOutcome
from data_prep.curate.quality.identify import detect_form


@dataclass(frozen=True)
class EncodingRepairSettings:
    """The step has no settings."""


class RepairEncoding(Step):
    """Restores wrongly decoded lines, except in code; the column `lines_repaired` counts them."""

    kind = "encoding"
    added_columns = {"lines_repaired": "int64"}
    Settings = EncodingRepairSettings

    def list_libraries(self) -> Sequence[str]:
        return ("ftfy",)

    def judge_document(self, document: Doc) -> StepOutcome:
        text, num_lines = repair_encoding(document.text)
        # Programs may hold wrong encodings on purpose, for example tests of decoders.
        if num_lines and document.columns.get("kind") != "math_code" and detect_form(document.text) != "code":
            return StepOutcome(text=text, values={"lines_repaired": num_lines})
        return StepOutcome(values={"lines_repaired": 0})


def repair_encoding(text: str) -> tuple[str, int]:
    """Return `text` with wrongly decoded lines restored, and the number of restored lines."""
    if text.isascii():
        return text, 0
    from ftfy import TextFixerConfig, fix_encoding  # optional package

    config = TextFixerConfig(explain=False)
    lines = text.split("\n")
    # Line by line: a page may combine parts in several encodings.
    repaired = [line if line.isascii() else fix_encoding(line, config) for line in lines]
    num_lines = sum(before != after for before, after in zip(lines, repaired, strict=True))
    if not num_lines:
        return text, 0
    # A restored character may be a line separator or a trailing blank.
    return unify_line_ends("\n".join(repaired)), num_lines
