"""Curves of what was judged beside training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sov.obs.events import EventLog
from megatron_sov.report.evaluations import curves, needle_curves, pair_curves, read_evaluations
from megatron_sov.report.run_data import read_run
from megatron_sov.report.sections import sections


def write(run: Path) -> None:
    (run / "evaluations").mkdir(parents=True)
    for step, bits in ((20, 2.5), (100, 1.5)):
        figures = {"ko": {"loss": 1.0, "bits_per_byte": bits, "tokens": 5}}
        (run / f"evaluations/step-{step}.ppl.json").write_text(json.dumps(figures))
    cells = [{"kind": "single", "language": "korean", "correct": right, "samples": 4} for right in (4, 1)]
    (run / "evaluations/step-20.needle.json").write_text(json.dumps({"cells": cells}))
    (run / "evaluations/step-20.pairs.json").write_text(json.dumps({"judged": {"pairs": 8, "right": 0.75}}))
    (run / "evaluations/step-100.needle.failed").write_text("no memory\n")
    (run / "evaluations/step-40.ppl.json").write_text("{torn")
    (run / "evaluations/.step-60.ppl.log").write_text("running")
    EventLog(run / "events.jsonl").close()


def test_files_become_curves_by_step_and_failures_a_table(tmp_path: Path) -> None:
    write(tmp_path)
    found = read_evaluations(tmp_path)
    assert [(b.step, b.task) for b in found] == [(20, "needle"), (20, "pairs"), (20, "ppl"), (40, "ppl"),
                                                 (100, "needle"), (100, "ppl")]
    (bits,), (right,) = curves(found, "bits_per_byte"), needle_curves(found)
    assert (bits.name, bits.steps.tolist(), bits.values.tolist()) == ("ko", [20, 100], [2.5, 1.5])
    assert (right.name, right.steps.tolist(), right.values.tolist()) == ("single, korean", [20], [62.5])
    (ranked,) = pair_curves(found)
    assert (ranked.name, ranked.steps.tolist(), ranked.values.tolist()) == ("judged", [20], [75.0])
    (section,) = sections(read_run(tmp_path))
    assert section.title == "Evaluation beside training" and len(section.charts) == 3
    (table,) = section.tables
    assert ([row[:2] for row in table.rows] == [["40", "ppl"], ["100", "needle"]]
            and table.rows[1][2] == "no memory")


def test_scores_that_a_job_brought_behind_the_end_stand_with_those_of_events(tmp_path: Path,
                                                                             written_scores: Any) -> None:
    (tmp_path / "evaluations").mkdir()
    for step, scores in ((20, [1.0, 0.0]), (40, [1.0, 1.0])):
        written_scores(tmp_path / f"evaluations/step-{step}.lm.json", scores, model=f"export {step}")
    (tmp_path / "evaluations/step-60.lm.json").write_text('{"tasks": [], "model": {"hash": "x"}}')
    log = EventLog(tmp_path / "events.jsonl")
    log.write("eval_lm", **read_evaluations(tmp_path)[0].scores[0] | {"output": "where the run was before"})
    log.close()
    run = read_run(tmp_path)
    assert [(score["step"], score["value"]) for score in run.scores] == [(20, 0.5), (40, 1.0)]
    failures, scores = (next(s for s in sections(run) if s.title == title)
                        for title in ("Evaluation beside training", "Scores"))
    assert len(scores.charts) == 1 and scores.tables[0].rows[0][:4] == ["quiz", "acc", "40", "100.0%"]
    assert failures.tables[0].rows[0][:2] == ["60", "lm"]


def test_a_run_without_them_has_no_section(tmp_path: Path) -> None:
    assert read_evaluations(tmp_path) == []
