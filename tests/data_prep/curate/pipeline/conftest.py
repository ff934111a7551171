"""A small pipeline: two sources, a step on single documents (`shorten`) and on all documents (`unique`)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_prep.curate.pipeline import step, tasks
from data_prep.curate.pipeline.step import Doc, Pass, Step, StepOutcome, View
from megatron_sov.base.settings import AtLeastOne

PIPELINE = """name: small
shard_bytes: 2000
sources:
  - name: web
    path: web
    kind: en
    licence: CC-BY-4.0
  - name: books
    path: [books]
    priority: 1
steps:
  - shorten: {longest: 400}
  - unique: {}
  - shorten: {longest: 300}
output:
  name: "{source}-{size}"
"""


@dataclass(frozen=True)
class ShortenSettings:
    """Settings of the step `shorten`."""

    longest: AtLeastOne = 100
    """Characters after which a text is truncated."""
    not_below: int = 10
    """Texts with fewer characters are dropped."""
    lists: tuple[Path, ...] = ()
    """Files of words that are removed from texts."""


class Shorten(Step):
    """Truncates long texts, drops short ones, and adds a column with their size."""

    kind = "shorten"
    added_columns = {"size": "string", "num_chars": "int64"}
    Settings = ShortenSettings
    shorthand = "longest"

    def list_files(self) -> Sequence[Path]:
        files: tuple[Path, ...] = self.settings.lists
        return files

    def judge_document(self, document: Doc) -> StepOutcome:
        text = document.text
        for file in self.settings.lists:
            for word in file.read_text().split():
                text = text.replace(word, "")
        if len(text) < self.settings.not_below:
            return StepOutcome("too short")
        size = "long" if len(text) > self.settings.longest else "short"
        return StepOutcome(text=text[:self.settings.longest], values={"size": size, "num_chars": len(text)})


@dataclass(frozen=True)
class UniqueSettings:
    """Empty settings of the step `unique`."""

    def problems(self) -> list[str]:
        return []


class Unique(Step):
    """Drops all but one of equal texts: the first of the source with the highest priority remains."""

    kind = "unique"
    Settings = UniqueSettings
    needed_columns = ("size",)

    def list_passes(self) -> Sequence[Pass]:
        return [Pass("hash", self.hash), Pass("choose", self.choose, 2)]

    def hash(self, view: View, task: int) -> None:
        """Write a line for each document of a shard: hash of the text, rank of the source, shard, id."""
        shard = view.shards[task]
        lines = [f"{hashlib.md5(d.text.encode()).hexdigest()} {9 - view.get_priority(d.source)} {task:05d} "
                 f"{d.id}\n" for d in view.iter_documents(shard)]
        (view.work_folder / f"hashes-{task:05d}").write_text("".join(lines))

    def choose(self, view: View, task: int) -> None:
        """Write the first id of each text, for the half of the texts whose hash belongs to this task."""
        lines = sorted(line for file in view.work_folder.glob("hashes-*")
                       for line in file.read_text().splitlines() if int(line[:8], 16) % 2 == task)
        first_ids: dict[str, str] = {}
        for line in lines:
            digest, _, _, identifier = line.split()
            first_ids.setdefault(digest, identifier)
        (view.work_folder / f"chosen-{task}").write_text("\n".join(first_ids.values()))

    def load_inputs(self, view: View) -> None:
        self.chosen = {line for task in range(2)
                       for line in (view.work_folder / f"chosen-{task}").read_text().splitlines()}

    def judge_document(self, document: Doc) -> StepOutcome:
        return StepOutcome("" if document.id in self.chosen else "seen before")


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the steps `shorten` and `unique` for pipeline files."""
    test_steps = {"shorten": Shorten, "unique": Unique}
    load_step_class = step.load_step_class

    def load_test_step(kind: str) -> type[Step]:
        return test_steps[kind] if kind in test_steps else load_step_class(kind)

    for kind in test_steps:
        monkeypatch.setitem(step.STEPS, kind, "")
    monkeypatch.setattr("data_prep.curate.pipeline.pipeline_file.load_step_class", load_test_step)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip `os.fsync`: a killed process, unlike a power failure, loses no data without it."""
    monkeypatch.setattr("os.fsync", lambda fd: None)


@pytest.fixture
def finished_tasks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """The tasks (stage, source, number) that have completed in this process; grows during a run."""
    finished: list[tuple[str, str, int]] = []
    run_open_task = tasks._run_open_task

    def run_and_record(plan: Any, file: Path, output: Path, stage: Any, task: Any, mark: Path) -> None:
        run_open_task(plan, file, output, stage, task, mark)
        finished.append((stage.name, *task))

    monkeypatch.setattr(tasks, "_run_open_task", run_and_record)
    return finished


@pytest.fixture
def small_run(tmp_path: Path) -> Path:
    """A folder with the sources `web` (texts 0 to 5) and `books` (texts 4 to 7), and pipeline.yaml."""
    for name, numbers in (("web", range(6)), ("books", range(4, 8))):
        (tmp_path / name).mkdir()
        for number in numbers:
            (tmp_path / name / f"{number}.txt").write_text(f"text {number} " * (10 + 20 * number))
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    return tmp_path
