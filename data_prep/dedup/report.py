"""What the report's page shows of a search for duplicates: between which sources they lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from data_prep.dedup.numbering import Numbering, ranks
from data_prep.dedup.work_files import Records
from data_prep.pipeline.step import View
from megatron_sov.artifacts import new_file, to_json

MOST_ROWS = 50


def write_report(view: View, lists: Callable[[int], Records], title: str,
                 bars: list[dict[str, Any]] | None = None) -> None:
    """Write `report.json` into a step's work folder.

    Args:
        view: the pipeline.
        lists: rank -> records with `doc` and `keeper` of what goes from a shard.
        title: of the table.
        bars: charts beside it.
    """
    numbering = Numbering(view)
    between: Counter[tuple[str, str]] = Counter()
    for rank, shard in enumerate(numbering.shards):
        kept_by = Counter(ranks(lists(rank)["keeper"]).tolist())
        for keeper_rank, count in kept_by.items():
            between[shard.source, numbering.shards[keeper_rank].source] += count
    rows = [[dropped, kept, count] for (dropped, kept), count in
            sorted(between.items(), key=lambda item: (-item[1], item[0]))[:MOST_ROWS]]
    write_page(view, {"tables": [{"title": title, "head": ["dropped from", "kept in", "documents"],
                                  "rows": rows}], "bars": bars or [], "notes": []})


def write_page(view: View, page: dict[str, Any]) -> None:
    """Write what the report's page shows of a step."""
    with new_file(view.work / "report.json", makes_parents=True) as temporary:
        temporary.write_text(to_json(page), encoding="utf-8")
