"""Injected faults: how a run reacts, and that it ends with the bits of a run that skips the same samples."""

import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.engine.parallel.world import STORE_PORT
from megatron_sov.model.config import apply_settings
from megatron_sov.publish.report.run_data import read_run
from megatron_sov.publish.report.sections import SECTIONS
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.obs.events import read_events
from megatron_sov.train.guards.fault_injection import parse_faults
from megatron_sov.train.objectives.data_objective import LanguageModelling
from megatron_sov.train.stages.launch import run_stage
from megatron_sov.train.stages.stage import Stage

SMALL = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.head_dim=8",
         "model.expert_ffn_dim=16", 'data.phases=[{"name": "main", "seq_len": 32}]',
         "model.num_experts=4", "train.global_batch_size=8", "train.micro_batch_size=4",
         "data.heldout_tokens=128", "train.eval_every_steps=0", "train.hidden_dropout=0.1",
         "train.keep_checkpoints=0")
STORM = (*SMALL, "train.steps=30", "train.checkpoint_every_steps=4", "train.async_save=false",
         "guards.window_steps=20", "guards.hang_timeout_s=14", "guards.straggler_every_steps=6",
         "guards.straggler_ratio=1.2", "guards.routing_every_steps=3")
STORM_FAULTS = ("kill@step=3,rank=1", "bitflip@step=11,rank=1", "corrupt-checkpoint@save=16",
                "hang@step=20,rank=1", "nan@step=21,rank=1", "slow-rank@step=25,rank=1,seconds=0.3,steps=6",
                "spike@step=27")
"""Faults during steps; test_resume.py kills ranks while they start, load and save."""
RESTARTS = ([137, 77, 76], [0, 8, 16])
"""Exit codes after kill, bitflip and hang, and the newest checkpoint at each restart (step-16 is damaged)."""
STORM_SKIPPED = "data.skip_steps=[[21, 21], [27, 27]]"
ROLLBACK = (*SMALL, "train.steps=14", "train.checkpoint_every_steps=3", "guards.rollback_after_skips=3",
            "guards.hang_timeout_s=0", "parallel.zero1=true", "parallel.overlap_param_gather=true",
            "parallel.overlap_grad_reduce=true")
ROLLBACK_FAULTS = tuple(f"nan@step={step},rank={step % 2}" for step in (8, 9, 10))
ROLLBACK_SKIPPED = "data.skip_steps=[[7, 10]]"


def run_scenarios(data: str, folder: str) -> dict[str, int]:
    """Run each fault scenario ("storm", "rolled") and its counterpart "by hand", which skips the same steps
    without a fault. Return the exit code of each run's launcher, which is forked from this process."""
    def run(name: str, settings: tuple[str, ...], faults: tuple[str, ...] = ()) -> int:
        began_s = time.monotonic()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", STORE_PORT):
                    os.environ.pop(variable, None)  # this process is not a rank, it starts ranks
                config = apply_settings(recipes.get("tiny-solar-open"),
                                        [f"data.paths={json.dumps({data: 1.0})}", *settings])
                run_stage(Stage(config, RunFolder(Path(folder) / name), LanguageModelling,
                                faults=parse_faults(faults, 2)), 2)
                code = 0
            except SystemExit as e:
                code = int(e.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(name, code, f"{time.monotonic() - began_s:.1f} s")
        return code

    return {
        "storm": run("storm", STORM, STORM_FAULTS),
        "storm by hand": run("storm by hand", (*STORM, STORM_SKIPPED)),
        "rolled": run("rolled", ROLLBACK, ROLLBACK_FAULTS),
        "rolled by hand": run("rolled by hand", (*ROLLBACK, ROLLBACK_SKIPPED)),
    }


def read_guard_events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    return [e for e in read_events(run / "events.jsonl") if e["event"] in kinds]


def read_last_checkpoint(run: Path) -> dict[str, Any]:
    """Return the file hashes of a run's last checkpoint, and of `state.json` the fields without times."""
    path = max((run / "checkpoints").glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    files = {name: record.digest for name, record in read_manifest(path).files.items()
             if name != "state.json"}
    state = json.loads((path / "state.json").read_text())
    return {**files, "state": {k: v for k, v in state.items() if k not in ("wall_s", "guard")}}


@pytest.mark.deep
@pytest.mark.distributed
def test_any_injected_fault_equals_a_run_without_the_skipped_samples(ranks: Any, job: Any, packed_data: Any,
                                                                     tmp_path: Path) -> None:
    """test_interrupts.py tests the run that has no checkpoint to roll back to."""
    arguments = {"data": str(packed_data.text), "folder": str(tmp_path)}
    ((codes,),) = ranks(job(__file__, "run_scenarios", 1, arguments))
    assert codes == {"storm": 0, "storm by hand": 0, "rolled": 0, "rolled by hand": 0}
    for name in ("storm", "rolled"):
        assert read_last_checkpoint(tmp_path / name) == read_last_checkpoint(tmp_path / f"{name} by hand")
    check_storm_events(tmp_path / "storm")
    (rollback,) = read_guard_events(tmp_path / "rolled", "rollback")
    assert (rollback["step"], rollback["back_to"], rollback["refused"]) == (10, 6, 3)
    assert [e["ranks"] for e in read_guard_events(tmp_path / "rolled", "skip")] == [[0], [1], [0]], (
        "ranks whose loss was not finite")


def check_storm_events(run: Path) -> None:
    """Check that the events contain every fault and the run's reaction."""
    assert {e["fault"].split(",")[0] for e in read_guard_events(run, "fault")} == {
        f.split(",")[0] for f in STORM_FAULTS}
    restarts = read_guard_events(run, "restart")
    assert ([e["exit_code"] for e in restarts], [e["step"] for e in restarts]) == RESTARTS
    (damaged,), (corruption,), (hang,) = (read_guard_events(run, kind)
                                          for kind in ("damaged_checkpoint", "sdc", "hang"))
    assert damaged["path"] == "checkpoints/step-16"
    assert corruption["step"] == 12 and corruption["ranks"] == [0, 1], "either replica may be wrong"
    assert hang["step"] == 20 and hang["places"]["fault_injection.py, trigger"] == [1], (
        "only rank 1 hangs in the fault; rank 0 waits in a collective")
    assert "trigger" in (run / "hang" / "step-20-rank-00001.txt").read_text()
    skips = {e["step"]: e for e in read_guard_events(run, "skip")}
    assert sorted(skips) == [21, 27] and skips[21]["ranks"] == [1]
    assert "standard deviations above" in skips[27]["reason"]
    assert any(e["kind"] == "slow process" and e["rank"] == 1
               for e in read_guard_events(run, "alarm") if e["step"] == 30)
    assert {tuple(e["layers"]) for e in read_guard_events(run, "routing")} == {(1, 2)}
    assert {e.get("source") for e in read_guard_events(run, "expert_load")} == {None, "even", "odd"}
    *_, incidents = SECTIONS["Warnings and faults"].build(read_run(run)).tables
    assert {row[1] for row in incidents.rows} == {
        "step rejected", "restart", "hang", "silent corruption", "alarm", "injected fault",
        "damaged checkpoint"}
