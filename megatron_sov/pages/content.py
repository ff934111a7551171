"""What a page holds: chapters of sections of text, charts and tables."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_sov.pages.charts import Chart


@dataclass(frozen=True)
class Table:
    """A table; cells are text and are escaped, unless they are `Markup`."""

    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Comparison:
    """Texts side by side: what several wrote to one prompt, or one document before and after a change."""

    prompt: str
    texts: list[tuple[str, str]]
    """(who or when, text), in the order of reading."""
    label: str = "Prompt"
    """What the prompt is; stands above it."""


@dataclass(frozen=True)
class Exhibit:
    """What was shown and what was made of it; media are addresses of `pages/embedded.py`."""

    title: str
    """What it is; stands above it."""
    asked: str
    """What was said beside the media that were shown."""
    shown_pictures: list[str]
    shown_sounds: list[str]
    text: str
    """What was written to it."""
    pictures: list[str]
    """What was drawn."""
    sounds: list[str]
    """What was said."""
    recognised: str
    """What others recognise in it."""


@dataclass(frozen=True)
class Section:
    """One part of a chapter."""

    title: str
    text: str = ""
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)
    """(who, what was said), in order."""
    comparisons: list[Comparison] = field(default_factory=list)
    exhibits: list[Exhibit] = field(default_factory=list)
    json: str = ""
    """Collapsible details, as JSON."""
    side_by_side: bool = False
    """Charts stand beside one another where there is room."""


@dataclass(frozen=True)
class Panel:
    """A small part of a page's first screen; panels stand beside one another where there is room."""

    title: str
    columns: int
    """Width on a wide screen, of twelve columns."""
    facts: list[tuple[str, str]] = field(default_factory=list)
    """(label, value)."""
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)


@dataclass(frozen=True)
class Chapter:
    """One thing that the page tells of, e.g. a run."""

    name: str
    detail: str
    """Stands behind the name in small type; may be empty."""
    figures: list[tuple[str, str, str]]
    """(label, value, detail) of what a reader asks first."""
    sections: list[Section]
    """In reading order; none: the chapter says that there is nothing yet."""
