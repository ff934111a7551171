"""Events and artifacts of a run as plain data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import manifest_sha256
from megatron_sov.base.errors import UserError
from megatron_sov.publish.report.run_data import read_run
from megatron_sov.runs.obs.events import EventLog, read_events


def test_a_crash_and_a_restart_make_two_attempts_and_one_curve(runs: list[Path]) -> None:
    run = read_run(runs[0])
    assert run.curve("loss").steps.tolist() == list(range(1, 401))
    written = [e for e in read_events(runs[0] / "events.jsonl") if e["event"] == "step" and e["step"] == 220]
    assert len(written) == 2 and written[0]["loss"] != written[1]["loss"]
    assert run.curve("loss").values[219] == written[1]["loss"]
    first, second = run.attempts
    assert (first.last_step, first.outcome) == (233, "ended without a word (killed, or still running)")
    assert (second.last_step, second.outcome, second.resume_reason) == (
        400, "complete", "continued from step-200")


def test_wall_time_leaves_out_the_pause_between_attempts(tmp_path: Path) -> None:
    times = [("run_start", 100.0), ("step", 130.0), ("run_start", 5000.0), ("step", 5010.0), ("stop", 5020.0),
             ("conversion", 99999.0)]
    lines = [json.dumps({"event": event, "time_s": time_s, "step": 1, "reason": "time limit"})
             for event, time_s in times]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    run = read_run(tmp_path)
    assert run.wall_s() == 30 + 20
    assert run.attempts[1].outcome == "stopped: time limit"


def test_phases_end_where_the_next_begins(runs: list[Path]) -> None:
    phases = read_run(runs[0]).phases
    assert [(p.name, p.first_step, p.last_step) for p in phases] == [("1", 1, 250), ("2.A", 251, 400)]
    assert phases[1].blend == {"english": 1, "korean": 2, "code": 1}


def test_phases_announced_ahead_are_shown_once_reached(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for name, seq_len in (("short", 64), ("long", 128), ("never", 256)):
        log.write("phase", step=0, name=name, seq_len=seq_len, blend={})
    for step in range(1, 7):
        log.write("step", step=step, loss=1.0, phase="short" if step < 5 else "long")
    phases = read_run(tmp_path).phases
    assert [(p.name, p.first_step, p.last_step, p.seq_len_tokens) for p in phases] == [
        ("short", 1, 4, 64), ("long", 5, 6, 128)]


def test_the_last_start_says_what_the_phases_are(tmp_path: Path) -> None:
    """The second start lengthens the samples: what the first one had planned for later does not count."""
    log = EventLog(tmp_path / "events.jsonl")
    for plan in ([(0, 64, 4), (9, 64, 8)], [(0, 64, 4), (2, 128, 6)]):
        log.write("run_start", resumed_from=0)
        for step, seq_len, size in plan:
            log.write("phase", step=step, name="main", seq_len=seq_len, global_batch_size=size, blend={})
    log.write("step", step=3, loss=1.0, phase="main")
    (phase,) = read_run(tmp_path).phases
    assert (phase.seq_len_tokens, phase.batch_sizes) == (128, (4, 6))


def test_a_resume_is_told_by_the_attempt_that_it_opens_whether_before_or_after_its_start(
        tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for before in (True, False):
        if before:
            log.write("resume", step=1, reason="continued from step-1")
        log.write("run_start", resumed_from=1)
        if not before:
            log.write("resume", step=1, reason="the node was lost")
        log.write("step", step=2, loss=1.0)
    assert [a.resume_reason for a in read_run(tmp_path).attempts] == [
        "continued from step-1", "the node was lost"]


def test_bits_per_byte_of_all_sources_are_weighted_by_bytes(tmp_path: Path) -> None:
    # 1000 bytes at 2 bits and 3000 bytes at 1 bit: 5000 bits / 4000 bytes
    log = EventLog(tmp_path / "events.jsonl")
    log.write("eval", step=10, heldout={
        "ko": {"tokens": 500, "loss": 2 * 1000 / 500 * math.log(2), "bits_per_byte": 2.0},
        "en": {"tokens": 600, "loss": 1 * 3000 / 600 * math.log(2), "bits_per_byte": 1.0},
        "broken": {"tokens": 600, "loss": float("nan"), "bits_per_byte": float("nan")}})
    log.write("baseline", bigram={"en": {"bits_per_byte": 3.5, "loss": 1, "tokens": 600}})
    run = read_run(tmp_path)
    assert run.overall_bits_per_byte.values.tolist() == pytest.approx([1.25])
    assert run.heldout["en"].baseline_bits_per_byte == 3.5
    assert run.heldout["ko"].baseline_bits_per_byte is None


def test_needles_samples_and_expert_load_are_the_newest(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for step in (10, 20):
        log.write("needle", step=step, when="before", by="generation", cells=[])
        log.write("needle", step=step, when="after", by="generation", cells=[])
        log.write("needle", step=step, when="after", by="likelihood", cells=[])
        log.write("sample", step=step, prompt="a", text=str(step))
        log.write("sample", step=step, prompt="b", text=str(step))
        log.write("expert_load", step=step, layers=[2, 3], load=[[0.25] * 4, [0.1, 0.2, 0.3, 0.4]])
    run = read_run(tmp_path)
    assert [(n["when"], n["by"], n["step"]) for n in run.needles] \
        == [("before", "generation", 20), ("after", "generation", 20), ("after", "likelihood", 20)]
    assert [s["text"] for s in run.samples] == ["20", "20"]
    assert (run.expert_load.step, run.expert_load.layers, run.expert_load.load.shape) == (20, [2, 3], (2, 4))


def test_provenance_names_data_and_checkpoint_by_their_manifests(runs: list[Path]) -> None:
    found = {(p.role, p.kind): p.manifest_sha256 for p in read_run(runs[0]).provenance}
    assert found == {("read", "tokens"): manifest_sha256(runs[0].parent / "tokens"),
                     ("written", "checkpoint"): manifest_sha256(runs[0] / "checkpoints" / "step-400")}


def test_a_line_cut_off_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "step", "time_s": 1.0, "step": 1, "loss": '
                                           '2.0}\n{"event": "step", "time_')
    assert read_run(tmp_path).curve("loss").values.tolist() == [2.0]


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no events.jsonl.*--run"):
        read_run(tmp_path / "missing")
    (tmp_path / "events.jsonl").touch()
    (tmp_path / "config.json").write_text('{"recipe": ')
    with pytest.raises(UserError, match=r"config\.json: is not valid JSON"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json: holds a list"):
        read_run(tmp_path)


@pytest.mark.parametrize("load", [[[1.0, 2.0], [3.0]], 5, [[1.0]], [1.0, 2.0]])
def test_a_table_whose_bits_have_changed_is_left_out(tmp_path: Path, load: Any) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("expert_load", step=1, layers=[0, 1], load=load)
    assert read_run(tmp_path).expert_load is None
