"""The formats that sources may have, each loaded when a source asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from data_prep.curate.sources.reader import FileReader
from data_prep.curate.sources.source import Reader, SourceSettings
from data_prep.libraries import require
from megatron_sov.base.errors import nearest
from megatron_sov.base.settings import (
    ProblemCode, SettingsError, SettingsProblem, as_problem, find_problems, problems_of)

FORMATS: dict[str, str] = {
    "auto": "data_prep.curate.sources.auto:AutoReader",
    "text": "data_prep.curate.sources.lines:TextReader",
    "jsonl": "data_prep.curate.sources.lines:JsonlReader",
    "parquet": "data_prep.curate.sources.dataset:ParquetReader",
    "arrow": "data_prep.curate.sources.dataset:ArrowReader",
    "dataset": "data_prep.curate.sources.dataset:DatasetReader",
    "html": "data_prep.curate.sources.html:HtmlReader",
    "warc": "data_prep.curate.sources.warc:WarcReader",
    "pdf": "data_prep.curate.sources.pdf_layout:PdfReader",
    "epub": "data_prep.curate.sources.epub:EpubReader",
    "office": "data_prep.curate.sources.office:OfficeReader",
    "code": "data_prep.curate.sources.code:CodeReader",
    "parallel": "data_prep.curate.sources.parallel:ParallelReader",
}
"""Name in pipeline files -> module:class of its reader."""
_PAGES = ("resiliparse", "charset_normalizer")
LIBRARIES: dict[str, tuple[str, ...]] = {
    "html": _PAGES, "epub": ("lxml", *_PAGES), "office": ("lxml",), "parallel": ("lxml",),
    "pdf": ("pypdfium2",), "warc": ("warcio", "pypdfium2", *_PAGES),
    "code": ("identify", "ukkonen", "charset_normalizer"),
    "auto": ("warcio", "pypdfium2", "lxml", *_PAGES, "identify", "ukkonen"),
}
"""Format -> modules that the process which reads imports; without one every file would be told as broken."""


def reader_class(format_: str) -> type[FileReader]:
    """Return the reader of a format that `FORMATS` has."""
    module, _, name = FORMATS[format_].partition(":")
    found: type[FileReader] = getattr(import_module(module), name)
    return found


def reader(source: SourceSettings) -> Reader:
    """Return the reader of a source.

    Raises:
        SettingsError: the source has problems; all of them.
    """
    if problems := problems_of(source):
        raise SettingsError(f"source {source.name}", problems)
    return reader_class(source.format)(source)


def format_problems(format_: str, options: Mapping[str, Any]) -> list[SettingsProblem]:
    """Return each mistake in the name of a format and its options."""
    if format_ not in FORMATS:
        return [SettingsProblem(ProblemCode.CHOICE, "format", f"must be one of {', '.join(FORMATS)}", format_,
                                nearest(format_, FORMATS).removeprefix("; "))]
    problems = find_problems(reader_class(format_).Options, options)[1]
    return [*map(as_problem, require(f"format {format_}", *LIBRARIES.get(format_, ()))),
            *(problem.below("options") for problem in problems)]
