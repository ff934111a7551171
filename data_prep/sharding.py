"""Token shards of one source and split: a new one is begun where the next document would
make one too large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.media.packing import SourceBanks
from megatron_sov.documents.indexed_writer import IndexedWriter
from megatron_sov.media.banks import MEDIA


@dataclass
class ShardRecord:
    """What the manifest holds of one shard."""

    prefix: str
    """Path of its files without their endings, inside the artifact."""
    num_documents: int = 0
    """Sequences; a preference is two."""
    num_tokens: int = 0
    """Ids."""
    num_bytes: int = 0
    """UTF-8 bytes of the text behind them."""


class ShardedWriter:
    """Writes one split as one or more shards; there is always one, which may be empty."""

    def __init__(self, artifact: Path, name: str, dtype: str, sidecars: Mapping[str, str], extra: bool,
                 group: int, shard_tokens: int, banks: SourceBanks | None = None) -> None:
        """Begin the first shard.

        Args:
            artifact: folder of the artifact.
            name: source and split, e.g. "english/train"; shards are numbered behind it.
            dtype: dtype of ids.
            sidecars: ending -> dtype of the files beside.
            extra: whether `.extra.jsonl` is written, a line for each document.
            group: sequences that stay together.
            shard_tokens: most tokens of a shard, unless one document has more.
            banks: those of the source's documents; None: they have none.
        """
        self._artifact, self._name, self._dtype, self._sidecars, self._extra = (artifact, name, dtype,
                                                                                sidecars, extra)
        self._group, self._shard_tokens, self._source_banks = group, shard_tokens, banks
        self.shards: list[ShardRecord] = []
        self._begin()

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._end(kind, error, trace)

    def _begin(self) -> None:
        self.shards.append(ShardRecord(f"{self._name}-{len(self.shards):05d}"))
        prefix = self._artifact / self.shards[-1].prefix
        self._writer = IndexedWriter(prefix, self._dtype, self._sidecars)
        self._banks = self._source_banks.opened(prefix) if self._source_banks else None
        self._lines: IO[bytes] | None = (open(f"{prefix}.extra.jsonl", "wb")  # noqa: SIM115  (closed in _end)
                                         if self._extra else None)

    def _end(self, kind: type[BaseException] | None = None, error: BaseException | None = None,
             trace: TracebackType | None = None) -> None:
        self._writer.__exit__(kind, error, trace)
        if self._lines is not None:
            self._lines.close()
        if self._banks is not None:
            self._banks.close()

    def write(self, lengths_tokens: NDArray[np.int32], sizes_bytes: NDArray[np.int64],
              columns: dict[str, NDArray[np.generic]], extra: Sequence[bytes]) -> None:
        """Append sequences: tokens and bytes of each, columns as in `IndexedWriter`,
        extra lines (one each, or none at all)."""
        ends = np.cumsum(lengths_tokens, dtype=np.int64)
        done = 0
        while done < len(lengths_tokens):
            passed = int(ends[done - 1]) if done else 0
            stop = int(np.searchsorted(ends, passed + self._shard_tokens - self.shards[-1].num_tokens,
                                       side="right"))
            stop = done + (stop - done) // self._group * self._group
            if stop <= done:
                if self.shards[-1].num_documents:
                    self._end()
                    self._begin()
                    continue
                stop = done + self._group  # a document above the limit has a shard of its own
            part = slice(passed, int(ends[stop - 1]))
            here = {suffix: column[part] for suffix, column in columns.items()}
            if self._banks is not None:
                here[MEDIA] = self._banks.moved(here["bin"], here[MEDIA].astype(np.int64))
            self._writer.write(lengths_tokens[done:stop], here)
            if self._lines is not None:
                self._lines.writelines(extra[done:stop])
            shard = self.shards[-1]
            shard.num_documents += stop - done
            shard.num_tokens += part.stop - part.start
            shard.num_bytes += int(sizes_bytes[done:stop].sum())
            done = stop

    def record(self) -> dict[str, Any]:
        """Return the manifest's record of the split: its shards and their sums."""
        shards = [asdict(s) for s in self.shards]
        counts = ("num_documents", "num_tokens", "num_bytes")
        return {"shards": shards} | {field: sum(s[field] for s in shards) for field in counts}
