"""What went wrong is told in the order of time, in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov.publish.report.run_data import read_run
from megatron_sov.publish.report.sections import MAX_ROWS, SECTIONS
from megatron_sov.runs.obs.events import EventLog


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run in which everything went wrong once."""
    log = EventLog(tmp_path / "events.jsonl")
    for step in range(1, 41):
        if step not in (9, 20):
            log.write("step", step=step, loss=4.0 - step / 40, phase="1")
    log.write("skip", step=9, reason="the loss is nan", loss=float("nan"), grad_norm=float("nan"), ranks=[3])
    log.write("skip", step=20, reason="data.skip_steps")
    log.write("alarm", step=24, kind="collapse", layer=2,
              text="layer 2: the entropy of its expert load is 0.31")
    log.write("fault", step=30, fault="hang@step=30,rank=1", kind="hang", state="step", rank=1)
    log.write("hang", step=30, places={"faults.py, trigger": [1], "schedule.py, all_reduce_world": [0, 2]})
    log.write("restart", step=20, exit_code=76,
              text="rank 1 ended with exit code 76; all processes are started again")
    log.write("damaged_checkpoint", path="checkpoints/step-20", reason="model/0 has another hash",
              renamed_to="damaged-step-20")
    log.write("sdc", step=35, ranks=[1], hosts=["n7"], text="silent corruption after step 35: weights differ")
    log.write("rollback", step=38, back_to=30, refused=4,
              text="weights and optimizer are those of step 30 again")
    log.close()
    return tmp_path


def test_incidents_stand_in_the_order_of_time(run: Path) -> None:
    (incidents,) = SECTIONS["Warnings and faults"].of(read_run(run)).tables
    assert incidents.rows == [
        ["9", "step not learned", "the loss is nan; not finite on rank 3"],
        ["24", "alarm", "layer 2: the entropy of its expert load is 0.31"],
        ["30", "fault on purpose", "--inject hang@step=30,rank=1"],
        ["30", "hang", "no progress; every process wrote its stacks into hang/ and ended: "
                       "rank 1 in faults.py, trigger; rank 0, 2 in schedule.py, all_reduce_world"],
        ["20", "started again", "rank 1 ended with exit code 76; all processes are started again"],
        ["0", "damaged checkpoint", "model/0 has another hash; set aside as damaged-step-20"],
        ["35", "silent corruption", "silent corruption after step 35: weights differ"],
        ["38", "weights taken back", "weights and optimizer are those of step 30 again"]]


def test_a_long_list_is_cut_and_the_reader_is_told(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for step in range(1, MAX_ROWS + 31):
        log.write("skip", step=step, reason="the loss is inf", ranks=[])
    log.close()
    (table,) = SECTIONS["Warnings and faults"].of(read_run(tmp_path)).tables
    assert len(table.rows) == MAX_ROWS + 1 and table.rows[-1][2] == "… and 30 more in the run's events"
