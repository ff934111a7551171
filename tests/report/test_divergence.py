"""The distance from a teacher in the report."""

from __future__ import annotations

from pathlib import Path

from megatron_sov.obs.events import EventLog
from megatron_sov.report.run_data import read_run
from megatron_sov.report.sections import sections


def test_the_first_and_the_last_distance_of_each_source_stand_side_by_side(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for step, kl in ((0, 2.5), (40, 0.25)):
        log.write("heldout_divergence", step=step, source="chat", tokens=1200, divergence=kl / 2, kl=kl)
    log.close()
    (section,) = [s for s in sections(read_run(tmp_path)) if s.title == "Distance from the teacher"]
    assert section.tables[0].rows == [["chat", "1,200", "2.5 (step 0)", "0.25 (step 40)", "1.25 (step 0)",
                                       "0.125 (step 40)"]]
