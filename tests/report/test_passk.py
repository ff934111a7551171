"""pass@k of a run's models in its report."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_sov.obs.events import EVENTS, EventLog
from megatron_sov.report.passk import passk_section
from megatron_sov.report.run_data import read_run
from megatron_sov.report.sections import sections

SAMPLING = {"temperature": 0.8, "top_p": 0.95, "seed": 3}


def figures(share: float) -> dict:
    rows = [{"k": k, "value": share, "interval": [share - 0.1, share + 0.1], "num_prompts": 30}
            for k in (1, 8)]
    return {"num_prompts": 30, "num_samples": 240, "statuses": {"scored": 233, "timeout": 7},
            "num_unscored": 5, "mean_reward": share, "pass_at_k": rows, "maj_at_k": rows[:1]}


def test_a_curve_for_each_set_of_prompts_and_step_and_the_newest_counts(tmp_path: Path) -> None:
    log = EventLog(tmp_path / EVENTS)
    for step, share in ((100, 0.2), (200, 0.3), (200, 0.4)):
        log.write("passk", step=step, input="data/aime.jsonl", reward="math", sampling=SAMPLING,
                  **figures(share))
    log.close()
    (section,) = sections(read_run(tmp_path))
    assert section.title == "pass@k" and len(section.charts) == 2
    assert section.charts[1].caption == "aime.jsonl, math, step 200: 95 % intervals over 30 prompts."
    assert [row[1:] for row in section.tables[0].rows] == [
        [step, "30", "240", "5", f"{share:.1%} (k = 1)", f"{share:.1%} (k = 8)", f"{share:.4f}",
         "temperature 0.8, top-p 0.95, seed 3"] for step, share in (("100", 0.2), ("200", 0.4))]
    curves = json.loads(section.charts[1].figure_json)["data"]
    assert [c["name"] for c in curves] == ["pass@k", "maj@k"]


def test_files_of_one_name_are_two_sets_of_prompts() -> None:
    events = [{"step": 1, "input": file, "reward": "math", **figures(0.5)}
              for file in ("gsm8k/test.jsonl", "math/test.jsonl", "aime.jsonl")]
    section = passk_section(events)
    assert [row[0] for row in section.tables[0].rows] == [
        "gsm8k/test.jsonl, math", "math/test.jsonl, math", "aime.jsonl, math"]
