"""The last task of a shard: its documents that are kept, sorted into files by the names that they go to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from data_prep.journey.facts import write_shard_facts
from data_prep.pipeline.columns import schema
from data_prep.pipeline.counts import Counts, noted_seal
from data_prep.pipeline.layers import BASE_FIRST, GROUP_BYTES, GROUP_ROWS, Row, TableFile, groups
from data_prep.pipeline.naming import name_of
from data_prep.pipeline.plan import Layer, Plan, SourcePlan
from megatron_sov.errors import UserError
from megatron_sov.sealed import seal_of

MAX_NAMES = 256
"""Sources of the output that one shard may be sorted into; each has a file open."""


@contextmanager
def write_output_shard(plan: Plan, source: SourcePlan, layer: Layer, output: Path,
                       shard: int) -> Iterator[Counts]:
    """Write a folder with a file for each name; it gets its own name when the caller is through with the
    counts.

    Raises:
        UserError: documents would go to more than `MAX_NAMES` names.
    """
    folder = layer.rows(output, shard)
    temporary = folder.with_name(f".{folder.name}.tmp-{os.uname().nodename}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    counts = Counts()
    files = [other.file(output, shard) for other in source.layers[:-1]]
    try:
        with ExitStack() as stack:
            sorted_rows = _Sorter(plan, temporary, stack)
            for rows in groups(source.settings.name, files, [noted_seal(file) for file in files]):
                for row in filter(None, rows):
                    sorted_rows.add(source.settings.name, row)
                    counts.count(row.id, "", row.text, None)
            sorted_rows.finish()
        for file in sorted(temporary.glob("*.parquet")):
            write_shard_facts(file)
        counts.seals = {file.name: seal_of(file) for file in temporary.iterdir()}
        yield counts
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Sorter:
    """Files of one shard, by name."""

    def __init__(self, plan: Plan, folder: Path, stack: ExitStack) -> None:
        self.pattern, self.folder, self.stack = plan.pipeline.output.name, folder, stack
        self.schema = schema(plan.columns(), *BASE_FIRST)
        self.files: dict[str, TableFile] = {}
        self.waiting: dict[str, list[Row]] = {}
        self.waiting_bytes = 0

    def add(self, source: str, row: Row) -> None:
        """Take a document."""
        name = name_of(self.pattern, source, row.columns)
        if name not in self.files:
            if len(self.files) >= MAX_NAMES:
                raise UserError(f"output.name = {self.pattern!r} sorts documents into more than {MAX_NAMES} "
                                f"names (the last: {name}); make names of columns with fewer values")
            self.files[name] = self.stack.enter_context(
                TableFile(self.folder / f"{name}.parquet", self.schema))
        rows = self.waiting.setdefault(name, [])
        rows.append(row)
        self.waiting_bytes += len(row.text)
        if len(rows) >= GROUP_ROWS or self.waiting_bytes >= GROUP_BYTES:
            self.finish()

    def finish(self) -> None:
        """Write what waits."""
        for name, rows in self.waiting.items():
            made: dict[str, list[Any]] = {"id": [row.id for row in rows], "text": [row.text for row in rows]}
            for column in self.schema.names[2:]:
                made[column] = [row.columns.get(column) for row in rows]
            self.files[name].write(made)
        self.waiting, self.waiting_bytes = {}, 0
