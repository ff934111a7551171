"""The interface for pipeline steps: documents in, an outcome for each document out.

A step does not know where documents are stored or which process runs the step. A process builds a step once
from settings and calls `judge_document` for each document. A step with outcomes that depend on all documents,
e.g. a search for duplicates, lists passes, which run first. Tasks in a pass may run in different processes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from megatron_sov.base.plugins.registry import load_built_in

ColumnType = Literal["string", "float32", "int64", "bool", "list<string>"]
"""Type of a column; values may be null."""
SOURCE_COLUMNS: dict[str, ColumnType] = {
    "source": "string", "where": "string", "kind": "string", "licence": "string", "synthetic": "bool",
    "url": "string", "title": "string", "date": "string", "language_hint": "string", "own_id": "string",
    "extra": "string"}
"""Column -> type before the first step; `extra` is JSON with the format's other fields."""
RECORD_COLUMNS = ("licence", "url", "title", "date", "language_hint", "own_id")
"""Columns that records may set."""
READY = Path(__file__).parents[1] / "pipelines"
"""Folder with ready pipeline files, and in `blends` with ready blends."""
STEPS: dict[str, str] = {
    "code": "data_prep.curate.code_step:CodeStep",
    "encoding": "data_prep.curate.quality.encoding:RepairEncoding",
    "language": "data_prep.curate.quality.identify:Language",
    "rules": "data_prep.curate.quality.rules.step:Rules", "pii": "data_prep.curate.quality.pii.step:Pii",
    "exact_dedup": "data_prep.curate.dedup.exact:ExactDedup",
    "minhash_dedup": "data_prep.curate.dedup.minhash:MinhashDedup",
    "decontaminate": "data_prep.curate.decontamination.step:Decontaminate",
    "quality": "data_prep.curate.scoring.scorer_steps:Quality",
    "education": "data_prep.curate.scoring.scorer_steps:Education",
    "level": "data_prep.curate.scoring.levels:Level",
    "kind": "data_prep.curate.scoring.scorer_steps:DocumentKind"}
"""Name in pipeline files -> module:class."""


@dataclass(frozen=True, slots=True)
class Doc:
    """A document between two steps."""

    id: str
    """SOURCE:SHARD:HASH, the same in all steps; HASH: 16 hexadecimal digits of the document's place."""
    text: str
    """Text after the previous steps."""
    source: str
    shard: int
    """Number of the source's shard."""
    row: int
    """Row in the shard; dropped documents count."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Values from the source and the previous steps: `where`, `url`, `title`, `licence`, `date`, `kind`,
    `language`."""

    @property
    def sampling_key(self) -> str:
        """Key for random choices; unlike `id`, independent of shard sizes."""
        return f"{self.source}:{self.id.rpartition(':')[2]}"


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """A step's result for a document."""

    reason: str = ""
    """Why the document is dropped, in a few words for counting; "": kept."""
    text: str | None = None
    """New text; None: unchanged."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Column -> value, for `Step.added_columns`."""


KEPT = StepOutcome()


@dataclass(frozen=True)
class ShardRef:
    source: str
    number: int


class View(Protocol):
    """A step's access to the pipeline's documents."""

    @property
    def shards(self) -> Sequence[ShardRef]:
        """Shards for the step, ordered as sources in the pipeline file and by number."""

    @property
    def work_folder(self) -> Path:
        """Folder for the step's passes, which publish files by a rename."""

    def iter_documents(self, shard: ShardRef) -> Iterator[Doc]:
        """Yield a shard's documents, in order, without documents dropped by earlier steps."""

    def get_priority(self, source: str) -> int:
        """Return a source's `priority`; the source with the higher value keeps a common text."""


@dataclass(frozen=True)
class Pass:
    """Work over all documents before a step's outcomes."""

    name: str
    """One word, for folders and messages."""
    run: Callable[[View, int], None]
    """The step's method for a task. A repeated task must write the same files."""
    num_tasks: int | None = None
    """Number of tasks; None: a task for each shard in `View.shards`."""


class Step(ABC):
    """Base class for steps; an instance has the settings from an entry in a pipeline file."""

    kind: ClassVar[str]
    """Name in pipeline files."""
    version: ClassVar[int] = 1
    """Raised when equal documents and settings would give different outcomes or pass files."""
    added_columns: ClassVar[Mapping[str, ColumnType]] = {}
    """Column -> type, for columns that the step adds to every kept document."""
    needed_columns: ClassVar[Sequence[str]] = ()
    """Columns that the sources or an earlier step must add."""
    shorthand: ClassVar[str] = ""
    """Setting that receives a single value in the pipeline file; "": the step needs a mapping."""
    Settings: ClassVar[type[Any]]
    """Frozen dataclass with bounds as types and docstrings for fields. An optional method
    `problems() -> list[SettingsProblem]` checks combinations of fields."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def list_libraries(self) -> Sequence[str]:
        """List the optional modules that `judge_document` imports."""
        return ()

    def list_files(self) -> Sequence[Path]:
        """List files and folders that outcomes depend on; the step's address includes the contents."""
        return ()

    def list_passes(self) -> Sequence[Pass]:
        """List passes in order. A step without passes judges documents alone: a changed source repeats the
        step only for the source."""
        return ()

    def load_inputs(self, view: View) -> None:  # noqa: B027  (most steps load nothing)
        """Load the data for `judge_document`. Called once per process, after the passes."""

    @abstractmethod
    def judge_document(self, document: Doc) -> StepOutcome:
        """Return a document's outcome, which must not depend on previous calls."""


def load_step_class(kind: str) -> type[Step]:
    """Import the class of a step in `STEPS`, which needs none of `Step.list_libraries`."""
    step: type[Step] = load_built_in(f"step {kind}", STEPS[kind], "data")
    return step
