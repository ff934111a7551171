"""Held-out pairs in the report."""

from __future__ import annotations

from pathlib import Path

from megatron_sov.obs.events import EventLog
from megatron_sov.report.run_data import read_run
from megatron_sov.report.sections import sections


def test_the_first_and_the_last_ranking_of_each_source_stand_side_by_side(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for step, right in ((0, 0.25), (40, 0.875), (20, 0.5)):  # the last one by `eval pairs --run`, later
        log.write("heldout_pairs", step=step, source="pairs", pairs=1200, right=right)
        log.write("heldout_pairs", step=step, source="others", pairs=8, right=0.5)
    log.close()
    (section,) = [s for s in sections(read_run(tmp_path)) if s.title == "Held-out pairs"]
    assert section.tables[0].rows == [["pairs", "1,200", "25.0% (step 0)", "87.5% (step 40)"],
                                      ["others", "8", "50.0% (step 0)", "50.0% (step 40)"]]
