"""Scores in the report: benchmarks, evaluations during training, pass@k, and verdicts."""

import json
from pathlib import Path
from typing import Any

from megatron_sov.base.figures import format_share
from megatron_sov.base.pages.page import PageSection
from megatron_sov.publish.report.evaluations import (
    extract_needle_curves, extract_source_curves, read_evaluations)
from megatron_sov.publish.report.outcomes import build_verdict_tables
from megatron_sov.publish.report.run_data import Run, read_run
from megatron_sov.publish.report.scores import read_scores
from megatron_sov.publish.report.sections import SECTIONS, build_sections
from megatron_sov.runs.obs.events import EVENTS, EventLog


def build_section(title: str, **events: list[dict[str, Any]]) -> PageSection:
    """Return the section `title` of a run with these events, given as lists by kind."""
    return SECTIONS[title].build(Run("run", {}, scores=events.get("eval_lm", []), events=events))


def build_score(task: str = "aime24", step: int | None = 100, value: Any = 0.5,
                **fields: Any) -> dict[str, Any]:
    """Return an `eval_lm` event: the score of one task on the checkpoint of `step`."""
    return {"event": "eval_lm", "task": task, "task_hash": "t", "model_hash": f"m{step}", "metric": "acc",
            "k": None, "filter": "none", "mode": "default", "step": step, "value": value,
            "interval": [0.4, 0.6], "items": 30, "failed": 0, "at_limit": 2,
            "sampling": {"temperature": 0.6, "samples": 4}, **fields}


def test_of_one_checkpoint_the_newest_measurement_counts() -> None:
    scores = read_scores([build_score(value=0.1), build_score(step=200, value=0.7), build_score(value=0.3)])
    assert [(s.step, s.value) for s in scores] == [(100, 0.3), (200, 0.7)]
    named = read_scores([build_score(metric="pass@k", k=8),
                         build_score(metric="acc", filter="strict", mode="thinking")])
    assert [s.metric for s in named] == ["pass@8", "acc (strict, thinking)"]


def test_the_section_has_a_line_for_each_task() -> None:
    result = build_section("Scores", eval_lm=[
        build_score(), build_score(step=200, value=0.62, interval=[0.5, 0.7]),
        build_score("own", step=200, value=None, interval=None)])
    assert len(result.charts) == 1 and result.charts[0].plot.series[0].name == "aime24, acc"
    (ours,) = result.tables
    assert ours.rows[0] == ["aime24", "acc", "200", "62 %", "50 % to 70 %", "30", "0", "2"]
    assert ours.rows[1][3:5] == ["not known", "–"]


def test_a_perplexity_is_not_shown_as_a_share() -> None:
    score = build_score(metric="word_perplexity", value=14.2, interval=None)
    result = build_section("Scores", eval_lm=[score])
    assert result.tables[0].rows[0][3] == "14.2"


def test_unusual_steps_and_hashes_break_no_page() -> None:
    events = [build_score(step=1 << 40, task_hash=["a"], model_hash={}), build_score(step=5, task_hash=["a"])]
    assert len(build_section("Scores", eval_lm=events).charts) == 1


# Curves of evaluations during training.

def write_evaluations(run: Path) -> None:
    """Write result files of evaluation jobs: of steps 20 and 100, one failed, one torn, and one that runs."""
    (run / "evaluations").mkdir(parents=True)
    for step, bits in ((20, 2.5), (100, 1.5)):
        by_source = {"ko": {"loss": 1.0, "bits_per_byte": bits, "tokens": 5}}
        (run / f"evaluations/step-{step}.ppl.json").write_text(json.dumps(by_source))
    cells = [{"kind": "single", "language": "korean", "correct": correct, "samples": 4} for correct in (4, 1)]
    (run / "evaluations/step-20.needle.json").write_text(json.dumps({"cells": cells}))
    (run / "evaluations/step-20.pairs.json").write_text(json.dumps(
        {"judged": {"pairs": 8, "chosen_likelier": 0.75}}))
    (run / "evaluations/step-100.needle.failed").write_text("no memory\n")
    (run / "evaluations/step-40.ppl.json").write_text("{torn")
    (run / "evaluations/.step-60.ppl.log").write_text("running")
    EventLog(run / "events.jsonl").close()


def test_files_become_curves_by_step_and_failures_a_table(tmp_path: Path) -> None:
    write_evaluations(tmp_path)
    result = read_evaluations(tmp_path)
    assert [(evaluation.step, evaluation.task) for evaluation in result] == [
        (20, "needle"), (20, "pairs"), (20, "ppl"), (40, "ppl"), (100, "needle"), (100, "ppl")]
    (bits,), (needles,) = extract_source_curves(result, "ppl", "bits_per_byte"), extract_needle_curves(result)
    assert (bits.name, bits.steps.tolist(), bits.values.tolist()) == ("ko", [20, 100], [2.5, 1.5])
    assert (needles.name, needles.steps.tolist()) == ("single, korean", [20])
    assert needles.values.tolist() == [100 * (4 + 1) / (4 + 4)]
    (ranked,) = extract_source_curves(result, "pairs", "chosen_likelier", 100)
    assert (ranked.name, ranked.steps.tolist(), ranked.values.tolist()) == ("judged", [20], [75.0])
    (section,) = build_sections(read_run(tmp_path))
    assert section.title == "Evaluation during training" and len(section.charts) == 3
    (table,) = section.tables
    assert [row[:2] for row in table.rows] == [["40", "ppl"], ["100", "needle"]]
    assert table.rows[1][2] == "no memory"


def test_scores_of_later_jobs_join_those_of_events(tmp_path: Path, written_scores: Any) -> None:
    (tmp_path / "evaluations").mkdir()
    for step, scores in ((20, [1.0, 0.0]), (40, [1.0, 1.0])):
        written_scores(tmp_path / f"evaluations/step-{step}.lm.json", scores, model=f"export {step}")
    (tmp_path / "evaluations/step-60.lm.json").write_text('{"tasks": [], "model": {"hash": "x"}}')
    log = EventLog(tmp_path / "events.jsonl")
    # the run was moved since: its first score is also an event, with another path
    log.write("eval_lm", **read_evaluations(tmp_path)[0].scores[0] | {"output": "where the run was before"})
    log.close()
    run = read_run(tmp_path)
    assert [(score["step"], score["value"]) for score in run.scores] == [(20, 0.5), (40, 1.0)]
    failures, scores = (next(s for s in build_sections(run) if s.title == title)
                        for title in ("Evaluation during training", "Scores"))
    assert len(scores.charts) == 1 and scores.tables[0].rows[0][:4] == ["quiz", "acc", "40", "100 %"]
    assert failures.tables[0].rows[0][:2] == ["60", "lm"]


# pass@k of a run's models in its report.

SAMPLING = {"temperature": 0.8, "top_p": 0.95, "seed": 3}


def build_pass_k(share: float) -> dict:
    """Return the fields of a `passk` event in which pass@1, pass@8 and the mean reward are `share`."""
    rows = [{"k": k, "value": share, "interval": [share - 0.1, share + 0.1], "num_prompts": 30}
            for k in (1, 8)]
    return {"num_prompts": 30, "num_samples": 240, "statuses": {"scored": 233, "timeout": 7},
            "num_unscored": 5, "mean_reward": share, "pass_at_k": rows, "maj_at_k": rows[:1]}


def test_each_prompt_set_has_a_curve_of_its_newest_scores(tmp_path: Path) -> None:
    log = EventLog(tmp_path / EVENTS)
    for step, share in ((100, 0.2), (200, 0.3), (200, 0.4)):
        log.write("passk", step=step, input="data/aime.jsonl", reward="math", sampling=SAMPLING,
                  **build_pass_k(share))
    log.close()
    (section,) = build_sections(read_run(tmp_path))
    assert section.title == "pass@k" and len(section.charts) == 2
    assert section.charts[1].caption == "aime.jsonl, math, step 200: 95 % intervals over 30 prompts."
    assert [row[1:] for row in section.tables[0].rows] == [
        [step, "30", "240", "5", f"{format_share(share)} (k = 1)", f"{format_share(share)} (k = 8)",
         f"{share:.4f}", "temperature 0.8, top-p 0.95, seed 3"]
        for step, share in (("100", 0.2), ("200", 0.4))]
    assert [series.name for series in section.charts[1].plot.series] == ["pass@k", "maj@k"]


def test_files_with_equal_names_are_separate_prompt_sets() -> None:
    events = [{"step": 1, "input": file, "reward": "math", **build_pass_k(0.5)}
              for file in ("gsm8k/test.jsonl", "math/test.jsonl", "aime.jsonl")]
    result = build_section("pass@k", passk=events)
    assert [row[0] for row in result.tables[0].rows] == [
        "gsm8k/test.jsonl, math", "math/test.jsonl, math", "aime.jsonl, math"]


# Verdicts in one table: subject, outcome, figure.

def list_verdicts(runs: list[Path]) -> list[list[str]]:
    """Return the rows of the verdict table of these run folders, as text without HTML tags."""
    tables = build_verdict_tables([read_run(path) for path in runs])
    return [[cell.striptags() if hasattr(cell, "striptags") else cell for cell in row]
            for table in tables for row in table.rows]


def test_every_judgement_has_a_row(runs: list[Path], toy: Path) -> None:
    assert list_verdicts([toy])[1] == [
        "Gate", "passed",
        "retrieval: needles 85 %, 80 % needed; short-context loss 2.000, limit 2.100; step 10"]
    assert list_verdicts(runs) == [
        ["Stages", "2 of 2", "pretrain, extend: complete"],
        ["Needles", "no gate set", "extend: 97 % found, up to 2,048 tokens"],
        ["Export", "passed", "pretrain: 2 of 2 checks"]]


def test_failed_evaluations_are_named(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("run_start", resumed_from=0)
    log.write("eval", step=1, heldout={name: {"loss": 1.0, "bits_per_byte": bits, "tokens": 5}
                                       for name, bits in (("en", 1.5), ("ko", 2.5))})
    log.write("gate", step=7, passed=False, judged=False, threshold=0.8, loss=2.5, loss_limit=2.1, rows=[])
    log.write("stop", step=7, reason="time limit")
    log.write("conversion", target="hf", checks=[{"name": "a", "value": 1, "limit": 0, "passed": False},
                                                 {"name": "b", "value": 0, "limit": 0, "passed": True}])
    name = tmp_path.name
    assert list_verdicts([tmp_path]) == [
        ["Stages", "0 of 1", f"{name} stopped: time limit"],
        ["Gate", "FAILED", f"{name}: short-context loss 2.500, limit 2.100; step 7"],
        ["Export", "FAILED", f"{name}: 1 of 2 checks"]]
