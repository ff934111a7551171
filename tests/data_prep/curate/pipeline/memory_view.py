"""An in-memory pipeline, to run steps on a few documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.curate.pipeline.step import Doc, ShardRef, Step, StepOutcome


def doc(text: str, row: int = 0, *, source: str = "web", shard: int = 0, **columns: Any) -> Doc:
    """Return a document with its position, and an id in the form of the engine."""
    return Doc(f"{source}:{shard}:{shard:08x}{row:08x}", text, source, shard, row, columns)


def docs(*texts: str, source: str = "web", shard: int = 0, **columns: Any) -> list[Doc]:
    """Return the documents of one shard."""
    return [doc(text, row, source=source, shard=shard, **columns) for row, text in enumerate(texts)]


@dataclasses.dataclass
class MemoryView:
    """A `View` over lists of documents."""

    documents_of: Mapping[ShardRef, Sequence[Doc]]
    work_folder: Path
    priorities: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, shards: Sequence[Sequence[Doc]], work: Path, **priorities: int) -> MemoryView:
        """Return a view of shards; source and shard number come from each shard's first document."""
        documents_of = {ShardRef(documents[0].source, documents[0].shard): list(documents)
                        for documents in shards}
        return cls(documents_of, work, priorities)

    @property
    def shards(self) -> Sequence[ShardRef]:
        return list(self.documents_of)

    def iter_documents(self, shard: ShardRef) -> Iterator[Doc]:
        yield from self.documents_of[shard]

    def get_priority(self, source: str) -> int:
        return self.priorities.get(source, 0)


def run_step(make: type[Step], settings: Any, view: MemoryView) -> dict[str, StepOutcome]:
    """Run all passes of a step, and return document id -> outcome.

    Every pass and every shard gets a new step object, as in separate processes. Passes run twice, the second
    time in reverse order, and must write the same files; documents are judged twice, the second time in
    reverse order, with equal outcomes.
    """
    for number, step_pass in enumerate(make(settings).list_passes()):
        tasks = list(range(len(view.shards) if step_pass.num_tasks is None else step_pass.num_tasks))
        for task in tasks:
            make(settings).list_passes()[number].run(view, task)
        before = read_files(view.work_folder)
        for task in reversed(tasks):
            make(settings).list_passes()[number].run(view, task)
        assert read_files(view.work_folder) == before, (
            f"pass {step_pass.name}: another result when it is run again")
    outcomes: dict[str, StepOutcome] = {}
    for shard in view.shards:
        step = make(settings)
        step.load_inputs(view)
        for document in view.iter_documents(shard):
            outcomes[document.id] = step.judge_document(document)
        step = make(settings)
        step.load_inputs(view)
        for document in reversed(view.documents_of[shard]):
            again = step.judge_document(document)
            assert again == outcomes[document.id], f"{document.id}: another outcome after other documents"
    unknown = {name for outcome in outcomes.values() for name in outcome.values} - set(make.added_columns)
    assert not unknown, f"{make.kind} returns columns that are not in its `added_columns`: {sorted(unknown)}"
    return outcomes


def read_files(folder: Path) -> dict[str, bytes]:
    """Return name -> bytes of all files in a folder."""
    return {str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(folder.rglob("*")) if file.is_file()}
