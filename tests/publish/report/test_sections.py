"""Key figures and sections of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import new_artifact
from megatron_sov.base.figures import format_share
from megatron_sov.base.pages.page import Chart, PageSection
from megatron_sov.publish.report.page import of_one_model, opening, render
from megatron_sov.publish.report.run_data import Run, read_rounds, read_run
from megatron_sov.publish.report.sections import SECTIONS, cut_lines, key_figures, sections
from megatron_sov.runs.lock import RunLock
from megatron_sov.runs.obs.events import EventLog
from megatron_sov.runs.obs.wall_time import CATEGORIES, WallTime


def section(run_dir: Path, title: str) -> PageSection:
    return next(s for s in sections(read_run(run_dir)) if s.title == title)


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("conversion", target="hf",
              checks=[{"name": "logits", "value": 2e-3, "limit": 1e-3, "passed": False}])
    run = read_run(tmp_path)
    assert [s.title for s in sections(run)] == ["Proof of the conversion"]
    assert {p.title for p in opening([Run("a", {})])} == set()
    assert key_figures(run) == []
    assert '<span class="bad">FAILED</span>' in render([run])


def test_a_run_that_has_just_begun_says_so(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").touch()
    assert "This run has recorded nothing yet." in render([read_run(tmp_path)])


def test_key_figures(runs: list[Path]) -> None:
    found = {label: (value, detail) for label, value, detail in key_figures(read_run(runs[1]))}
    assert found["Parameters"] == ("2.89 M", "1.12 M active for each token")
    assert found["Tokens trained"] == ("1.64 M", "400 steps")
    assert found["Needle score"] == ("97 %", "up to 2,048 tokens")
    # The three sources have the same tokens and bytes a token, so all together have the mean
    # loss's bits per byte.
    best = (2.3 + 2.6 + 1.8) / 3 + 5 * math.exp(-400 / 70)
    assert found["Best held-out"] == (f"{best / math.log(2) / 3.4:.4f}", "bits per byte, step 400")


def test_phase_table_counts_tokens_and_loss_of_each_phase(runs: list[Path]) -> None:
    loss = read_run(runs[0]).curve("loss").values
    first, second = section(runs[0], "Training loss").tables[0].rows
    # 250 x 4096
    assert first[:6] == ["1", "1 to 250", "256", "8 to 16", "english 60 %, korean 20 %, code 20 %", "1.02 M"]
    assert second[:6] == ["2.A", "251 to 400", "256", "16", "english 25 %, korean 50 %, code 25 %", "614.4 K"]
    assert second[6:] == [f"{loss[250]:.4g}", f"{loss[393:].mean():.4g}"]  # the last 7 of 150 steps


def test_heldout_table_sets_bits_beside_the_bigrams(runs: list[Path]) -> None:
    rows = {row[0]: row for row in section(runs[0], "Held-out loss").tables[0].rows}
    bits = (1.8 + 5 * math.exp(-400 / 70)) / math.log(2) / 3.4
    assert rows["code"][4:] == [f"{bits:.4g}", "2.9", f"{format_share(1 - bits / 2.9)} fewer"]


def test_warnings_and_skipped_stretches_stand_by_step(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for step in (7, 4, 5, 6, 9, 5):  # a stretch that was done again after a restart counts once
        log.write("skip", step=step, reason="data.skip_steps")
    log.write("warning", step=8, text="source ko is in epoch 4.1")
    assert section(tmp_path, "Warnings, guards and faults").tables[0].rows == [
        ["4", "steps 4 to 7 were passed over: their samples were drawn and not learned"],
        ["8", "source ko is in epoch 4.1"],
        ["9", "step 9 was passed over: their samples were drawn and not learned"]]


def test_data_table_gives_the_difference_to_the_plan(runs: list[Path]) -> None:
    assert section(runs[0], "Data consumed").tables[0].rows[0] == ["english", "820,000", "819,200", "+0.10 %"]


def test_starts_and_restarts_are_told_with_their_reasons(runs: list[Path]) -> None:
    first, second = section(runs[0], "Starts, stops and restarts").tables[0].rows
    assert (first[2] == "from the beginning" and first[5] == "233"
            and first[7].startswith("ended without a word"))
    assert (second[2] == "from step 200 (continued from step-200)" and second[5] == "400"
            and second[7] == "complete")
    assert second[3:5] == ["2 (tp 1, pp 1, ep 2, dp 2)", "cpu Example CPU, cores 2"]


def test_long_and_many_samples_are_cut_and_the_reader_is_told(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for _ in range(30):
        log.write("sample", step=5, prompt="p", text="x" * 4100)
    shown = section(tmp_path, "Samples")
    assert len(shown.samples) == 24 and shown.text.endswith("6 more are in the run's events.")
    assert shown.samples[0]["text"] == "x" * 2000 + "\n… (2,100 more characters)"


# The distance from a teacher, and held-out pairs: first and last of each source side by side.


@pytest.mark.parametrize(("title", "kind", "events", "rows"), [
    ("Distance from the teacher", "heldout_divergence",
     [{"step": step, "source": "chat", "tokens": 1200, "divergence": kl / 2, "kl": kl}
      for step, kl in ((0, 2.5), (40, 0.25))],
     [["chat", "1,200", "2.5 (step 0)", "0.25 (step 40)", "1.25 (step 0)", "0.125 (step 40)"]]),
    ("Held-out pairs", "heldout_pairs",
     [{"step": step, "source": source, "pairs": pairs,
      "chosen_likelier": right if source == "pairs" else 0.5, "pairs_right": right, "margin": right / 2}
      for step, right in ((0, 0.25), (40, 0.875), (20, 0.5))  # the last one by `eval pairs --run`, later
      for source, pairs in (("pairs", 1200), ("others", 8))],
     [["pairs", "1,200", "25 % (step 0)", "87.5 % (step 40)", "0.125 (step 0)", "0.4375 (step 40)",
       "25 % (step 0)", "87.5 % (step 40)"],
      ["others", "8", "25 % (step 0)", "87.5 % (step 40)", "0.125 (step 0)", "0.4375 (step 40)",
       "50 % (step 0)", "50 % (step 40)"]])])
def test_the_first_and_the_last_figures_of_each_source_stand_side_by_side(
        tmp_path: Path, title: str, kind: str, events: list[dict], rows: list[list[str]]) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for event in events:
        log.write(kind, **event)
    log.close()
    assert section(tmp_path, title).tables[0].rows == rows


# Turns of held-out conversations, and what they say, in the report.


def test_later_turns_stand_beside_the_first_ones_and_calls_beside_answers(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for step, loss in ((10, 3.0), (20, 2.0)):
        first = {"first": {"loss": loss, "tokens": 1200}}
        log.write("eval", step=step, heldout={
            "chat": {"loss": loss, "bits_per_byte": 1.0, "tokens": 1800,
                     "turns": {**first, "later": {"loss": loss / 2, "tokens": 600}},
                     "kinds": {"call": {"loss": loss / 4, "tokens": 300},
                               "answer": {"loss": loss, "tokens": 1500}}},
            "single": {"loss": loss, "bits_per_byte": 1.0, "tokens": 1200, "turns": first,
                       "kinds": {"answer": {"loss": loss, "tokens": 1200}}},
            "text": {"loss": loss, "bits_per_byte": 1.0, "tokens": 9}})
    log.close()
    (heldout,) = [s for s in sections(read_run(tmp_path)) if s.title == "Held-out loss"]
    assert heldout.tables[1].rows == [["chat", "first", "1,200", "3", "2"],
                                      ["chat", "later", "600", "1.5", "1"]]
    assert heldout.tables[2].rows == [["chat", "call", "300", "0.75", "0.5"],
                                      ["chat", "answer", "1,500", "3", "2"]]


# Rounds of reinforcement learning in the report, from the manifests that they were published with.


def publish(run: Path, number: int, **content: object) -> None:
    with new_artifact(run / "rounds" / f"{number:04d}", "tokens") as artifact:
        artifact.content = {"round": number, **content}


def means(reward: float, **more: object) -> dict[str, object]:
    return {"responses": 64, "reward": reward, "components": {"right": reward, "<b>form</b>": 1.0},
            "response_tokens": 12.5, "truncated": 0.25, "staleness_steps": 0.0,
            "domains": {"sums": {"responses": 64, "reward": reward}}} | more


def values(chart: Chart) -> dict[str, list[float]]:
    return {curve.name: list(curve.y) for curve in chart.plot.series}


def test_a_round_is_a_point_of_each_curve_and_a_row(tmp_path: Path) -> None:
    publish(tmp_path, 2, means={**means(0.75), "pass_rate": 0.625}, groups={"learns": 6, "all right": 2},
            late=[["p", 1]],
            late_from=[[1, "q", 0, ""], [1, "q", 3, "all_right"]], unjudged={"failed": 3})
    publish(tmp_path, 1, means=means(0.5), groups={"learns": 8}, late=[], unjudged={})
    told: list[dict[str, Any]] = [{"round": 2, "reverse_kl": 0.25, "reverse_kl_domains": {"sums": 0.5}}]
    section = SECTIONS["Rounds"].of(Run("rl", {}, rounds=read_rounds(tmp_path), events={"round": told}))
    assert values(section.charts[2]) == {"all": [0.25], "sums": [0.5]}
    assert values(section.charts[0]) == {"reward": [0.5, 0.75], "<b>form</b>": [1, 1],
                                         "right": [0.5, 0.75]}
    assert values(section.charts[-1]) == {"all right": [0, 2], "learns": [8, 6]}
    assert section.tables[0].rows == [
        ["1", "64", "0.5000", "–", "12.5", "25 %", "8", "–", "–", "0", "0"],
        ["2", "64", "0.7500", "62.5 %", "12.5", "25 %", "6", "all right 2", "failed 3", "1", "2"]]


def test_a_round_without_a_judged_response_and_a_damaged_one_break_nothing(tmp_path: Path) -> None:
    publish(tmp_path, 1, means={"responses": 0}, groups={}, late=[], unjudged={"failed": 9})
    publish(tmp_path, 2, means=means(0.5), groups={"learns": 1}, late=[], unjudged={})
    (tmp_path / "rounds" / "0002" / "manifest.json").write_text("{")
    rows = SECTIONS["Rounds"].of(Run("rl", {}, rounds=read_rounds(tmp_path))).tables[0].rows
    assert [row[0] for row in rows] == ["1"] and rows[0][-3] == "failed 9"


# Which runs trained one model.


def names(*paths: Path) -> tuple[list[str], list[str]]:
    """Return the runs of the one model, and those of others."""
    own, others = of_one_model([read_run(path) for path in paths])
    return [run.name for run in own], [run.name for run in others]


def test_a_run_of_another_size_or_architecture_is_apart(runs: list[Path], toy: Path) -> None:
    assert names(runs[0], toy, runs[1]) == (["pretrain", "extend"], ["retrieval"])


def test_the_first_run_says_which_model_it_is(runs: list[Path], toy: Path) -> None:
    assert names(toy, *runs) == (["retrieval"], ["pretrain", "extend"])


def test_a_run_that_has_not_recorded_its_size_is_kept_with_the_first(runs: list[Path],
                                                                     tmp_path: Path) -> None:
    EventLog(tmp_path / "events.jsonl").write("step", step=1, loss=1.0)
    for order in ((runs[0], tmp_path), (tmp_path, runs[0])):
        assert names(*order)[1] == []


# Where the time went.


def test_the_sentence_and_the_table_of_the_time_agree() -> None:
    spent_s = {"productive": 3000.0, "lost": 600.0, "evaluation": 120.0, "saving": 30.0, "startup": 150.0,
               "waiting": 100.0}
    section = SECTIONS["Where the time went"].of(Run("r", {}, wall_time=WallTime(0.0, spent_s)))
    (table,) = section.tables
    assert [row[0] for row in table.rows] == list(CATEGORIES.values())
    assert table.rows[1] == ["lost steps", "10 min 0 s", "15 %"]
    assert section.text == "75 % of 1 h 6 min since the first start moved the model forward."


def test_a_living_run_keeps_its_steps_after_the_last_checkpoint(tmp_path: Path) -> None:
    lines = [{"event": "run_start", "time_s": 0.0, "began_s": 0.0},
             {"event": "step", "step": 1, "time_s": 8.0, "step_time_s": 8.0}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lock = RunLock(tmp_path)
    lock.acquire()
    living = read_run(tmp_path).wall_time
    lock.release()
    ended = read_run(tmp_path).wall_time
    assert living is not None and living.spent_s["productive"] == 8
    assert ended is not None and ended.spent_s["lost"] == 8


# Samples end with a whole line.


@pytest.mark.parametrize(("text", "shown"), [
    ("short", "short"), ("exactly 10", "exactly 10"), ("", ""),
    ("one line\nand another", "one line\n… (12 more characters)"),
    ("0123456789\nnext", "0123456789\n… (5 more characters)"),
    ("many words of one line", "many words\n… (12 more characters)"),
    ("0123456789abcdef", "0123456789\n… (6 more characters)"),
    ("가나다 라마바사아자차카", "가나다\n… (9 more characters)"),
    ("a\n\nb\ncdefghij", "a\n\nb\n… (9 more characters)")])
def test_a_long_sample_ends_with_a_whole_line_or_word(text: str, shown: str) -> None:
    assert cut_lines(text, 10) == shown
