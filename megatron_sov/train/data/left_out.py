"""Documents whose places stay empty (`data.without`), as if the run had never read them."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sov.base.errors import UserError, nearest
from megatron_sov.model.config.data import documents_named
from megatron_sov.train.data.streams import Row
from megatron_sov.train.data.token_shards import Source
from megatron_sov.train.data.views import LONG, SHORT


@dataclass(frozen=True)
class DocumentsLeftOut:
    """Documents of one source."""

    starts: Sequence[int]
    """First document of each stretch, ascending; stretches do not touch."""
    ends: Sequence[int]
    """Behind the last of each."""

    def __contains__(self, document: int) -> bool:
        place = bisect.bisect_right(self.starts, document) - 1
        return place >= 0 and document < self.ends[place]

    def kept(self, row: Row) -> Row:
        """Return a row without the parts of these documents."""
        return tuple(segment for segment in row if segment.document not in self)

    def counts(self, source: Source) -> tuple[int, int]:
        """Return how many documents these are, and their tokens."""
        lengths = source.shard("train").lengths
        documents = [np.arange(*stretch) for stretch in zip(self.starts, self.ends, strict=True)]
        return sum(map(len, documents)), sum(int(np.asarray(lengths[each]).sum()) for each in documents)


def left_out(without: Sequence[str], sources: Sequence[Source]) -> Mapping[str, DocumentsLeftOut]:
    """Return what is left out of each source that is named; of a pair that has one of them both.

    Args:
        without: `data.without`.
        sources: what is read.

    Raises:
        UserError: there is no such source or document.
    """
    # what a reference says stands beside the documents of an artifact, under their numbers
    by_name = {source.name: source for source in sources if source.artifact is not None}
    stretches: dict[str, list[tuple[int, int]]] = {}
    for named in without:
        name, first, last = documents_named(named)
        if name not in by_name:
            raise UserError(f"data.without: {named}: there is no source {name!r}; the run reads "
                            f"{', '.join(by_name)}{nearest(name, by_name)}")
        # a view has numbers of its own, and a long document is read by its source too
        views = [s.name for s in sources if s.name.startswith((name + LONG, name + SHORT))]
        if views:
            raise UserError(f"data.without: {named}: the blend has {views[0]}, a view of {name} with numbers "
                            "of its own; blend the source itself")
        count, group = len(by_name[name].shard("train").lengths), by_name[name].group
        end = count if last is None else last + 1
        if end > count:
            raise UserError(f"data.without: {named}: {name} has {count:,} training documents, numbered from "
                            "0; name some of these")
        stretches.setdefault(name, []).append((first // group * group, min(-(-end // group) * group, count)))
    return {name: _joined(found) for name, found in stretches.items()}


def _joined(stretches: list[tuple[int, int]]) -> DocumentsLeftOut:
    starts: list[int] = []
    ends: list[int] = []
    for start, end in sorted(stretches):
        if ends and start <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            starts.append(start)
            ends.append(end)
    return DocumentsLeftOut(tuple(starts), tuple(ends))
