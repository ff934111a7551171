"""What a step of a pipeline is: documents in, an outcome for each of them out.

A step never sees the disk that documents lie on, nor who runs it.  It is built once in each process from its
settings; `outcomes` judges documents a batch at a time.  A step that has to see all documents before it can
judge one, such as a search for duplicates, names passes over them, which run first, each of its tasks in a
process anywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from megatron_sov.base.plugins.registry import load_built_in

if TYPE_CHECKING:
    import pyarrow as pa

ColumnType = Literal["string", "float32", "int64", "bool", "list<string>"]
"""What the values of a column may be; each may also be null."""


@dataclass(frozen=True, slots=True)
class Doc:
    """One document on its way."""

    id: str
    """SOURCE:SHARD:16 hexadecimal digits of its place in the source; the same in every step."""
    text: str
    """Its text as the steps before left it."""
    source: str
    shard: int
    """Number of the source's shard that holds it."""
    row: int
    """Its row in that shard, dropped ones counted."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What its source and the steps before say of it: where, url, title, licence, date, kind, language."""

    @property
    def sampling_key(self) -> str:
        """Return what a choice by chance goes by: unlike the id it does not change with how a source is cut
        into shards."""
        return f"{self.source}:{self.id.rpartition(':')[2]}"


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step makes of a document."""

    reason: str = ""
    """Why it is dropped, in a few words that are the same for all such documents; "": it is kept."""
    text: str | None = None
    """Its text where the step changes it."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Column -> its value, of the columns that the step adds."""


KEPT = StepOutcome()


@dataclass(frozen=True)
class ShardRef:
    """One shard of a source."""

    source: str
    number: int


class View(Protocol):
    """What a step may see of its pipeline."""

    @property
    def shards(self) -> Sequence[ShardRef]:
        """All shards that the step works on, in order: by the sources of the file, then by number."""

    @property
    def work_folder(self) -> Path:
        """Folder that the passes of this step share; what they leave there is published by a rename."""

    def iter_documents(self, shard: ShardRef) -> Iterator[list[Doc]]:
        """Yield the documents of a shard that are still kept, in order, in batches."""

    def get_priority(self, source: str) -> int:
        """Return a source's priority: of two that hold the same text the higher one keeps it."""


@dataclass(frozen=True)
class Pass:
    """Work on all documents that comes before a step's outcomes."""

    name: str
    """One word, for folders and messages."""
    run: Callable[[View, int], None]
    """Does one task; has to leave the same files whenever it is run again.  A method of the step."""
    num_tasks: int | None = None
    """Tasks; None: one for each shard, in the order of `View.shards`."""


class Step(ABC):
    """One step, with its settings."""

    kind: ClassVar[str]
    """Name in pipeline files."""
    version: ClassVar[int] = 1
    """Raised when the same documents and settings would have another outcome, or when its passes leave other
    files for each other."""
    added_columns: ClassVar[Mapping[str, ColumnType]] = {}
    """Column -> type, of those that it adds to every document that it keeps."""
    needed_columns: ClassVar[Sequence[str]] = ()
    """Columns that a step before it, or its sources, have to give."""
    shorthand: ClassVar[str] = ""
    """The setting that is meant where a pipeline file gives the step a single value; "": none."""
    Settings: ClassVar[type[Any]]
    """Frozen dataclass whose fields have bounds as types and a docstring; `problems() -> list[Problem]`,
    where it has one, tells what does not fit together."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def list_files(self) -> Sequence[Path]:
        """Return files and folders beside the documents that outcomes depend on; their contents are part of
        the step's address."""
        return ()

    def list_passes(self) -> Sequence[Pass]:
        """Return what has to be done with all documents first, in order; none: the step looks at each
        document alone, and is done again for those sources only that change."""
        return ()

    def load_inputs(self, view: View) -> None:  # noqa: B027  (nothing is the rule)
        """Load what `outcomes` needs; called once in each process, behind all passes."""

    @abstractmethod
    def compute_outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        """Return one outcome for each document, in order; the same ones however documents are cut into
        batches."""


SOURCE_COLUMNS: dict[str, ColumnType] = {
    "source": "string", "where": "string", "kind": "string", "licence": "string", "synthetic": "bool",
    "url": "string", "title": "string", "date": "string", "language_hint": "string", "own_id": "string",
    "extra": "string",
}
"""Column -> type of what is known of a document before the first step; `extra` is JSON of whatever else its
format tells."""
RECORD_COLUMNS = ("licence", "url", "title", "date", "language_hint", "own_id")
"""Those that a document says of itself."""


def build_schema(columns: dict[str, ColumnType], *first: tuple[str, pa.DataType]) -> pa.Schema:
    """Return the schema of columns behind some that come first."""
    import pyarrow as pa

    types = {"string": pa.string(), "float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_(),
             "list<string>": pa.list_(pa.string())}
    return pa.schema([*first, *((name, types[kind]) for name, kind in columns.items())])


STEPS: dict[str, str] = {
    "code": "data_prep.curate.code_step:CodeStep",
    "encoding": "data_prep.curate.quality.encoding:RepairEncoding",
    "language": "data_prep.curate.quality.identify:Language",
    "rules": "data_prep.curate.quality.rules.step:Rules",
    "pii": "data_prep.curate.quality.pii.step:Pii",
    "exact_dedup": "data_prep.curate.dedup.exact:ExactDedup",
    "minhash_dedup": "data_prep.curate.dedup.minhash:MinhashDedup",
    "paragraph_dedup": "data_prep.curate.dedup.exact:ParagraphDedup",
    "decontaminate": "data_prep.curate.decontamination.step:Decontaminate",
    "quality": "data_prep.curate.scoring.kinds:Quality",
    "education": "data_prep.curate.scoring.kinds:Education",
    "level": "data_prep.curate.scoring.levels:Level",
    "kind": "data_prep.curate.scoring.kinds:ScorerKind",
}
"""Name in pipeline files -> module:class."""


def load_step_class(kind: str) -> type[Step]:
    """Return the class of a step of `STEPS`.

    Raises:
        UserError: a library that it needs is not installed.
    """
    step: type[Step] = load_built_in(f"step {kind}", STEPS[kind], "data")
    return step
