"""Published figures of other models, to stand beside a run's own scores: `published/*.yaml`, one file for
each table of a document."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from megatron_sov.settings import Code, Problem, read_file

NOT_TOLD = "not told"


@dataclass(frozen=True)
class Figure:
    """One published figure."""

    name: str
    """What the document calls the benchmark."""
    value: Annotated[float, Ge(0), Le(100)]
    """In percent."""
    metric: str = NOT_TOLD
    """E.g. `avg@64`."""
    protocol: str = ""
    """Which of the table's protocols; empty: not told."""


@dataclass(frozen=True)
class PublishedTable:
    """A model's figures from one document."""

    model: str
    """As its authors call it."""
    document: str
    """Where the figures stand."""
    verified: bool
    """Whether they were seen there, and not told by others."""
    figures: dict[str, Figure]
    """Benchmark, as `metadata.sov.published_as` of a task names it -> figure."""
    protocols: dict[str, str] = field(default_factory=dict)
    """Name -> how figures were measured, as far as the document tells."""

    def protocol(self, figure: Figure) -> str:
        """Return how a figure was measured, in words."""
        return self.protocols.get(figure.protocol, NOT_TOLD)

    def problems(self) -> list[Problem]:
        """Return every figure whose protocol is not told."""
        return [Problem(Code.RULE, f"figures.{key}.protocol", "must be one of protocols", figure.protocol)
                for key, figure in self.figures.items()
                if figure.protocol and figure.protocol not in self.protocols]


@lru_cache(maxsize=1)
def published_tables() -> tuple[PublishedTable, ...]:
    """Return all tables, by file name."""
    with resources.as_file(resources.files("megatron_sov.report") / "published") as folder:
        return tuple(read_table(file) for file in sorted(folder.glob("*.yaml")))


def read_table(file: Path) -> PublishedTable:
    """Return the table of a file.

    Raises:
        UserError: it is no YAML, or a figure breaks a rule.
    """
    return read_file(PublishedTable, file, file.name)
