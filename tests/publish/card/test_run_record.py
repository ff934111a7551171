"""What runs cost, against what a real run said of itself, and against sums done by hand."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import manifest_sha256, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import apply_settings, from_dict
from megatron_sov.model.families.count import train_flops_per_token
from megatron_sov.model.recipes import get
from megatron_sov.publish.card.lineage import Graph, Node, lineage
from megatron_sov.publish.card.run_record import (
    CardAnswers, CardRunRecord, Compute, Figure, compute_of, flops_per_token, read_run_record, total,
    total_compute, unknown)
from megatron_sov.runs.obs.events import EventLog

REAL = {"step": 1, "tokens": 1844, "step_time_s": 0.2984478399994259,
        "tflops_per_process": 0.00762789450915235}
"""A step of a real run of the settings below, by the trainer's own account."""
SETTINGS = ("model.vocab_size=512", "model.hidden_size=64", "model.num_layers=3", "model.num_heads=4",
            "model.num_kv_heads=2", "model.head_dim=16", "model.num_experts=4",
            "model.num_experts_per_token=2", "model.expert_ffn_dim=64")


def run_of(folder: Path, *events: dict[str, Any], settings: tuple[str, ...] = ()) -> CardRunRecord:
    folder.mkdir()
    config = apply_settings(get("tiny-solar-open"), list(settings))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return read_run_record(folder, "run", flops_per_token)


def start(time_s: float, **fields: Any) -> dict[str, Any]:
    return {"event": "run_start", "time_s": time_s, "num_ranks": 4, "on_gpu": True,
            "machine": {"device": "NVIDIA H100 80GB HBM3"}, **fields}


PHASE = {"event": "phase", "time_s": 0.0, "step": 0, "seq_len": 128}


def steps(*numbers: int, at: float = 0.0, **fields: Any) -> list[dict[str, Any]]:
    return [{"event": "step", "time_s": at + n * 900, "step": n, "tokens": 1000 * n, "step_time_s": 900.0,
             **fields} for n in numbers]


def cost(run: CardRunRecord, **said: Any) -> Compute:
    return compute_of(run, CardAnswers(**said))


def test_flops_are_those_that_a_real_run_told_of_itself(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", start(0.0), PHASE, {"event": "step", "time_s": 1.0, **REAL},
                 settings=SETTINGS)
    told = REAL["tflops_per_process"] * 1e12 * REAL["step_time_s"]
    assert cost(run).flops.value == pytest.approx(told, rel=1e-12)


def test_steps_that_were_done_again_stand_apart(tmp_path: Path) -> None:
    phases = (PHASE, {**PHASE, "step": 3, "seq_len": 256})
    run = run_of(tmp_path / "run", start(0.0), *phases, *steps(1, 2, 3, 4), start(9000.0), *phases,
                 *steps(3, 4, 5, at=9000.0))
    short, long = (train_flops_per_token(run.config.model, n) for n in (128, 256))
    assert long > short and run.work.tokens == 5000
    assert cost(run).flops.value == pytest.approx(1000 * (3 * short + 2 * long))
    assert cost(run).flops_again.value == pytest.approx(1000 * (short + long))


def test_hours_are_those_between_begin_and_last_event_of_each_start(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", start(100.0, began_s=0.0), PHASE, *steps(1, 2),
                 start(50_000.0, num_ranks=2), PHASE, *steps(3, at=50_000.0))
    assert cost(run).process_hours.value == pytest.approx((4 * 1800 + 2 * 2700) / 3600)
    assert cost(run).gpu_hours.value == cost(run).process_hours.value
    on_cpu = run_of(tmp_path / "cpu", start(0.0, on_gpu=False), PHASE, *steps(1))
    assert cost(on_cpu).gpu_hours.value == 0 and cost(on_cpu).process_hours.value == 1
    silent = run_of(tmp_path / "old", start(0.0, on_gpu=None), PHASE, *steps(1))
    assert cost(silent).gpu_hours.value is None


@pytest.mark.parametrize(("events", "kwh", "basis", "key"), [
    ([start(0.0), PHASE, *steps(1, energy_j=9.0, energy_gpus=1), {"event": "energy", "energy_j": 7.2e6},
      {"event": "energy", "energy_j": 10.8e6}, start(1e4), PHASE, *steps(2),
      {"event": "energy", "energy_j": 3.6e6}],
     4.0, "measured", "energy[*].energy_j"),
    # the driver of one of four GPUs is silent: what three took is not the run's
    ([start(0.0), PHASE, *steps(1, 2, energy_j=3.6e6, energy_gpus=1),
      {"event": "energy", "energy_j": 1.8e6, "num_gpus": 3}], 8.0, "estimated", "step[*].energy_j"),
    ([start(0.0), PHASE, *steps(1, 2, energy_j=3.6e6, energy_gpus=1)], 8.0, "estimated", "step[*].energy_j"),
    ([start(0.0), PHASE, *steps(1, 2, 3, 4, gpu_power_w=500.0)], 2.0, "estimated", "step[*].gpu_power_w"),
    ([start(0.0), PHASE, *steps(1, 2, 3, 4, power_w=500.0)], 2.0, "estimated", "step[*].power_w"),
    ([start(0.0), PHASE, *steps(1, 2, 3, 4)], 4 * 1275 * 0.82 / 1000, "estimated",
     "run_start[0].machine.device"),
    ([start(0.0, on_gpu=False, machine={"device": "some CPU"}), PHASE, *steps(1, 2, 3, 4)], 4 * 0.25,
     "estimated", "power_w")])
def test_energy_is_measured_where_it_can_be_and_else_an_estimate_that_says_so(
        tmp_path: Path, events: list[dict[str, Any]], kwh: float, basis: str, key: str) -> None:
    timed = [{"time_s": 4 * 900.0, **event} for event in events]
    found = cost(run_of(tmp_path / "run", *timed), power_w=250.0, intensity_g_per_kwh=100.0, pue=1.5)
    assert found.energy_kwh.value == pytest.approx(kwh, rel=1e-6)
    assert found.energy_kwh.basis == basis and key in [o.key for o in found.energy_kwh.origins]
    assert found.carbon_g.value == pytest.approx(kwh * 150) and found.carbon_g.basis == "estimated"


def test_what_no_event_tells_is_unknown_and_so_is_a_sum_with_it(tmp_path: Path) -> None:
    nothing = cost(run_of(tmp_path / "nothing"))
    assert not any(figure.known for figure in vars(nothing).values())
    hostile = run_of(tmp_path / "hostile", start(0.0, num_ranks="1e999"), {**PHASE, "seq_len": 1},
                     *[{**s, "tokens": "nan"} for s in steps(1)], {"event": "energy", "energy_j": -1})
    assert not cost(hostile).process_hours.known and cost(hostile).flops.value == 0
    both = total([Figure(1.0, "measured", unit="h"), unknown("hours of run b", "look")], "hours")
    assert both.value is None and "hours of run b; look" in both.how
    added = total([Figure(1.0, "measured", unit="h"), Figure(2.0, "estimated", unit="h", how="x")], "hours")
    assert (added.value, added.basis, added.unit, added.how) == (3.0, "estimated", "h", "x")
    assert not math.isnan(total_compute([cost(hostile)]).flops.value)


def test_settings_of_the_fixture_are_those_of_a_run(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", start(0.0))
    assert run.config == from_dict(run.settings)
    log = EventLog(tmp_path / "run/events.jsonl")
    log.write("skip", step=1, reason="data.skip_steps")
    log.write("rollback", step=1, text="back")
    log.close()
    again = read_run_record(tmp_path / "run", "run", flops_per_token)
    assert dict(again.incidents) == {"skip": 0, "rollback": 1} and again.skipped_by_setting == 1


# From a run back to everything: by hash, wherever it lies now; loops and strangers are refused.


def test_runs_are_followed_by_the_checkpoint_that_they_started_from(whole_world: Any) -> None:
    found = lineage([whole_world.sft])
    assert [run.name for run in found.runs] == ["pretrain", "sft"]
    assert found.model == manifest_sha256(whole_world.sft / "checkpoints/step-4")
    assert set(found.data) == {whole_world.text, whole_world.chat} and not found.unknown


def test_what_was_moved_is_found_beside_or_where_the_user_says(world: Any) -> None:
    moved = world.root.with_name("moved")
    shutil.move(world.root, moved)
    assert [run.name for run in lineage([moved / "sft"]).runs] == ["pretrain", "sft"]
    (moved / "far").mkdir()
    shutil.move(moved / "pretrain", moved / "far/first")
    lost = lineage([moved / "sft"])
    assert [run.name for run in lost.runs] == ["sft"]
    assert [n.name for n in lost.graph.nodes.values() if not n.is_proven] == ["pretrain/step-4"]
    again = lineage([moved / "sft"], [moved / "far/first"])
    assert [run.name for run in again.runs] == ["first", "sft"]


def test_a_checkpoint_that_is_gone_is_known_by_what_its_run_ended_with(world: Any) -> None:
    shutil.rmtree(world.pretrain / "checkpoints/step-4")
    found = lineage([world.sft])
    assert [run.name for run in found.runs] == ["pretrain", "sft"] and not found.unknown
    (world.pretrain / "complete.json").unlink()
    assert "only its path says" in lineage([world.sft]).unknown[0]


def test_runs_of_earlier_versions_are_joined_by_hand(world: Any) -> None:
    file = world.sft / "events.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()]
    for event in events:
        if "inputs" in event:
            event["inputs"] = event["inputs"][:1]
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert [run.name for run in lineage([world.sft]).runs] == ["sft"]
    found = lineage([world.pretrain, world.sft])
    assert [run.name for run in found.runs] == ["pretrain", "sft"]
    assert [e.told_by for e in found.graph.edges.values() if e.target == "run sft"][-1] == "the command line"


def test_a_loop_ends_in_a_sentence(world: Any) -> None:
    file = world.pretrain / "events.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()]
    last = world.sft / "checkpoints/step-4"
    events[0]["inputs"].append({"kind": "checkpoint", "path": str(last),
                                "manifest_sha256": manifest_sha256(last)})
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    with pytest.raises(UserError, match="is made from itself, which no true manifest says"):
        lineage([world.sft])


def test_hostile_inputs_are_passed_over_or_named(world: Any, changed: Callable[..., None]) -> None:
    file = world.sft / "events.jsonl"
    first, *rest = file.read_text().splitlines()
    event = json.loads(first)
    event["inputs"] += [1, {"kind": "tokens"}, {"kind": 3, "path": "x", "manifest_sha256": "y"},
                        {"kind": "tokens", "path": "\0/x", "manifest_sha256": "z"},
                        {"kind": "checkpoint", "path": "/" + "a/" * 3000, "manifest_sha256": "v"}]
    file.write_text("\n".join([json.dumps(event), *rest]))
    names = [n.sha256 for n in lineage([world.sft]).graph.nodes.values() if not n.is_proven]
    assert names == ["z", "v"]
    changed(world.hf, inputs=[*read_manifest(world.hf).inputs, {"kind": "checkpoint"}])
    with pytest.raises(UserError, match="an input without kind, path or hash"):
        lineage([world.sft], hf_folder=world.hf)


def test_folders_that_are_none_of_it_are_refused(world: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused: list[tuple[tuple[Any, ...], str]] = [
            (([tmp_path / "empty"],), "empty: is empty, so it is not a run; pass the folder given to --run"),
            (([world.sft], [tmp_path / "empty"]), "--from .*: is neither a run nor an artifact"),
            (([world.pretrain], [], world.hf), "--hf-folder .*: was not made from a checkpoint of"),
            (([world.sft], [], world.text), "--hf-folder .*: was not made from a checkpoint of")]
    for arguments, said in refused:
        with pytest.raises(UserError, match=said):
            lineage(*arguments)


def test_a_graph_has_a_limit_and_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.publish.card.lineage.MAX_NODES", 3)
    graph = Graph()
    for name in "cab":
        assert graph.add(Node(name, "raw", name, is_proven=False))
    assert not graph.add(Node("a", "raw", "seen"))
    graph.join("a", "b", "x")
    graph.join("b", "c", "x")
    assert [node.name for node in graph.order()] == ["seen", "b", "c"]
    assert graph.ancestors(["b"]) == {"a", "b"}
    with pytest.raises(UserError, match="more than 3 things"):
        graph.add(Node("d", "raw", "d"))
