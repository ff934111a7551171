"""What a pipeline's run says of itself in figures: OUT/summary.json, per source and step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError

from megatron_sov.base.errors import UserError

SUMMARY = "summary.json"
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MAX_SUMMARY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class DocumentSample:
    """A document that a step met, cut to what a reader looks at."""

    id: str
    """The document's id."""
    reason: str = ""
    """Why it was dropped; "": it was kept."""
    before: str = ""
    """The beginning of its text before the step."""
    after: str | None = None
    """The beginning of its text behind the step; None: it was dropped."""


@dataclass(frozen=True)
class Samples:
    """Documents that a step met, drawn by a hash of their ids."""

    kept: list[DocumentSample] = field(default_factory=list)
    """Kept as they were."""
    dropped: list[DocumentSample] = field(default_factory=list)
    """Dropped, with the reason."""
    changed: list[DocumentSample] = field(default_factory=list)
    """Kept with another text."""


@dataclass(frozen=True)
class DroppedCount:
    """Documents that a step dropped for one reason."""

    documents: NonNegativeInt
    """How many."""
    bytes: NonNegativeInt
    """Their text in UTF-8."""


@dataclass(frozen=True)
class StepCounts:
    """What a step did with the documents of one source."""

    number: int
    """Its place in the file; 0 reads the source."""
    kind: str
    """Name of the step in the pipeline's file."""
    folder: str
    """Where its shards lie, below OUT."""
    settings: dict[str, Any] = field(default_factory=dict)
    """As the run resolved them."""
    documents_in: NonNegativeInt = 0
    """Documents that it looked at."""
    bytes_in: NonNegativeInt = 0
    """Of text in UTF-8."""
    documents_kept: NonNegativeInt = 0
    """Documents that it let through."""
    bytes_kept: NonNegativeInt = 0
    """Their text behind the step."""
    documents_changed: NonNegativeInt = 0
    """Of those kept, with another text."""
    dropped: dict[str, DroppedCount] = field(default_factory=dict)
    """Reason -> what was dropped for it."""
    cpu_s: Seconds = 0.0
    """Of all processes together."""
    wall_s: Seconds = 0.0
    """Sum over all shards."""
    samples: Samples = field(default_factory=Samples)
    """A few of them."""

    @property
    def name(self) -> str:
        return f"{self.number:02d} {self.kind}"


@dataclass(frozen=True)
class SourceSummary:
    """What became of one source."""

    name: str
    """As the pipeline's file has it."""
    steps: list[StepCounts]
    """In order; a step that passes by this source is not among them."""
    format: str = ""
    """What its files are, e.g. "html"."""
    path: list[str] = field(default_factory=list)
    """Files and folders, as the pipeline's file has them."""
    kind: str = ""
    """Of its documents, where the file says one."""
    licence: str = ""
    """As the pipeline's file has it; documents may have others of their own."""
    synthetic: bool = False
    """Whether a model wrote it."""
    priority: int = 0
    """Of two that hold the same text the higher one keeps it."""
    num_shards: NonNegativeInt = 0
    """Parts that it was cut into."""
    num_files: NonNegativeInt = 0
    """Files that it was read from."""
    raw_bytes: NonNegativeInt = 0
    """Of its files as they lie on the disk."""
    quarantine: dict[str, int] = field(default_factory=dict)
    """Code -> files and records that could not be read, or are not wanted."""

    @property
    def read(self) -> StepCounts:
        return self.steps[0]

    @property
    def last(self) -> StepCounts:
        return self.steps[-1]


@dataclass(frozen=True)
class OutputSummary:
    """One source of the output."""

    name: str
    """Of its folder below OUT/text."""
    num_documents: int
    """Documents in it."""
    num_bytes: int
    """Their text in UTF-8."""
    num_shards: int = 0
    """Its files."""


@dataclass(frozen=True)
class SharedFolder:
    """What a step keeps for all sources together."""

    number: int
    """Its place in the pipeline's file."""
    kind: str
    """Name of the step in that file."""
    folder: str
    """Below OUT."""
    cpu_s: Seconds = 0.0
    """What its passes over all documents took, of all processes together."""
    wall_s: Seconds = 0.0
    """Sum over the tasks of its passes."""


@dataclass(frozen=True)
class JourneySummary:
    """A pipeline's run in figures."""

    name: str
    """Of the pipeline."""
    sources: list[SourceSummary]
    """In the order of its file."""
    output: list[OutputSummary] = field(default_factory=list)
    """What it wrote."""
    shared: list[SharedFolder] = field(default_factory=list)
    """Of the steps that look at all documents."""

    def steps(self) -> list[tuple[int, str]]:
        """Return (number, kind) of all steps that a source went through, in order."""
        return sorted({(step.number, step.kind) for source in self.sources for step in source.steps})

    def of_step(self, number: int) -> list[StepCounts]:
        """Return what a step did with each source that it worked on."""
        return [step for source in self.sources for step in source.steps if step.number == number]


def dropped_by_reason(steps: Iterable[StepCounts]) -> dict[tuple[str, str], DroppedCount]:
    """Return (step, reason) -> what steps dropped, most documents first."""
    sums: dict[tuple[str, str], DroppedCount] = {}
    for step in steps:
        for reason, lost in step.dropped.items():
            old = sums.get((step.name, reason), DroppedCount(0, 0))
            sums[step.name, reason] = DroppedCount(old.documents + lost.documents, old.bytes + lost.bytes)
    return dict(sorted(sums.items(), key=lambda item: (-item[1].documents, item[0])))


def read_summary(out: Path) -> JourneySummary:
    """Return what OUT/summary.json says.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = out / SUMMARY
    try:
        if file.stat().st_size > MAX_SUMMARY_BYTES:
            raise UserError(f"{file}: has {file.stat().st_size:,} bytes, at most {MAX_SUMMARY_BYTES:,} are "
                            "read; run the pipeline again")
        found = TypeAdapter(JourneySummary).validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file}: does not exist; pass the folder that `sov-data run` or `sov-data synth` "
                        "wrote, and let it come to its end") from None
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{file}: is damaged ({where}: {first['msg']}); run the pipeline again") from None
    _check(file, found)
    return found


def _check(file: Path, summary: JourneySummary) -> None:
    """Raise `UserError` where a summary does not hold together, or leads out of its folder."""
    folders = [step.folder for source in summary.sources for step in source.steps]
    for folder in (*folders, *(shared.folder for shared in summary.shared)):
        # A summary may come from others: its folders are opened, so none may lead out of the output.
        if not folder or Path(folder).is_absolute() or ".." in Path(folder).parts or "\0" in folder:
            raise UserError(f"{file}: is damaged (folder {folder!r} is not inside OUT); run the pipeline "
                            "again")
    for source in summary.sources:
        if not source.steps:
            raise UserError(f"{file}: is damaged (source {source.name!r} has no steps); run the pipeline "
                            "again")
