"""Key figures and sections of a run."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_sov.obs.events import EventLog
from megatron_sov.pages.content import Section
from megatron_sov.report.page import render
from megatron_sov.report.run_data import read_run
from megatron_sov.report.sections import key_figures, sections


def section(run_dir: Path, title: str) -> Section:
    return next(s for s in sections(read_run(run_dir)) if s.title == title)


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("conversion", target="hf",
              checks=[{"name": "logits", "value": 2e-3, "limit": 1e-3, "passed": False}])
    run = read_run(tmp_path)
    assert [s.title for s in sections(run)] == ["Proof of the conversion"]
    assert key_figures(run) == []
    assert '<span class="bad">FAILED</span>' in render([run])


def test_a_run_that_has_just_begun_says_so(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").touch()
    assert "This run has recorded nothing yet." in render([read_run(tmp_path)])


def test_key_figures(runs: list[Path]) -> None:
    found = {label: (value, detail) for label, value, detail in key_figures(read_run(runs[1]))}
    assert found["Parameters"] == ("2.891 M", "1.12 M active for each token")
    assert found["Tokens trained"] == ("1.638 M", "400 steps")
    assert found["Needle score"] == ("97.0%", "up to 2,048 tokens")
    # The three sources have the same tokens and bytes a token, so all together have the mean
    # loss's bits per byte.
    best = (2.3 + 2.6 + 1.8) / 3 + 5 * math.exp(-400 / 70)
    assert found["Best held-out"] == (f"{best / math.log(2) / 3.4:.4f}", "bits per byte, step 400")


def test_the_plan_of_the_settings_stands_beside_what_was_done(runs: list[Path], tmp_path: Path) -> None:
    (plan,) = [s for s in sections(read_run(runs[0])) if s.title.startswith("Plan")]
    assert [c.caption for c in plan.charts] == ["Planned learning rate.",
                                                "Planned tokens of a step: samples times their length."]
    assert plan.tables[0].rows[-1][0] == "200"
    for settings in ('{"recipe": "of-another-version", "model": {}}', '{"data": 3}'):
        (tmp_path / "config.json").write_text(settings)
        (tmp_path / "events.jsonl").touch()
        assert not [s for s in sections(read_run(tmp_path)) if s.title.startswith("Plan")]


def test_phase_table_counts_tokens_and_loss_of_each_phase(runs: list[Path]) -> None:
    loss = read_run(runs[0]).curve("loss").values
    first, second = section(runs[0], "Training loss").tables[0].rows
    # 250 x 4096
    assert first[:6] == ["1", "1 to 250", "256", "8 to 16", "english 60%, korean 20%, code 20%", "1.024 M"]
    assert second[:6] == ["2.A", "251 to 400", "256", "16", "english 25%, korean 50%, code 25%", "614.4 K"]
    assert second[6:] == [f"{loss[250]:.4g}", f"{loss[393:].mean():.4g}"]  # the last 7 of 150 steps


def test_heldout_table_sets_bits_beside_the_bigrams(runs: list[Path]) -> None:
    rows = {row[0]: row for row in section(runs[0], "Held-out loss").tables[0].rows}
    bits = (1.8 + 5 * math.exp(-400 / 70)) / math.log(2) / 3.4
    assert rows["code"][4:] == [f"{bits:.4g}", "2.9", f"{1 - bits / 2.9:.1%} fewer"]


def test_padding_is_drawn_beside_the_data(runs: list[Path]) -> None:
    assert [c.caption for c in section(runs[0], "Data consumed").charts][1:] == [
        "Part of each batch that is padding."]


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
    assert section(runs[0], "Data consumed").tables[0].rows[0] == ["english", "820,000", "819,200", "+0.10%"]


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
    assert shown.samples[0]["text"] == "x" * 4000 + " … (100 more characters)"
