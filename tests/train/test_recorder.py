"""Events that a run writes. Ranks other than 0 write nothing, and every method may be called on all ranks."""

import dataclasses
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.base.artifacts import create_artifact, manifest_sha256
from megatron_sov.checkpoint.save import SavedCheckpoint
from megatron_sov.engine.parallel.world import ParallelWorld
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.model.families.count import compute_train_flops_per_token
from megatron_sov.runs import launch_environment
from megatron_sov.runs.obs.events import EVENTS, read_events
from megatron_sov.runs.obs.history import NO_GRADIENT, is_incident
from megatron_sov.runs.obs.meters import Meter, format_recent_means
from megatron_sov.train import recorder
from megatron_sov.train.checkpointer import TrainState
from megatron_sov.train.data.ledger import LedgerEntry
from megatron_sov.train.guards.step_guard import StepRejection
from megatron_sov.train.objectives.heldout_evaluator import HeldoutLoss
from megatron_sov.train.recorder import Efficiency, Recorder, StepResult, find_peak_tflops, read_device_name

# Efficiency figures of a step.


def test_figures_of_a_step() -> None:
    build_config = apply_settings(recipes.get("tiny-solar-open"), ["gpu.peak_tflops=2.0"])
    result = Efficiency(build_config, num_ranks=4).compute_figures(num_tokens=8000, seq_len=128, seconds=0.5)
    tflops = 4000 * compute_train_flops_per_token(build_config.model, 128) / 1e12
    assert result["tokens_per_s_per_process"] == 4000
    assert result["tflops_per_process"] == pytest.approx(tflops)
    assert result["mfu"] == pytest.approx(tflops / 2)
    assert 1e7 < result["peak_memory_bytes"] < 1e11 and "reserved_memory_bytes" not in result


@pytest.mark.each(("name", "bf16"), [
    ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989.4),
    ("NVIDIA H200 NVL", 835.5), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA B200", 2250),
    ("NVIDIA GB200", 2500), ("NVIDIA T4", None)])
def test_peak_flops_of_known_chips(name: str, bf16: float | None) -> None:
    assert find_peak_tflops(name) == bf16


def test_a_processor_is_named_by_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "on_gpu", lambda: False)
    monkeypatch.setattr(launch_environment, "CPU_INFO", tmp_path / "cpuinfo")
    assert read_device_name() in (platform.processor(), platform.machine())
    launch_environment.CPU_INFO.write_text("processor\t: 0\nmodel name\t: AMD EPYC 9334\n")
    assert read_device_name() == "AMD EPYC 9334"


NUM_STEPS = 7
RESULT = StepResult(loss=2.5, losses={"lm": 2.5}, losses_by_source={"web": 2.4}, grad_norm=1.5, lr=1e-3,
                    num_tokens=64, phase="main", padding_share=0.25, seq_len=32, seconds=0.5,
                    meters={"clipped": 0.125})
LOAD = torch.tensor([[0.0, 0.0], [3.0, 1.0], [2.0, 2.0]])
"""Tokens per expert of a dense layer and two MoE layers."""
MAIN, OTHER = ParallelWorld(0, 2, 0, 2, True, True), ParallelWorld(1, 2, 1, 2, True, True)


def build_config(*settings: str) -> RunConfig:
    return apply_settings(recipes.get("tiny-solar-open"), list(settings))


def create_recorder(run: Path, *settings: str, place: ParallelWorld = MAIN) -> Recorder:
    recorder = Recorder(build_config(*settings), place, NUM_STEPS, began_s=1000.5)
    if place.is_main:
        recorder.open(run)
    return recorder


def read_recorded_events(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k != "time_s"} for e in read_events(run / EVENTS)]


def call_all_methods(r: Recorder) -> None:
    """Call every method of the recorder."""
    r.record_start(0, None, [], [LedgerEntry(0, "main", 32, 2, {"web": 1.0})])
    r.warn_about_epochs(1, {"web": 9.0})
    r.record_step(TrainState(1, 64), RESULT, LOAD)
    r.record_skipped_step(2, {})
    r.record_skipped_step(3, {"reward": 1.0})
    r.record_rejected_step(3, StepRejection("the loss is nan", float("nan"), 1.0, finite=False,
                                            weights_suspect=True), [1])
    r.record_expert_load(4, LOAD)
    r.record_evaluation(4, {"web": HeldoutLoss(2.0, 1.0, 10)}, {"web": 128}, {"web": 130}, {"chat": 3})
    r.record_checkpoint(SavedCheckpoint(Path("run/checkpoints/step-4"), 4, 0.1, 0.2))
    r.record_hang(5, {"loop.py, train": [0, 1]})
    r.record_gate_failure(6, "accuracy 0.1 is below 0.9")
    r.record_stop(6, None)
    r.record_end(7, 12.5, None)
    r.close()


def test_a_start_names_the_checkpoint_that_it_starts_from(tmp_path: Path) -> None:
    with create_artifact(tmp_path / "start", "checkpoint"):
        pass
    r = create_recorder(tmp_path)
    r.record_start(0, None, [], [LedgerEntry(0, "main", 32, 2, {"web": 1.0})], start=tmp_path / "start")
    r.close()
    [event, *_] = read_recorded_events(tmp_path)
    assert event["inputs"] == [{"kind": "checkpoint", "path": str(tmp_path / "start"),
                                "manifest_sha256": manifest_sha256(tmp_path / "start")}]


def test_every_call_writes_its_own_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call_all_methods(create_recorder(tmp_path, "data.max_epochs=4", "data.skip_steps=[[2,2]]"))
    events = read_recorded_events(tmp_path)
    assert [(e["event"], e.get("step")) for e in events] == [
        ("run_start", None), ("phase", 0), ("warning", 1), ("step", 1), ("skip", 2), ("skip", 3), ("skip", 3),
        ("expert_load", 4), ("eval", 4), ("data_consumed", 4), ("checkpoint", 4), ("hang", 5),
        ("gate_failed", 6), ("stop", 6),
        ("run_end", 7)]
    start, _, warning, step, configured_skip, no_gradient, rejected, load, *_ = events
    assert ((start["began_s"], start["resumed_from"], start["layout"]["dp"], start["num_ranks"])
            == (1000.5, 0, 2, 2))
    assert ((step["loss"], step["tokens"], step["tokens_per_s"], step["max_violation"])
            == (2.5, 64, 128.0, 0.5))
    assert step["meters"] == {"clipped": 0.125}
    assert configured_skip == {"event": "skip", "step": 2, "reason": "data.skip_steps"}
    assert (no_gradient["reason"], no_gradient["meters"]) == (NO_GRADIENT, {"reward": 1.0})
    assert [is_incident(e) for e in (configured_skip, no_gradient, rejected)] == [False, False, True]
    assert format_recent_means(events, [Meter("reward"), Meter("loss")]) == "reward 1, loss 2.5 (one step)"
    assert rejected["ranks"] == [1]
    assert (load["layers"], load["load"]) == ([2, 3], [[0.75, 0.25], [0.5, 0.5]])
    assert next(e["path"] for e in events if e["event"] == "checkpoint") == "checkpoints/step-4"
    assert next(e["reason"] for e in events if e["event"] == "stop") == "another process was asked to stop"
    assert next((e["over_long"], e["over_long_are"]) for e in events if e["event"] == "data_consumed") == (
        {"chat": 3}, "cut")
    errors = capsys.readouterr().err
    assert f"warning: {warning['text']}\n" in errors and "source web: 9.0 epochs" in errors
    assert "warning: step 3: rejected: the loss is nan (not finite on rank 1)\n" in errors


def test_other_ranks_print_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call_all_methods(create_recorder(tmp_path, "data.max_epochs=4", place=OTHER))
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_a_resumed_run_records_its_checkpoint(tmp_path: Path) -> None:
    r = create_recorder(tmp_path)
    r.record_start(5, "step-5", [], [])
    r.close()
    resume, start = read_recorded_events(tmp_path)
    assert (resume["event"], resume["step"], resume["reason"]) == ("resume", 5, "continued from step-5")
    assert start["resumed_from"] == 5


def test_steps_are_recorded_at_the_interval_and_at_the_end(tmp_path: Path) -> None:
    r = create_recorder(tmp_path, "train.log_every_steps=3")
    assert [step for step in range(1, NUM_STEPS + 1) if r.is_due(step)] == [3, 6, 7]
    r.record_step(TrainState(2), RESULT, None)
    r.record_step(TrainState(3), dataclasses.replace(RESULT, loss=2.0, meters={}), torch.zeros(3, 2))
    r.close()
    (event,) = read_recorded_events(tmp_path)
    assert (event["step"], event["loss"]) == (3, 2.0) and not {"max_violation", "meters"} & event.keys(), (
        "dense models have no expert load, and this result has no meters")


def test_epoch_warnings_occur_once_per_source_above_the_limit(tmp_path: Path) -> None:
    r = create_recorder(tmp_path, "data.max_epochs=4")
    for step, epochs in enumerate([{"web": 4.0}, {"web": 4.1, "rare": 1.0}, {"web": 5.0, "rare": 6.0}],
                                  start=1):
        r.warn_about_epochs(step, epochs)
    unlimited = create_recorder(tmp_path, "data.max_epochs=0")
    unlimited.warn_about_epochs(4, {"web": 99.0})
    with_epochs = create_recorder(tmp_path, "data.max_epochs=4", "train.steps=0", "train.epochs=20")
    with_epochs.warn_about_epochs(4, {"web": 20.5})
    with_epochs.warn_about_epochs(5, {"web": 21.5})
    for each in (r, unlimited, with_epochs):
        each.close()
    assert [(e["step"], e["text"].split()[1].rstrip(":")) for e in read_recorded_events(tmp_path)] == [
        (2, "web"), (3, "rare"), (5, "web")]
