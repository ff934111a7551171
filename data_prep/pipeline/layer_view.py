"""What a step sees of a run: the documents that the steps before it have left, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from data_prep.pipeline.counts import noted_seal
from data_prep.pipeline.layers import Row, groups
from data_prep.pipeline.plan import Plan, StepPlan
from data_prep.pipeline.step import Doc, ShardRef


class LayerView:
    """A `View` of one step over a run's folder."""

    def __init__(self, plan: Plan, step: StepPlan, output: Path) -> None:
        self.plan, self.step, self.output = plan, step, output

    @cached_property
    def shards(self) -> Sequence[ShardRef]:
        """See `View`."""
        return [ShardRef(name, number)
                for name in self.step.sources for number in self.plan.source(name).shards]

    @property
    def work(self) -> Path:
        """See `View`."""
        shared = next((layer.shared for name in self.step.sources for layer in self.plan.source(name).layers
                       if layer.number == self.step.entry.number), "")
        return self.output / shared

    def documents(self, shard: ShardRef) -> Iterator[list[Doc]]:
        """See `View`."""
        for group in self.groups(shard):
            if batch := [found for _, found in self.looked_at(shard, group)]:
                yield batch

    def priority(self, source: str) -> int:
        """See `View`."""
        return self.plan.source(source).settings.priority

    def groups(self, shard: ShardRef) -> Iterator[tuple[int, list[Row | None]]]:
        """Yield the number of its first row and the rows of each group of a shard, before the step."""
        files = [layer.file(self.output, shard.number) for layer in self.plan.source(shard.source).layers
                 if layer.number < self.step.entry.number]
        first = 0
        for rows in groups(shard.source, files, [noted_seal(file) for file in files]):
            yield first, rows
            first += len(rows)

    def looked_at(self, shard: ShardRef, group: tuple[int, list[Row | None]]) -> list[tuple[int, Doc]]:
        """Return those rows of a group that the step looks at: place in the group and document."""
        first, rows = group
        kinds = self.step.entry.only.kinds
        return [(i, Doc(row.id, row.text, shard.source, shard.number, first + i, row.columns))
                for i, row in enumerate(rows)
                if row is not None and (not kinds or row.columns["kind"] in kinds)]
