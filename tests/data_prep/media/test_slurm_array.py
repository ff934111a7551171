"""A run as Slurm's jobs: what is submitted, and that its blocks leave the bytes of a run on one machine."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep.media import slurm_array, units
from megatron_sov.clusters import client
from megatron_sov.work.arrays import WORK, Jobs, keeping_failure
from tests.data_prep.media.chats import Encode, shown

PROFILE = """description: noted, not run
partition: cpu
account: lab
cpus_per_node: 8
gpus_per_node: 0
memory: 16G
"""


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is submitted: the work and its number of tasks, what it waits for, and the folder of its logs."""
    found: list[tuple[Any, ...]] = []

    def submit(script: Path, *, after: list[str]) -> str:
        found.append((*pickle.loads((script.parent / WORK).read_bytes()), after, script.parent))
        return str(100 + len(found))

    monkeypatch.setattr(client, "submit", submit)
    monkeypatch.setattr(client, "check_script", lambda text: None)
    monkeypatch.setattr(client, "ask", lambda *words: SimpleNamespace(stdout=""))
    monkeypatch.setattr(client, "check_partition", lambda name: None)
    monkeypatch.setattr(client, "states", lambda numbers: {})
    monkeypatch.setattr(slurm_array, "refuse_many_restarts", lambda *words: None)
    (tmp_path / "profile.yaml").write_text(PROFILE)
    return found


def test_an_array_and_a_last_job_leave_the_same_bytes(encode: Encode, tmp_path: Path,
                                                      noted: list[tuple[Any, ...]],
                                                      monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(units, "RECORDS_PER_UNIT", 1)
    chats = [shown(("image", name)) for name in ("light.png", "dark.png", "twin.png")]
    assert encode(chats, output="here") == 0
    there = ("--cluster", str(tmp_path / "profile.yaml"), "--workers", "2")
    assert encode(chats, *there, output="there") == 0
    assert "submitted encode 101, finish 102" in capsys.readouterr().out
    (work, num_tasks, after, logs), (last, one, behind, _) = noted
    assert (num_tasks, after, one, behind) == (2, [], 1, ["101"])
    assert "--gres" not in (logs / "job.sbatch").read_text()
    assert Jobs.read(tmp_path / ".there.slurm").numbers == {"encode": "101", "finish": "102"}
    work(1)
    noted.clear()
    assert encode(chats, *there, output="there") == 0  # typed again: what is not done
    (work, num_tasks, _, _), (last, *_) = noted
    assert num_tasks == 2
    for task in range(2):
        work(task)
    last(0)
    for name in ("records.jsonl", "pictures.bin"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert not (tmp_path / ".there.work").exists()
    assert encode(chats, *there, output="there") == 0
    assert "complete from before" in capsys.readouterr().out


def test_what_stops_a_job_is_told_by_the_next_command(encode: Encode, tmp_path: Path,
                                                      noted: list[tuple[Any, ...]],
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    there = ("--cluster", str(tmp_path / "profile.yaml"))
    assert encode([shown(("image", "broken.png"))], *there) == 0
    work, _, _, logs = noted[0]
    with pytest.raises(Exception, match=r"broken\.png is no picture"), keeping_failure(logs, 0):
        work(0)
    assert encode([shown(("image", "broken.png"))], *there) == 0
    assert "stopped by" in capsys.readouterr().out
