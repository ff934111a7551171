"""`megatron-sov status`: the state of a run from its folder, and its printed form."""

import json
import math
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_sov import cli, recipes
from megatron_sov.base.errors import UserError
from megatron_sov.commands.operate.runs import status_run as status
from megatron_sov.commands.operate.runs.run_state import (
    RunStart, RunState, find_runs, format_run_state, read_run_state)
from megatron_sov.commands.operate.runs.status_run import format_runs
from megatron_sov.model.config import apply_settings
from megatron_sov.runs.checkpoints import fix_adapter
from megatron_sov.runs.obs.history import UNFINISHED

NOW_S = 10_000.0
STARTED = {"recipe": "tiny-solar-open", "num_ranks": 2, "num_steps": 40}


def write_run(path: Path, *events: tuple[float, str, dict[str, Any]], settings: tuple[str, ...] = ()) -> Path:
    """Write a run folder with events, given as (seconds before NOW_S, name, fields)."""
    path.mkdir(parents=True)
    config = apply_settings(recipes.get("tiny-solar-open"), ["train.steps=40", *settings])
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    (path / "events.jsonl").write_text("".join(
        json.dumps({"event": kind, "time_s": NOW_S - ago_s, **fields}) + "\n"
        for ago_s, kind, fields in events))
    return path


def step_events(first: int, last: int, first_ago_s: float,
                every_s: float = 2.0) -> list[tuple[float, str, dict[str, Any]]]:
    """Return the events of steps `first` to `last` for `write_run`; step `first` was `first_ago_s` ago."""
    fields = {"loss": 3.0, "tokens_per_s": 500.0, "step_time_s": every_s, "phase": "main"}
    return [(first_ago_s - every_s * (step - first), "step", {"step": step, "tokens": 1000 * step, **fields})
            for step in range(first, last + 1)]


def start_event(ago_s: float, resumed_from: int = 0) -> tuple[float, str, dict[str, Any]]:
    return ago_s, "run_start", {**STARTED, "resumed_from": resumed_from, "began_s": NOW_S - ago_s - 10}


def write_lock(path: Path) -> None:
    """Write the lock that a living process of this machine holds."""
    (path / "lock.json").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(),
                                                "beat": 1,
                                                "started_s": psutil.Process().create_time()}))


def test_a_living_run_shows_speed_remaining_time_and_reasons_of_its_starts(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", start_event(100), *step_events(1, 5, 98),
        (89, "checkpoint", {"step": 4, "stall_s": 0.0}),
        (85, "restart", {"step": 4, "text": "rank 1 was ended by SIGKILL; all processes are started again"}),
        start_event(70, 4), *step_events(5, 20, 31), (0.5, "warning", {"text": "x"}))
    (run / "checkpoints/step-4").mkdir(parents=True)
    write_lock(run)
    state = read_run_state(run, NOW_S)
    assert (state.state, state.step, state.num_steps, state.stage, state.phase) == (
        "running", 20, 40, "pretrain", "main")
    # 20 steps of 2 s are left, and the last step ended a second ago
    assert state.tokens_per_s == 500 and state.eta_s == pytest.approx(20 * 2 - 1)
    assert (state.checkpoint, state.checkpoint_step, state.restarts, state.warnings) == (
        "checkpoints/step-4", 4, 1, 1)
    assert state.starts[0].outcome == "rank 1 was ended by SIGKILL"
    text = format_run_state(state)
    assert "step        20 of 40 (50%), phase main, 20 K tokens, loss 3.0000" in text
    assert "500 tokens/s, 39.0 s left" in text
    assert "from step 0 to step 5, 2 processes: rank 1 was ended by SIGKILL" in text


@pytest.mark.each(("events", "files", "state", "reason"), [
    ([start_event(100), *step_events(1, 40, 90), (5, "run_end", {"step": 40})],
     {"complete.json": {"step": 40}},
     "complete", "at step 40"),
    ([start_event(100), *step_events(1, 9, 90), (5, "stop", {"step": 9, "reason": "SIGUSR1"})], {},
     "stopped", "SIGUSR1, everything is saved"),
    ([start_event(100), *step_events(1, 9, 90)], {}, "ended", "killed, or its machine went down"),
    ([start_event(100), *step_events(1, 9, 90), (5, "hang", {"step": 10})], {}, "ended",
     "stood still in step 10"),
    ([start_event(100), *step_events(1, 40, 90), (5, "run_end", {"step": 40})],
     {"gate_failed.json": {"failure": "row x\nmore"}}, "gate failed", "row x"),
    ([], {}, "not started", ""),
])
def test_a_run_without_processes_shows_why_it_ended(tmp_path: Path, events: Any, files: dict[str, Any],
                                                    state: str, reason: str) -> None:
    run = write_run(tmp_path / "run", *events)
    for name, content in files.items():
        (run / name).write_text(json.dumps(content))
    result = read_run_state(run, NOW_S)
    assert (result.state, result.why) == (state, reason)
    assert format_run_state(result).startswith(f"{run}: pretrain, tiny-solar-open\n")


SQUEUE = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/asked"
echo "17 $STATE"
"""


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a double of `squeue`, which prints STATE (at first PENDING) as the state of job 17."""
    (file := tmp_path / "bin/squeue").parent.mkdir()
    file.write_text(SQUEUE)
    file.chmod(0o755)
    monkeypatch.setenv("STATE", "PENDING")
    monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")
    return file


def test_slurm_records_show_why_attempts_ended_and_whether_a_job_waits(
        tmp_path: Path, squeue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", start_event(300), *step_events(1, 9, 290), start_event(100, 4),
                    *step_events(5, 9, 95))
    (run / "slurm").mkdir()
    submission = {"event": "submitted", "job": "17", "time_s": NOW_S - 400}
    attempt_end = {"event": "end", "job": "17", "outcome": "cut_off", "reason": "node-3 went down",
                   "time_s": NOW_S - 150}
    (run / "slurm/jobs.jsonl").write_text(json.dumps(submission) + "\n")
    (run / "slurm/attempts.jsonl").write_text(json.dumps(attempt_end) + "\n")
    state = read_run_state(run, NOW_S)
    assert (state.state, state.why) == ("waiting", "job 17 is pending")
    assert [start.outcome for start in state.starts] == ["cut_off: node-3 went down", UNFINISHED]
    assert "--jobs=17" in (squeue.parent / "asked").read_text()
    monkeypatch.setenv("STATE", "COMPLETED")
    assert read_run_state(run, NOW_S).state == "ended"
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))  # no Slurm here
    assert read_run_state(run, NOW_S).state == "ended"


def test_a_run_that_was_only_submitted_has_a_state(tmp_path: Path, squeue: Path,
                                                   monkeypatch: pytest.MonkeyPatch, read_output: Any) -> None:
    records = tmp_path / "runs/first/slurm"
    records.mkdir(parents=True)
    (records / "jobs.jsonl").write_text(
        json.dumps({"event": "submitted", "job": "17", "time_s": NOW_S}) + "\n")
    assert find_runs(tmp_path) == find_runs(records.parent) == [records.parent]
    assert "  state       waiting (job 17 is pending)\n" in read_output("status", str(records.parent))
    monkeypatch.setenv("STATE", "COMPLETED")
    (records / "17.log").write_text("job: modules of the profile cannot be loaded\n")
    assert ("  state       not started (job 17: modules of the profile cannot be loaded)\n"
            in read_output("status", str(records.parent)))
    assert read_output("logs", str(records.parent)) == (
        "[job 17] job: modules of the profile cannot be loaded\n")


def test_a_locked_run_without_new_events_is_silent(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", start_event(300), *step_events(1, 9, 200))
    write_lock(run)
    assert read_run_state(run, NOW_S).state == "silent"


def test_a_folder_of_runs_is_a_table_and_json_has_no_nan(tmp_path: Path, read_output: Any) -> None:
    extension = write_run(tmp_path / "runs/extend", start_event(100),
                          settings=("extend.gate.every_steps=5",))
    write_run(extension / "stages/1-first", start_event(100), *step_events(1, 3, 90))
    write_run(tmp_path / "runs/pretrain", start_event(100), *step_events(1, 3, 90),
              (84, "stop", {"step": 3, "reason": "SIGTERM"}))
    (tmp_path / "runs/data").mkdir()
    (tmp_path / "runs/data/config.json").write_text("{}")  # another artifact's settings
    rows = [line.split() for line in read_output("status", str(tmp_path / "runs")).splitlines()]
    assert [(*row[:4], *(set(row) & {"ended", "stopped"})) for row in rows[1:]] == [
        ("extend", "extend", "tiny-solar-open", "0/40", "ended"),
        ("extend/stages/1-first", "extend", "tiny-solar-open", "3/40", "ended"),
        ("pretrain", "pretrain", "tiny-solar-open", "3/40", "stopped")]
    runs = json.loads(read_output("status", str(tmp_path / "runs"), "--json"))
    assert [(run["recipe"], run["loss"], run["heldout_bits_per_byte"])
            for run in runs][1:] == [("tiny-solar-open", 3.0, None)] * 2
    (raw,) = json.loads(read_output("status", str(tmp_path / "runs/pretrain"), "--json"),
                        parse_constant=pytest.fail)
    assert (raw["state"], raw["step"], raw["eta_s"], raw["checkpoint_age_s"]) == ("stopped", 3, None, None)


@pytest.mark.parametrize(("phase", "events"), [
    ("extend", ()),  # the phase name that `extend` writes by default
    ("far", ((99.0, "needle", {"when": "before", "step": 0}),)),
], ids=["named by the command", "named by the user"])
def test_an_extension_without_stages_or_gate_is_recognized(
        tmp_path: Path, phase: str, events: tuple[tuple[float, str, dict[str, Any]], ...]) -> None:
    phases = json.dumps([{"name": phase, "seq_len": 128}])
    run = write_run(tmp_path / "long", start_event(100), *events, settings=(f"data.phases={phases}",))
    assert read_run_state(run, NOW_S).stage == "extend"


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty, so it is not a run; pass the folder given to --run"):
        find_runs(tmp_path)
    (tmp_path / "more").mkdir()
    with pytest.raises(UserError, match=r"contains no events\.jsonl"):
        find_runs(tmp_path)
    assert "none yet" in format_run_state(RunState(tmp_path))


# Printed form of a run's state.


RUNNING = RunState(
    Path("runs/a"), stage="sft", recipe="tiny-solar-open", phase="main", state="running", why="in job 17",
    step=1200, num_steps=4000, tokens=19_660_800, loss=2.34567, told="loss 2.3457",
    tokens_per_s=51234.5, eta_s=8000.0,
    checkpoint="checkpoints/step-1000", checkpoint_step=1000, checkpoint_age_s=65.0, last_event_age_s=-0.3,
    warnings=2, incidents={"skip": 3, "hang": 0, "alarm": 1},
    starts=[RunStart(1_700_000_000.0, 0, 900, 8, "killed"), RunStart(math.nan, 900, None, 1, "running")])


def test_one_run_in_full() -> None:
    assert format_run_state(RUNNING) == """\
runs/a: sft, tiny-solar-open
  state       running (in job 17), last event 0.0 s ago
  step        1,200 of 4,000 (30%), phase main, 19.7 M tokens, loss 2.3457
  speed       51,234 tokens/s, 2 h 13 min left
  checkpoint  checkpoints/step-1000, 1 min 5 s ago
  incidents   2 x warning, 3 x step rejected, 1 x alarm (megatron-sov logs runs/a)
  starts      2
      1  2023-11-14 22:13:20 UTC  from step 0 to step 900, 8 processes: killed
      2  –  from step 900 to no step, 1 process: running"""


def test_several_runs_are_a_table_with_dashes_for_unknown_figures() -> None:
    running = replace(RUNNING, heldout_bits_per_byte=1.23456)
    assert format_runs([running, RunState(Path("runs/b"))], Path("runs")).splitlines() == [
        "run  stage  recipe                  step   loss  held-out  tokens  state        last change",
        "a    sft    tiny-solar-open  1,200/4,000  2.346     1.235  19.7 M  running        0.0 s ago",
        "b    –      –                        0/0      –         –       –  not started            –"]
    assert format_runs([RUNNING]).splitlines()[1].startswith("runs/a  sft")


@pytest.mark.each(("heldout", "expected"), [
    ({"en": {"loss": 2.0, "bits_per_byte": 1.0, "tokens": 10}}, 1.0),
    ({"en": {"loss": 2.0, "bits_per_byte": 1.0, "tokens": 10},
      "ko": {"loss": 2.0, "bits_per_byte": 2.0, "tokens": 20}}, 60 / (20 + 20)),  # nats / (bytes x ln 2)
    ({"en": {"loss": 2.0, "bits_per_byte": 1.5, "tokens": 10},  # a source without bytes is left out
      "images": {"loss": 9.0, "bits_per_byte": "nan", "tokens": 5}}, 1.5),
    ({"en": {"loss": 2.0, "tokens": 10}}, None),
    ({"en": {"loss": 2.0, "bits_per_byte": 0, "tokens": 10}}, None),
    ({"en": {"loss": "nan", "bits_per_byte": "nan", "tokens": 10}}, None),
    ({}, None), (None, None), ([1], None),
    ({"en": 5}, None)])
def test_held_out_quality_counts_every_byte_once(tmp_path: Path, heldout: Any,
                                                 expected: float | None) -> None:
    run = write_run(tmp_path / "run", start_event(100), (50, "eval", {"step": 1, "heldout": heldout}))
    bits_per_byte = read_run_state(run, NOW_S).heldout_bits_per_byte
    assert bits_per_byte == pytest.approx(math.nan if expected is None else expected, nan_ok=True)


def follow_without_waiting(monkeypatch: pytest.MonkeyPatch, run: Path,
                           *events_per_sleep: list[dict[str, Any]]) -> None:
    """Make each sleep of `--follow` write the next list of events, and then raise KeyboardInterrupt."""
    remaining = iter(events_per_sleep)

    def sleep(_: float) -> None:
        events = next(remaining, None)
        if events is None:
            raise KeyboardInterrupt
        with open(run / "events.jsonl", "a") as file:
            file.write("".join(json.dumps({"time_s": NOW_S, **event}) + "\n" for event in events))

    monkeypatch.setattr(status, "POLL_STATE_S", 0.0)
    monkeypatch.setattr(status.time, "sleep", sleep)


def test_a_run_is_followed_event_by_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          read_output: Any) -> None:
    run = write_run(tmp_path / "run", start_event(100), *step_events(1, 3, 98))
    write_lock(run)
    step = {"event": "step", "step": 4, "loss": 2.5, "tokens": 4000, "phase": "main"}
    follow_without_waiting(monkeypatch, run, [step, {"event": "memory", "step": 4}],
                           [{"event": "eval", "step": 4,
                             "heldout": {"web": {"loss": 2.25}, "code": {"loss": 1.5}}},
                            {"event": "checkpoint", "step": 4, "path": "checkpoints/step-4"},
                            {"event": "warning", "text": "loss rose"}], [{"event": "run_end", "step": 4}])
    (run / "complete.json").write_text("{}")
    first, *lines = read_output("status", str(run), "--follow").splitlines()
    assert first.startswith(f"{run}: pretrain, tiny-solar-open")
    printed_events = [line.partition("  ")[2] for line in lines if line[2:3] == line[5:6] == ":"]
    assert printed_events == ["step 4 of 40 (10%), 4 K tokens, loss 2.5000",
                              "held-out loss web 2.2500, code 1.5000",
                              "saved checkpoints/step-4", "warning: loss rose", "the run is complete"]


@pytest.mark.each("event", [
    {"event": "eval", "heldout": 7}, {"event": "eval"}, {"event": "eval", "heldout": {"web": 3}},
    {"event": "eval", "heldout": {"web": {"loss": "x"}}}, {"event": "checkpoint"},
    {"event": "warning", "text": "\x1b[2J"}, {"event": "stop", "time_s": "x"},
    {"event": "stop", "time_s": 1e300},
    {"event": "unheard"}])
def test_unknown_events_are_ignored_and_ctrl_c_ends_the_command(event: dict[str, Any], tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", start_event(100), *step_events(1, 3, 98))
    write_lock(run)
    follow_without_waiting(monkeypatch, run, [event])
    assert cli.main(["status", str(run), "--follow"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "\x1b" not in captured.out


def test_following_several_runs_or_as_json_is_refused(tmp_path: Path, get_refusal: Any) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, start_event(100))
    assert "--follow: follows one run, not 2 (" in get_refusal("status", str(tmp_path), "--follow")
    refusal = get_refusal("status", str(tmp_path / "a"), "--follow", "--json")
    assert "--json" in refusal and "goes without --follow" in refusal
    get_refusal("status", str(tmp_path / "none"), "--follow")


DEEP_JSON = "[" * 200_000


def test_deeply_nested_files_of_a_run_are_damaged(tmp_path: Path, get_refusal: Any) -> None:
    """A folder of runs may contain files of other people."""
    run = write_run(tmp_path / "run", *step_events(0, 3, 20.0))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(DEEP_JSON)
    assert find_runs(tmp_path) == [run]
    (run / "config.json").write_text(DEEP_JSON)
    assert f"{run}/config.json: is not valid JSON" in get_refusal("report", str(run))
    (tmp_path / "adapter_config.json").write_text(DEEP_JSON)
    assert fix_adapter(tmp_path).before
